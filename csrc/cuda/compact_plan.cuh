// Which row goes where when a cache is compacted: lists of integers, searched by warps and threads,
// and the lengths, positions and free blocks that a call returns.
#pragma once

#include "cuda/compact_table.cuh"

namespace tk::compact {

constexpr int64_t kNoLimit = INT64_MAX;
constexpr int64_t kChunk = 1024;  // entries that a block writes positions of

// One row of a list of integers.
struct Row {
  const char* values;
  int64_t stride;
  bool wide;

  __device__ int64_t operator[](int64_t i) const {
    if (wide) return *reinterpret_cast<const int64_t*>(values + i * stride);
    return *reinterpret_cast<const int32_t*>(values + i * stride);
  }
};

template <int kWords>
__device__ Row row_of(const Table<kWords>& table, const List& list, int64_t b, int64_t g) {
  const auto strides = record<Strides>(table, list.strides);
  const int64_t size = list.wide ? 8 : 4;
  return {static_cast<const char*>(list.values) + (b * strides.batch + g * strides.head) * size,
          strides.entry * size, list.wide != 0};
}

template <int kWords>
__device__ Row row_of(const Table<kWords>& table, int list, int64_t b, int64_t g) {
  return row_of(table, record<List>(table, list), b, g);
}

// How many of 0 … count − 1 come before the first that is not good; a thread alone.
template <class Good>
__device__ int64_t count_good(int64_t count, const Good& good) {
  int64_t low = 0;
#pragma unroll 1
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (good(middle)) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// How many entries, from the first, are 0 … bound − 1; a warp together, 32 probes at a time.
__device__ inline int64_t count_within(const Row& row, int64_t count, int64_t bound) {
  int64_t first = 0, last = count;
#pragma unroll 1
  while (first < last) {
    const int64_t step = (last - first + cuda::kWarp - 1) / cuda::kWarp;
    const int64_t probe = first + (cuda::lane() + 1) * step - 1;
    bool good = false;
    if (probe < last) {
      const int64_t value = row[probe];
      good = value >= 0 && value < bound;
    }
    first += cuda::count_bits(cuda::ballot(good)) * step;
    last = first + step - 1 < last ? first + step - 1 : last;
  }
  return first;
}

// A row of the index, and what is known of it.
struct Walk {
  Row index;
  int64_t count, kept, stays;  // filling, `kept` entries, of which `stays` stay
  int64_t first;               // filling in place, the entry of move 0: those that stay may turn
  int64_t limit;               // positions lie below
  bool fill, in_place;
};

// The number of entries that move, or may.
__device__ inline int64_t moves_of(const Walk& walk) {
  return walk.fill && walk.in_place ? walk.kept - walk.first : walk.count;
}

__device__ inline Walk walk_of(const Row& index, int64_t count, int64_t limit, const Common& common,
                               bool in_place, bool turns) {
  Walk walk{index, count, count, 0, 0, limit, common.fill, in_place};
  if (walk.fill) {
    walk.kept = count_within(index, count, kNoLimit);
    walk.stays = count_within(index, walk.kept, walk.kept);
    walk.first = turns ? 0 : walk.stays;
  }
  return walk;
}

struct Step {
  int64_t entry, slot, position;  // position −1: the entry is none, or not good
};

// Move number `number`: slot after slot; filling in place, entry after entry. An entry out of order
// or out of range moves nothing, and none moves upwards.
__device__ inline Step step_of(const Walk& walk, int64_t number) {
  Step step{number, number, -1};
  const bool to_holes = walk.fill && walk.in_place;
  if (to_holes) {
    step.entry = walk.first + number;
  } else if (walk.fill) {
    if (number >= walk.kept) return step;
    const int64_t before =
        count_good(walk.stays, [&](int64_t i) { return walk.index[i] < number; });
    const bool stay = before < walk.stays && walk.index[before] == number;
    step.entry = stay ? before : walk.stays + number - before;
    if (step.entry >= walk.kept) return step;
  }
  const int64_t found = walk.index[step.entry];
  const int64_t previous = step.entry > 0 ? walk.index[step.entry - 1] : -1;
  bool good = found < walk.limit && found > previous && (previous >= 0 || step.entry == 0);
  if (to_holes && step.entry < walk.stays) {
    step.slot = found;
    good = good && found < walk.kept;
  } else if (to_holes) {  // hole n is slot n + the number of entries that stay before it
    const int64_t hole = step.entry - walk.stays;
    step.slot = hole + count_good(walk.stays, [&](int64_t i) { return walk.index[i] <= hole + i; });
    good = good && found >= walk.kept;
  }
  if (good && found >= step.slot) step.position = found;
  return step;
}

// Writes one chunk of what an index row keeps.
template <int kWords>
__device__ void plan_chunk(const Table<kWords>& table, const Index& index, int64_t row,
                           int64_t first) {
  const int64_t b = row / index.kept.heads, g = row - b * index.kept.heads;
  Walk walk =
      walk_of(row_of(table, index.kept, b, g), index.count, kNoLimit, table.common, false, false);
  if (!walk.fill && first == 0) walk.kept = count_within(walk.index, index.count, kNoLimit);
  if (first == 0 && cuda::thread() == 0) index.lengths[row] = walk.kept;
  const int64_t last = first + kChunk < index.count ? first + kChunk : index.count;
#pragma unroll 1
  for (int64_t slot = first + cuda::thread(); slot < last; slot += cuda::threads())
    index.positions[row * index.count + slot] = step_of(walk, slot).position;
}

__device__ inline int64_t block_of(const Pages& pages, const char* table, int64_t i) {
  const int64_t at = i * pages.stride;
  const int64_t id = pages.wide ? reinterpret_cast<const int64_t*>(table)[at]
                                : int64_t{reinterpret_cast<const int32_t*>(table)[at]};
  return id >= 0 && id < pages.block_count ? id : -1;
}

// The blocks of a sample.
__device__ inline const char* blocks_of(const Pages& pages, int64_t b) {
  return static_cast<const char*>(pages.table) + b * pages.batch_stride * (pages.wide ? 8 : 4);
}

__device__ inline int64_t largest(int64_t mine, int64_t* partial) {
  mine = cuda::warp_max(mine);
  cuda::sync();
  if (cuda::lane() == 0) partial[cuda::warp()] = mine;
  cuda::sync();
  int64_t most = partial[0];
  for (int i = 1; i < cuda::warps(); ++i) most = partial[i] > most ? partial[i] : most;
  return most;
}

// The longest row of sample b, in all heads of `layers` layers: length_of(layer, head), of lists
// whose heads heads_of(layer) tells.
template <class HeadsOf, class LengthOf>
__device__ int64_t longest_of(int layers, int64_t before, int64_t* partial, const HeadsOf& heads_of,
                              const LengthOf& length_of) {
  int64_t longest = before;
  for (int layer = 0; layer < layers; ++layer) {
    // Threads go on where those of the layer before ended: few heads, many layers.
    const int64_t heads = heads_of(layer);
    const int64_t turn = (cuda::thread() + layer * 37) % cuda::threads();
    for (int64_t g = turn; g < heads; g += cuda::threads()) {
      const int64_t length = length_of(layer, g);
      longest = length > longest ? length : longest;
    }
  }
  return largest(longest, partial);
}

// Writes the blocks behind those that the kept rows of sample b take, up to the last that held one.
template <int kWords>
__device__ void free_blocks(const Table<kWords>& table, int64_t b, int64_t* partial) {
  const Common& common = table.common;
  const Pages& pages = common.pages;
  const auto layer_of = [&](int layer) {
    return record<Layer>(table, plane_of(table, int64_t{layer} * common.per_layer).layer);
  };
  const int64_t held = longest_of(
      common.lengths, pages.first ? 0 : pages.longest[2 * b], partial,
      [&](int layer) { return record<List>(table, layer_of(layer).lengths).heads; },
      [&](int layer, int64_t g) { return row_of(table, layer_of(layer).lengths, b, g)[0]; });
  const int64_t kept = longest_of(
      common.plans, pages.first ? 0 : pages.longest[2 * b + 1], partial,
      [&](int layer) { return record<Index>(table, layer_of(layer).index).kept.heads; },
      [&](int layer, int64_t g) {
        const auto index = record<Index>(table, layer_of(layer).index);
        const Row row = row_of(table, index.kept, b, g);
        return count_good(index.count, [&](int64_t i) { return row[i] >= 0; });
      });
  if (!pages.last) {
    cuda::sync();  // all have read what is written now
    if (cuda::thread() == 0) pages.longest[2 * b] = held;
    if (cuda::thread() == 0) pages.longest[2 * b + 1] = kept;
    return;
  }
  const int64_t size = pages.block_size, first = kept / size + (kept % size > 0);
  const int64_t used = held / size + (held % size > 0);
  const int64_t last = used < pages.most_blocks ? used : pages.most_blocks;
  const char* ids = blocks_of(pages, b);
  for (int64_t i = cuda::thread(); i < pages.most_blocks; i += cuda::threads())
    pages.freed[b * pages.most_blocks + i] =
        first + i < last ? block_of(pages, ids, first + i) : -1;
}

// The first plane of the grid: lengths and positions, then free blocks.
template <int kWords>
__device__ void plan(const Table<kWords>& table, int64_t* partial) {
  const Common& common = table.common;
  const int64_t plans = common.plans * common.index_rows * common.index_chunks;
  const int64_t all = plans + (common.pages.table != nullptr ? common.batch : 0);
  for (int64_t item = cuda::block(); item < all; item += cuda::blocks()) {
    if (item >= plans) {
      free_blocks(table, item - plans, partial);
      continue;
    }
    const int64_t rows = item / common.index_chunks;
    const int64_t first = (item - rows * common.index_chunks) * kChunk;
    const int64_t number = rows / common.index_rows, row = rows - number * common.index_rows;
    const auto layer = record<Layer>(table, plane_of(table, number * common.per_layer).layer);
    const auto index = record<Index>(table, layer.index);
    if (row < index.batch * index.kept.heads && (first < index.count || first == 0))
      plan_chunk(table, index, row, first);
  }
}

}  // namespace tk::compact
