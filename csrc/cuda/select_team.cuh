// Who selects tokens together: one block, or the blocks of a cluster, which tell each other what
// they have counted.
#pragma once

#include "cuda/rows.cuh"

namespace tk::cuda {

// What a selection needs of the arena. Every lane counts in one of kCopies histograms, so that no
// more than four lanes meet even where all scores are equal.
struct SelectMemory {
  static constexpr int kDigits = 256, kCopies = 8, kKeys = 8;
  static constexpr int kCounts = kKeys * kWarp + 1, kWords = 5;

  uint32_t* histogram;  // (kDigits, kCopies)
  uint32_t* counts;     // of warps and keys, their sum behind them
  uint64_t* sums;       // of eight warps
  uint32_t* words;      // digit, count above, count at it; of these two what the block has itself

  __device__ explicit SelectMemory(Arena& arena)
      : histogram(arena.shared<uint32_t>(kDigits * kCopies)),
        counts(arena.shared<uint32_t>(kCounts)),
        sums(arena.shared<uint64_t>(kDigits / kWarp)),
        words(arena.shared<uint32_t>(kWords)) {}

  static constexpr int64_t bytes() {
    return shared_bytes<uint32_t>(kDigits * kCopies) + shared_bytes<uint32_t>(kCounts) +
           shared_bytes<uint64_t>(kDigits / kWarp) + shared_bytes<uint32_t>(kWords);
  }

  template <class Count>
  __device__ Count* totals() const {
    return reinterpret_cast<Count*>(sums);
  }
};

// Keys of a block above a bar, and at it.
struct Found {
  uint32_t above, ties;
};

// One block by itself.
struct Alone {
  static constexpr bool kMany = false;
  static constexpr int rank = 0, blocks = 1;
  using Count = uint32_t;

  __device__ Alone() {}
  __device__ explicit Alone(Arena&) {}
  static constexpr int64_t bytes() { return 0; }

  __device__ uint32_t sum(uint32_t mine) const { return mine; }
  __device__ Count count(uint32_t mine, int, int) const { return mine; }
  __device__ static uint32_t all(Count count) { return count; }
  __device__ static uint32_t own(Count) { return 0; }
  __device__ Found before(const Found&) const { return {0, 0}; }
  __device__ uint32_t of_last(uint32_t mine) const { return mine; }
  __device__ void sync() const { cuda::sync(); }
};

// A cluster. A count is that of all blocks, in the upper half, with the block's own.
class Together {
 public:
  static constexpr bool kMany = true;
  using Count = uint64_t;
  const int rank, blocks;

  __device__ explicit Together(Arena& arena)
      : rank(cluster_rank()),
        blocks(cluster_blocks()),
        digits_(arena.shared<uint32_t>(2 * SelectMemory::kDigits)),
        told_(arena.shared<uint32_t>(kTold)) {}

  static constexpr int64_t bytes() {
    return shared_bytes<uint32_t>(2 * SelectMemory::kDigits) + shared_bytes<uint32_t>(kTold);
  }

  // `mine` is the same in all threads.
  __device__ uint32_t sum(uint32_t mine) const {
    if (thread() == 0) told_[2] = mine;
    sync_cluster();
    uint32_t total = 0;
    for (int r = 0; r < blocks; ++r) total += shared_of(told_, r)[2];
    return total;
  }

  // Of a digit, in rounds that take turns with two halves of the memory: what a block writes again
  // all have read before the barrier in between.
  __device__ Count count(uint32_t mine, int digit, int round) const {
    uint32_t* here = digits_ + round % 2 * SelectMemory::kDigits;
    if (digit >= 0) here[digit] = mine;
    sync_cluster();
    uint32_t total = 0;
    for (int r = 0; r < blocks && digit >= 0; ++r) total += shared_of(here, r)[digit];
    return Count{total} << 32 | mine;
  }

  __device__ static uint32_t all(Count count) { return static_cast<uint32_t>(count >> 32); }
  __device__ static uint32_t own(Count count) { return static_cast<uint32_t>(count); }

  // What lower blocks have found.
  __device__ Found before(const Found& mine) const {
    if (thread() == 0) {
      told_[0] = mine.above;
      told_[1] = mine.ties;
    }
    sync_cluster();
    Found found{};
    for (int r = 0; r < rank; ++r) {
      found.above += shared_of(told_, r)[0];
      found.ties += shared_of(told_, r)[1];
    }
    return found;
  }

  // What the last block has: `mine`, the same in all its threads.
  __device__ uint32_t of_last(uint32_t mine) const {
    if (thread() == 0) told_[3] = mine;
    sync_cluster();
    return shared_of(told_, blocks - 1)[3];
  }

  __device__ void sync() const { sync_cluster(); }

 private:
  static constexpr int kTold = 4;  // found above and at the bar, kept, chosen

  uint32_t *digits_, *told_;
};

}  // namespace tk::cuda
