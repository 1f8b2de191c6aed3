// The scan of code_search.cuh on a Hopper: two groups of four warps multiply their tokens, 64 ·
// tiles rows each, by 128 codes at a time, where they lie in shared memory, while bulk copies bring
// the next images. Nothing else differs: scores have the same bound, and the same codes are kept.
//
// Both groups go through all images at their own pace: while one looks at its scores, the other
// multiplies.
#pragma once

#include "cuda/code_search.cuh"

namespace tk::cuda {

constexpr int kSideBySide = 2;  // images of a stage
constexpr int kMostGroupStages = 6;
constexpr int kArrivals = 2 * kSideBySide;  // at a full stage: images and their terms

// Rows of a block whose groups have `tiles` tiles of 64 rows.
constexpr int group_rows(int tiles) { return 2 * 64 * tiles; }

// What the groups of a block make of its tokens: 256 rows, or 128 in two parts.
__host__ __device__ constexpr int group_tiles(int parts) { return parts == 2 ? 1 : 2; }

// The shape of a block of groups for these codes, with as many stages as fit; with none, they are
// searched as elsewhere.
template <class Fits>
BlockShape group_shape(const Packed& p, const Fits& fits) {
  const int rows = group_rows(group_tiles(p.parts));
  BlockShape shape{rows / kTileRows, 8 * kTileRows / rows, kMostGroupStages};
  while (shape.stages > 2 && !fits(shape)) --shape.stages;
  if (p.tiles > 1 || shape.stages == 2) shape.stages = 0;
  return shape;
}

inline int64_t whole_stages(int64_t images) {
  return (images + kSideBySide - 1) / kSideBySide * kSideBySide;
}

// What a block should take for so many images side by side, in steps of a warp. Of one chunk, where
// looking at scores takes as long as multiplying, groups expect nothing.
inline int64_t cost_of_block(const Packed& p, const BlockShape& shape, int64_t images) {
  const int64_t wide = shape.stages > 0 ? kSideBySide : shape.column_warps;
  const int64_t steps = (images + wide - 1) / wide * p.chunks * p.tiles;
  const bool faster = shape.stages > 0 && p.chunks > 1;  // three quarters of the time
  const int64_t step = wide * shape.row_warps;
  return (faster ? steps * step * 3 / 4 : steps * step) + 16 + 8 * shape.row_warps;
}

// The first row of tile i of this thread's group, of which its warp has 16.
template <int tiles>
__device__ int first_row(int tile) {
  return (group() * tiles + tile) * 64 + warp() % 4 * 16 + lane() / 4;
}

// The stages of a ring, one after the other.
struct RingPlace {
  int stage = 0;
  uint32_t round = 0;

  __device__ void next(int stages) {
    if (++stage < stages) return;
    stage = 0;
    ++round;
  }
};

// Asks for the images of one step, by one warp: `chunk` of columns `first` and the next; of the
// last chunk also the terms. Of what is not there the last column comes again.
__device__ inline void fetch_stage(const Packed& p, int64_t group, int chunk, int64_t first,
                                   int64_t end, const SearchMemory& memory,
                                   const RingPlace& place) {
  if (place.round > 0) wait_gate(memory.empty + place.stage, place.round - 1);
  Gate* full = memory.full + place.stage;
  char* stage = memory.stages + place.stage * group_stage_bytes(p);
#pragma unroll
  for (int c = 0; c < kSideBySide; ++c) {
    const char* column = p.column(group, first + c < end ? first + c : end - 1);
    copy_bulk(stage + c * kImageBytes, column + chunk * kImageBytes, kImageBytes, full);
    if (chunk == p.chunks - 1)
      copy_bulk(stage + kSideBySide * kImageBytes + c * p.term_bytes(),
                column + p.chunks * kImageBytes, p.term_bytes(), full);
    else if (lane() == 0)
      arrive(full);
  }
}

// sums += tokens · codesᵀ over `count` slots of a chunk, to be waited for. Each path has a fence of
// its own: behind one for all of them ptxas makes products wait for one another.
template <class T, int parts, int tiles>
__device__ void add_stage(float (&sums)[tiles][16][4], const T* tokens, int rows, int chunk,
                          const T* codes, int count) {
  constexpr int slots = parts == 2 ? 2 : 4, per_part = kPanel<T> / 2;
  const auto add = [&](int slot) {
  // Small products first, as code_search.cuh has them.
#pragma unroll
    for (int product = 2 * parts - 2; product >= 0; --product)
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        const bool more = chunk > 0 || slot > 0 || product < 2 * parts - 2;
        const int row = (group() * tiles + i) * 64, term = slot * kSlot;
        multiply_add_group<T, 128>(
            sums[i], describe(tokens, rows, row, chunk * kPanel<T> + term + product / 2 * per_part),
            describe(codes, 128, 0, term + product % 2 * per_part), more);
      }
  };
  if (count == slots) {
    fence_products(sums);
#pragma unroll
    for (int slot = 0; slot < slots; ++slot) add(slot);
    commit_products();
  } else {
#pragma unroll 1
    for (int slot = 0; slot < count; ++slot) {
      fence_products(sums);
      add(slot);
      commit_products();
    }
  }
}

// Scores of all codes in columns [begin, end) of images: what each thread keeps of its rows.
template <class T, int parts, int tiles>
__device__ void scan_groups(const Packed& p, int64_t group_of_codes, int64_t begin, int64_t end,
                            const BlockShape& shape, const SearchMemory& memory,
                            Found (&found)[2 * tiles]) {
  const int stages = shape.stages, rows = shape.rows();
  float windows[2 * tiles], floors[2 * tiles];
#pragma unroll
  for (int r = 0; r < 2 * tiles; ++r) {
    windows[r] = memory.windows[first_row<tiles>(r / 2) + r % 2 * 8];
    floors[r] = windows[r] >= 0 ? -kInfinity : kInfinity;
    if (windows[r] < 0) windows[r] = -kInfinity;
  }
  RingPlace asked, here;
  int64_t asked_column = begin;
  int asked_chunk = 0;
  const auto ask = [&] {
    if (warp() != 0 || asked_column >= end) return;
    fetch_stage(p, group_of_codes, asked_chunk, asked_column, end, memory, asked);
    asked.next(stages);
    if (++asked_chunk < p.chunks) return;
    asked_chunk = 0;
    asked_column += kSideBySide;
  };
  const auto release = [&](int stage) {
    warp_sync();
    if (lane() == 0) arrive(memory.empty + stage);
  };
  for (int i = 0; i < stages - 2; ++i) ask();
  float sums[tiles][16][4];
  const auto* tokens = reinterpret_cast<const T*>(memory.tokens);
  constexpr int slots = parts == 2 ? 2 : 4;
#pragma unroll 1
  for (int64_t column = begin; column < end; column += kSideBySide) {
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      ask();
      wait_gate(memory.full + here.stage, here.round);
      const char* stage = memory.stages + here.stage * group_stage_bytes(p);
      const int left = p.slots - chunk * slots;
      add_stage<T, parts>(sums, tokens, rows, chunk, reinterpret_cast<const T*>(stage),
                          left < slots ? left : slots);
      wait_products<1>(sums);
      if (chunk > 0) release(here.stage > 0 ? here.stage - 1 : stages - 1);
      if (chunk < p.chunks - 1) here.next(stages);
    }
    wait_products<0>(sums);
    const auto* terms = reinterpret_cast<const float*>(
        memory.stages + here.stage * group_stage_bytes(p) + kSideBySide * kImageBytes);
    const auto code = static_cast<int32_t>(column * kImageRows);
    take_scores<0>(sums, terms, code, windows, floors, found);
    if (column + 1 < end)
      take_scores<8>(sums, terms + 2 * kImageRows, code + kImageRows, windows, floors, found);
    release(here.stage);
    here.next(stages);
  }
}

// One search of a block by groups: `found` of every row of memory afterwards.
template <class T, int parts>
__device__ void search_block_by_groups(const Packed& p, int64_t group_of_codes, int64_t begin,
                                       int64_t end, const BlockShape& shape,
                                       const SearchMemory& memory) {
  constexpr int tiles = group_tiles(parts);
  if (thread() == 0) {
    for (int s = 0; s < shape.stages; ++s) {
      init_gate(memory.full + s, kArrivals);
      init_gate(memory.empty + s, warps());
    }
  }
  fence_bulk();
  sync();
  Found found[2 * tiles];
  scan_groups<T, parts, tiles>(p, group_of_codes, begin, end, shape, memory, found);
#pragma unroll
  for (int r = 0; r < 2 * tiles; ++r) {
    join_lanes(found[r]);
    if (lane() % 4 == 0)
      memory.found[(first_row<tiles>(r / 2) + r % 2 * 8) * shape.column_warps] = found[r];
  }
  sync();
}

}  // namespace tk::cuda
