// Whether this is compiled under ThreadSanitizer.
#pragma once

namespace df11 {

// It takes ten times as long: drivers give it a part of their tests, of every kind some.
#ifdef __SANITIZE_THREAD__
inline constexpr bool kIsSlow = true;
#else
inline constexpr bool kIsSlow = false;
#endif

}  // namespace df11
