// Sorting of 64-bit words by one block: a bitonic network whose comparisons all put the smaller
// word first, so that nothing has to be padded.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

constexpr int64_t kSortRoom = 8192;  // words that are sorted in shared memory at a time

// Compares in pairs: pair(i) gives the lower and the higher place for every i in [0, pairs).
template <class Pair>
__device__ void compare_pairs(uint64_t* words, int64_t count, int64_t pairs, const Pair& pair) {
  for (int64_t i = thread(); i < pairs; i += threads()) {
    const auto [low, high] = pair(i);
    if (high >= count) continue;
    const uint64_t a = words[low], b = words[high];
    if (b < a) {
      words[low] = b;
      words[high] = a;
    }
  }
  sync();
}

struct SortPair {
  int64_t low, high;
};

// Two sorted halves of every run of `size` words, the first step of merging them.
__device__ inline void compare_mirrored(uint64_t* words, int64_t count, int64_t pairs,
                                        int64_t size) {
  compare_pairs(words, count, pairs, [=](int64_t i) {
    const int64_t run = (i & ~(size / 2 - 1)) * 2, at = i & (size / 2 - 1);
    return SortPair{run + at, run + size - 1 - at};
  });
}

// The steps that follow, down to `last`.
__device__ inline void compare_strides(uint64_t* words, int64_t count, int64_t pairs,
                                       int64_t stride, int64_t last = 1) {
  for (; stride >= last; stride /= 2) {
    compare_pairs(words, count, pairs, [=](int64_t i) {
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
    compare_mirrored(words, count, pairs, size);
    compare_strides(words, count, pairs, size / 4);
  }
}

// Runs body(words, count) on every kSortRoom words of `words`, brought to `room` and back.
template <class Body>
__device__ void in_room(uint64_t* words, int64_t count, uint64_t* room, const Body& body) {
  for (int64_t first = 0; first < count; first += kSortRoom) {
    const int64_t here = count - first < kSortRoom ? count - first : kSortRoom;
    for (int64_t i = thread(); i < here; i += threads()) room[i] = words[first + i];
    sync();
    body(room, here);
    for (int64_t i = thread(); i < here; i += threads()) words[first + i] = room[i];
    sync();
  }
}

// The same for words of global memory; `room` holds kSortRoom words of shared memory, or `count`
// where they are fewer.
__device__ inline void sort_words(uint64_t* words, int64_t count, uint64_t* room) {
  in_room(words, count, room, [](uint64_t* some, int64_t here) { sort_words(some, here); });
  for (int64_t size = 2 * kSortRoom; size / 2 < count; size *= 2) {
    const int64_t pairs = sort_pairs(count);
    compare_mirrored(words, count, pairs, size);
    compare_strides(words, count, pairs, size / 4, kSortRoom);
    in_room(words, count, room, [](uint64_t* some, int64_t here) {
      compare_strides(some, here, kSortRoom / 2, kSortRoom / 2);
    });
  }
}

}  // namespace tk::cuda
