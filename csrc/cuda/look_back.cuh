// Sums over all blocks that started earlier, without a barrier between blocks: decoupled look-back.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

constexpr uint64_t kOwnSum = uint64_t{1} << 62;    // what one block has
constexpr uint64_t kWholeSum = uint64_t{1} << 63;  // what it and all before it have

// The sum of what the blocks with lower tickets have, in all lanes of the one warp that calls:
// number `number` has `mine`, at least 0 and below 2^62. `words` are 0 before the launch.
__device__ inline int64_t look_back(uint64_t* words, int64_t number, int64_t mine) {
  const auto publish = [=](uint64_t kind, int64_t value) {
    if (lane() == 0) store_release(words + number, kind | static_cast<uint64_t>(value));
  };
  publish(number == 0 ? kWholeSum : kOwnSum, mine);
  int64_t before = 0;
  for (int64_t behind = number; behind > 0; behind -= kWarp) {
    const int64_t at = behind - 1 - lane();
    uint64_t word = kWholeSum;
    if (at >= 0) {
      wait_until([&] {
        word = load_acquire(words + at);
        return word != 0;
      });
    }
    const Lanes whole = ballot(word >= kWholeSum);
    const int last = whole == 0 ? kWarp : lowest_bit(whole);
    before += warp_sum(lane() <= last ? static_cast<int64_t>(word & (kOwnSum - 1)) : 0);
    if (whole != 0) break;
  }
  if (number > 0) publish(kWholeSum, before + mine);
  return before;
}

// The sum of what all lower threads of the block have; that of all threads in `total`. `sums` holds
// one entry per warp and one more. All threads call it.
template <class T>
__device__ T sum_below(T mine, T* sums, T& total) {
  const T reached = warp_scan(mine);
  if (lane() == kWarp - 1) sums[warp()] = reached;
  sync();
  T before = reached - mine;
  total = 0;
  for (int w = 0; w < warps(); ++w) {
    if (w == warp()) before += total;
    total += sums[w];
  }
  sync();
  return before;
}

}  // namespace tk::cuda
