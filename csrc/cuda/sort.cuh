// Sorting of 64-bit words by one block or the blocks of a team: a bitonic network whose comparisons
// all put the smaller word first, so that nothing has to be padded.
#pragma once

#include "cuda/select_team.cuh"

namespace tk::cuda {

constexpr int64_t kSortRoom = 8192;  // words that are sorted in shared memory at a time

// Compares in pairs: pair(i) gives the lower and the higher place for every i in [0, pairs).
template <class Team, class Pair>
__device__ void compare_pairs(uint64_t* words, int64_t count, int64_t pairs, const Team& team,
                              const Pair& pair) {
  const int64_t step = int64_t{team.blocks} * threads();
  for (int64_t i = int64_t{team.rank} * threads() + thread(); i < pairs; i += step) {
    const auto [low, high] = pair(i);
    if (high >= count) continue;
    const uint64_t a = words[low], b = words[high];
    if (b < a) {
      words[low] = b;
      words[high] = a;
    }
  }
  team.sync();
}

struct SortPair {
  int64_t low, high;
};

// Two sorted halves of every run of `size` words, the first step of merging them.
template <class Team>
__device__ void compare_mirrored(uint64_t* words, int64_t count, int64_t pairs, int64_t size,
                                 const Team& team) {
  compare_pairs(words, count, pairs, team, [=](int64_t i) {
    const int64_t run = (i & ~(size / 2 - 1)) * 2, at = i & (size / 2 - 1);
    return SortPair{run + at, run + size - 1 - at};
  });
}

// The steps that follow, down to `last`.
template <class Team>
__device__ void compare_strides(uint64_t* words, int64_t count, int64_t pairs, int64_t stride,
                                const Team& team, int64_t last = 1) {
  for (; stride >= last; stride /= 2) {
    compare_pairs(words, count, pairs, team, [=](int64_t i) {
      const int64_t low = (i & ~(stride - 1)) * 2 + (i & (stride - 1));
      return SortPair{low, low + stride};
    });
  }
}

__device__ inline int64_t sort_pairs(int64_t count) {
  int64_t pairs = 1;
  while (2 * pairs < count) pairs *= 2;
  return pairs;
}

// Ascending. All threads of the block call it, after a barrier; it ends with one.
__device__ inline void sort_words(uint64_t* words, int64_t count) {
  const int64_t pairs = sort_pairs(count);
  for (int64_t size = 2; size / 2 < count; size *= 2) {
    compare_mirrored(words, count, pairs, size, Alone());
    compare_strides(words, count, pairs, size / 4, Alone());
  }
}

// Runs body(words, count) on every kSortRoom words of `words`, brought to `room` and back.
template <class Team, class Body>
__device__ void in_room(uint64_t* words, int64_t count, uint64_t* room, const Team& team,
                        const Body& body) {
  const int64_t step = team.blocks * kSortRoom;
  for (int64_t first = team.rank * kSortRoom; first < count; first += step) {
    const int64_t here = count - first < kSortRoom ? count - first : kSortRoom;
    for (int64_t i = thread(); i < here; i += threads()) room[i] = words[first + i];
    sync();
    body(room, here);
    for (int64_t i = thread(); i < here; i += threads()) words[first + i] = room[i];
    sync();
  }
  team.sync();
}

// The same for words of global memory, by all blocks of a team; `room` holds kSortRoom words of
// shared memory, or `count` where they are fewer.
template <class Team>
__device__ void sort_words(uint64_t* words, int64_t count, uint64_t* room, const Team& team) {
  in_room(words, count, room, team, [](uint64_t* some, int64_t here) { sort_words(some, here); });
  for (int64_t size = 2 * kSortRoom; size / 2 < count; size *= 2) {
    const int64_t pairs = sort_pairs(count);
    compare_mirrored(words, count, pairs, size, team);
    compare_strides(words, count, pairs, size / 4, team, kSortRoom);
    in_room(words, count, room, team, [](uint64_t* some, int64_t here) {
      compare_strides(some, here, kSortRoom / 2, kSortRoom / 2, Alone());
    });
  }
}

}  // namespace tk::cuda
