// Shares a launch's blocks out among the tensors or matrices that it works on.
#pragma once

#include <cstdint>

namespace df11::native {

// Gives each of `count` a block, and those that are left, one by one, to the one that has most work
// for each of its blocks; but none more than `most` of it, since they would have nothing to do.
inline void share_blocks(int blocks, int count, const int64_t* work, const int64_t* most,
                         int* shares) {
  for (int i = 0; i < count; ++i) shares[i] = 1;
  for (int left = blocks - count; left > 0; --left) {
    int busiest = -1;
    for (int i = 0; i < count; ++i) {
      if (shares[i] >= most[i]) continue;
      if (busiest < 0 || work[i] * shares[busiest] > work[busiest] * shares[i]) busiest = i;
    }
    if (busiest < 0) break;
    ++shares[busiest];
  }
}

}  // namespace df11::native
