// The number of lanes that go on together: those of a GPU's warp.
#pragma once

namespace df11 {

inline constexpr int kLanes = 32;

}  // namespace df11
