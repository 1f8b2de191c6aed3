// The search among packed codes on the tensor cores: a block of tokens stays in shared memory,
// images of codes are streamed past it, and every token keeps its three highest scores.
//
// A score is off by at most
// ‖x−x₁−x₂‖·E + ‖x‖·E₀ + ‖x₂‖·E₂ + (n·D + 64)·2⁻²³·‖x‖·E + (D/8 + 12)·2⁻²⁵·E²: what packing left of
// the token and of the codes (E, E₀, E₂ the largest lengths of codes, of what is left of them, of
// their second parts), n products of D terms summed with truncation, the codes' own squares. Twice
// that is the window: only a code whose score lies within it of the best can be the nearest. One or
// two such codes are scored exactly; where there are three the search is not sure, and all codes
// have to be. How many there are does not depend on how tokens and codes were cut into blocks.
//
// A thread looks at the highest of its 16 scores of a tile; only where that lies within the window
// of the best that its row has had so far is any score looked at again.
#pragma once

#include "cuda/codebook.cuh"

namespace tk::cuda {

constexpr int kTileRows = 32;  // of a warp
constexpr int kStages = 3;     // images on the way
constexpr int kOwnRows = 4;    // of a thread: lane / 4 + 8·r of its warp

// The highest scores of a token; codes of the two highest.
struct Found {
  float best = kNothing, next = kNothing, third = kNothing;
  int32_t best_at = 0, next_at = 0;

  __device__ void insert(float score, int32_t code) {
    const bool first = score > best, second = score > next;
    third = second ? next : larger(score, third);
    next_at = first ? best_at : second ? code : next_at;
    next = first ? best : second ? score : next;
    best_at = first ? code : best_at;
    best = first ? score : best;
  }

  __device__ void join(const Found& other) {
    insert(other.best, other.best_at);
    insert(other.next, other.next_at);
    third = larger(third, other.third);
  }
};

// What is to be done for a token: which codes are to be scored exactly.
struct Verdict {
  int32_t first, second;  // second −1: there is no choice
  bool sure;
};

__device__ inline Verdict verdict_of(const Found& found, float window) {
  const bool usable = window >= 0 && found.best > 0.5f * kNever;
  if (!usable) return {0, -1, true};
  const float floor = found.best - window;
  const bool tame = window < -kNever && found.best < -kNever;
  return {found.best_at, found.next >= floor ? found.next_at : -1, tame && !(found.third >= floor)};
}

// A block of 32·row_warps tokens; column_warps go through tiles side by side.
struct BlockShape {
  int row_warps, column_warps;
  int stages = 0;  // of groups (search_hopper.cuh); 0: warps multiply one by one

  __host__ __device__ int rows() const { return row_warps * kTileRows; }
  __host__ __device__ int threads() const { return row_warps * column_warps * kWarp; }
};

// What a block should take for so many steps: four warps keep a multiprocessor less than busy,
// images arrive no faster than one for three warps, and tokens are packed and finished besides.
inline int64_t cost_of(const BlockShape& shape, int64_t steps) {
  const int warps = shape.row_warps * shape.column_warps, busy = warps > 4 ? warps : 5;
  const int images = 3 * shape.column_warps;
  return steps * (busy > images ? busy : images) + 16 + 8 * shape.row_warps;
}

__host__ __device__ inline int64_t stage_bytes(const Packed& p) {
  return (kImageBytes + p.term_bytes() + kAlignment - 1) / kAlignment * kAlignment;
}

__host__ __device__ inline int64_t group_stage_bytes(const Packed& p) {
  return (2 * (kImageBytes + p.term_bytes()) + kAlignment - 1) / kAlignment * kAlignment;
}

__host__ __device__ inline int64_t stages_bytes(const Packed& p, const BlockShape& shape) {
  return shape.stages > 0 ? shape.stages * group_stage_bytes(p)
                          : kStages * shape.column_warps * stage_bytes(p);
}

// What a block of the search keeps in shared memory.
struct SearchMemory {
  char* tokens;        // (chunks) images of `rows` rows
  char* stages;        // (kStages, column_warps) images and terms, or those of groups
  float* windows;      // (rows); −1 of what is not finite
  Found* found;        // (rows, column_warps)
  float* bounds;       // 4, and a maximum per warp of each
  Gate *full, *empty;  // of stages of groups

  __device__ SearchMemory(Arena& arena, const Packed& p, const BlockShape& shape)
      : tokens(arena.shared<char>(int64_t{shape.rows()} * p.chunks * kRowBytes, kAlignment)),
        stages(arena.shared<char>(stages_bytes(p, shape), kAlignment)),
        windows(arena.shared<float>(shape.rows())),
        found(arena.shared<Found>(int64_t{shape.rows()} * shape.column_warps)),
        bounds(arena.shared<float>(4 * (1 + 8))),
        full(arena.shared<Gate>(shape.stages)),
        empty(arena.shared<Gate>(shape.stages)) {}

  static int64_t bytes(const Packed& p, const BlockShape& shape) {
    return shared_bytes<char>(int64_t{shape.rows()} * p.chunks * kRowBytes, kAlignment) +
           shared_bytes<char>(stages_bytes(p, shape), kAlignment) +
           shared_bytes<float>(shape.rows()) +
           shared_bytes<Found>(int64_t{shape.rows()} * shape.column_warps) +
           shared_bytes<float>(4 * (1 + 8)) + 2 * shared_bytes<Gate>(shape.stages);
  }
};

// bounds[0…2] = the largest of what the blocks of prepare_kernel found.
__device__ inline void read_bounds(const Packed& p, int64_t group, float* bounds) {
  const float* from = p.bounds + group * p.prepared() * 4;
  float most[3] = {};
  for (int64_t i = thread(); i < p.prepared(); i += threads()) {
#pragma unroll
    for (int b = 0; b < 3; ++b) most[b] = larger(most[b], from[i * 4 + b]);
  }
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    const float all = warp_max(most[b]);
    if (lane() == 0) bounds[4 + warp() * 4 + b] = all;
  }
  sync();
  if (thread() < 3) {
    float all = 0;
    for (int w = 0; w < warps(); ++w) all = larger(all, bounds[4 + w * 4 + thread()]);
    bounds[thread()] = all;
  }
  sync();
}

__device__ inline float window_of(const Packed& p, const Lengths& squares, const float* bounds) {
  const float length = sqrtf(squares.whole), left = sqrtf(squares.left);
  const float most = bounds[0], most_left = bounds[1], most_second = bounds[2];
  const bool twice = p.joined || p.parts == 2;
  const auto dim = static_cast<float>(p.dim());
  float error = left * most + (length + left) * most_left;
  if (twice) error += sqrtf(squares.second) * most_second;
  error += ((twice ? 3.0f : 1.0f) * dim + 64.0f) * 1.2e-7f * length * most;
  if (p.metric == Metric::kL2) error += (dim * 0.125f + 12.0f) * 3e-8f * most * most;
  return error == error ? 2.02f * error : kInfinity;
}

// Packs the tokens of a block. row(r) gives the numbers of token r, `there` of them.
template <class T, class Row>
__device__ void pack_tokens(const Packed& p, int64_t group, const BlockShape& shape, int64_t there,
                            const SearchMemory& memory, const Row& row) {
  const float* centre = p.centre + group * kMostDim;
  const int dim = p.dim(), teams = threads() / kTeam;
  const int64_t image = int64_t{shape.rows()} * kRowBytes;
  for (int r = thread() / kTeam; r < shape.rows(); r += teams) {
    const bool here = r < there;
    const Numbers numbers = row(here ? r : 0);
    bool whole = here;
    const Lengths squares = pack_vector<T>(
        p, false, 0,
        [&](int d, float (&values)[8]) {
          numbers.eight(d, dim, values);
          float middle[8];
          Numbers{centre, DType::kFloat32, 1, true}.eight(d, kMostDim, middle);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            whole = whole && is_finite(values[i]);
            values[i] -= middle[i];
            if (!here || !is_finite(values[i])) values[i] = 0;
          }
        },
        [&](int chunk, int unit) {
          return memory.tokens + chunk * image + place_in_image(r, unit);
        });
    const Lanes team = (Lanes{1} << kTeam) - 1, shift = static_cast<Lanes>(lane() / kTeam * kTeam);
    const bool all_whole = (ballot(whole) >> shift & team) == team;
    if (lane() % kTeam == 0)
      memory.windows[r] = all_whole ? window_of(p, squares, memory.bounds) : -1.0f;
  }
}

// sums += 32 tokens · 64 codesᵀ over the 16 terms that begin at these units of their rows.
template <class T, int parts>
__device__ void add_slot(float (&sums)[2][8][4], const char* tokens, int token_unit,
                         const char* codes, int code_unit) {
  const int eighth = lane() % 8;
  const int token = eighth + lane() / 8 % 2 * 8, token_half = lane() / 16;
  const int code = eighth + lane() / 16 * 8, code_half = lane() / 8 % 2;
  uint32_t left[parts][2][4];
#pragma unroll
  for (int part = 0; part < parts; ++part)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = (token_unit + 4 * part + token_half) ^ eighth;
      load_matrices<4, false>(left[part][i], tokens + (16 * i + token) * kRowBytes + unit * 16);
    }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t right[parts][2][2];
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      uint32_t words[4];
      const int unit = (code_unit + 4 * part + code_half) ^ eighth;
      load_matrices<4, false>(words, codes + (16 * j + code) * kRowBytes + unit * 16);
#pragma unroll
      for (int v = 0; v < 4; ++v) right[part][v / 2][v % 2] = words[v];
    }
    // Small products first: second · first part, first · second, first · first.
#pragma unroll
    for (int product = 2 * parts - 2; product >= 0; --product)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int v = 0; v < 2; ++v)
          multiply_add<T>(sums[i][2 * j + v], left[product / 2][i], right[product % 2][v]);
  }
}

// The scores of a tile, of which this thread has columns 8·j + lane % 4 · 2 (+ 1) of its rows;
// the tile begins at the thread's sums `from`.
template <int from, int I, int J>
__device__ void take_scores(float (&sums)[I][J][4], const float* terms, int32_t first_code,
                            const float (&windows)[2 * I], float (&floors)[2 * I],
                            Found (&found)[2 * I]) {
  const int column = lane() % 4 * 2;
  float highest[2 * I];
#pragma unroll
  for (int r = 0; r < 2 * I; ++r) highest[r] = kNothing;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const auto t = load<Vector<float, 4>>(terms + (8 * j + column) * 2);
#pragma unroll
    for (int r = 0; r < 2 * I; ++r) {
      float& first = sums[r / 2][from + j][r % 2 * 2];
      float& second = sums[r / 2][from + j][r % 2 * 2 + 1];
      first = fused(first, t.at[0], t.at[1]);
      second = fused(second, t.at[2], t.at[3]);
      highest[r] = larger(highest[r], larger(first, second));
    }
  }
  bool near = false;
#pragma unroll
  for (int r = 0; r < 2 * I; ++r) near = near || highest[r] >= floors[r];
  if (!any(near)) return;
#pragma unroll
  for (int r = 0; r < 2 * I; ++r) {
    if (highest[r] >= floors[r]) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float score = sums[r / 2][from + j][r % 2 * 2 + v];
          if (score >= floors[r]) found[r].insert(score, first_code + 8 * j + column + v);
        }
    }
    float best = found[r].best;
    best = larger(best, shuffle_xor(best, 1));
    best = larger(best, shuffle_xor(best, 2));
    floors[r] = best - windows[r];
  }
}

// Where a block is in its columns of images: a chunk of as many as there are column warps.
struct Step {
  int column, end, chunk = 0, stage = 0;

  __device__ bool there() const { return column < end; }
  __device__ void next(const Packed& p, int column_warps) {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (++chunk < p.chunks) return;
    chunk = 0;
    column += column_warps;
  }
};

// Asks for the images of one step, for each column warp its own.
__device__ inline void fetch_step(const Packed& p, const char* columns, const Step& step,
                                  int column_warps, char* stages) {
  const int each = static_cast<int>(stage_bytes(p)), image = static_cast<int>(kImageBytes);
  const int bytes = image + (step.chunk == p.chunks - 1 ? static_cast<int>(p.term_bytes()) : 0);
  const char* from = columns + step.column * p.column_bytes() + step.chunk * kImageBytes;
  char* to = stages + step.stage * column_warps * each;
  for (int c = 0; c < column_warps && step.column + c < step.end; ++c) {
    for (int at = thread() * 16; at < bytes; at += threads() * 16)
      copy_async<16>(to + at, from + at);
    from += p.column_bytes();
    to += each;
  }
}

// sums += what a warp's tokens and the codes of one tile have in common in one chunk.
template <class T, int parts>
__device__ void add_chunk(float (&sums)[2][8][4], const char* tokens, const char* codes, int unit,
                          int count) {
  constexpr int slots = parts == 2 ? 2 : 4;
  if (count >= slots) {
#pragma unroll
    for (int s = 0; s < slots; ++s) add_slot<T, parts>(sums, tokens, 2 * s, codes, unit + 2 * s);
  } else {
#pragma unroll 1
    for (int s = 0; s < count; ++s) add_slot<T, parts>(sums, tokens, 2 * s, codes, unit + 2 * s);
  }
}

// Scores of all codes in columns [begin, end) of images: what each thread keeps of its rows.
template <class T, int parts>
__device__ void scan(const Packed& p, int64_t group, int begin, int end, const BlockShape& shape,
                     const SearchMemory& memory, Found (&found)[kOwnRows]) {
  const int column_warp = warp() / shape.row_warps, row = warp() % shape.row_warps * kTileRows;
  const int image = shape.rows() * kRowBytes, each = static_cast<int>(stage_bytes(p));
  const char* columns = p.column(group, 0);
  float windows[kOwnRows], floors[kOwnRows];
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
    windows[r] = memory.windows[row + lane() / 4 + 8 * r];
    floors[r] = windows[r] >= 0 ? -kInfinity : kInfinity;
    if (windows[r] < 0) windows[r] = -kInfinity;
  }
  Step asked{begin, end}, step{begin, end};
  const auto ask = [&] {
    if (asked.there()) fetch_step(p, columns, asked, shape.column_warps, memory.stages);
    commit_copies();
    asked.next(p, shape.column_warps);
  };
  for (int i = 1; i < kStages; ++i) ask();
  float sums[2][8][4] = {};
  for (; step.there(); step.next(p, shape.column_warps)) {
    wait_copies<kStages - 2>();
    sync();
    ask();
    const int column = step.column + column_warp;
    if (column >= end) continue;
    const char* tokens = memory.tokens + step.chunk * image + row * kRowBytes;
    const char* codes = memory.stages + (step.stage * shape.column_warps + column_warp) * each;
    const float* terms = reinterpret_cast<const float*>(codes + kImageBytes);
    const int left = p.slots - step.chunk * p.slots_of_chunk();
#pragma unroll 1
    for (int tile = 0; tile < p.tiles; ++tile) {
      add_chunk<T, parts>(sums, tokens, codes, tile * 2 * p.slots, left);
      if (step.chunk < p.chunks - 1) break;
      take_scores<0>(sums, terms + tile * kImageRows * 2, (column * p.tiles + tile) * kImageRows,
                     windows, floors, found);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int v = 0; v < 4; ++v) sums[i][j][v] = 0;
    }
  }
  wait_copies<0>();
}

// What the four threads of a row found, in all of them.
__device__ inline void join_lanes(Found& found) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    Found other;
    other.best = shuffle_xor(found.best, step);
    other.next = shuffle_xor(found.next, step);
    other.third = shuffle_xor(found.third, step);
    other.best_at = shuffle_xor(found.best_at, step);
    other.next_at = shuffle_xor(found.next_at, step);
    found.join(other);
  }
}

// Puts what the threads of a row found together in memory.found[row · column_warps]; all threads of
// the block call, and sync() follows.
__device__ inline void join_threads(const BlockShape& shape, const SearchMemory& memory,
                                    Found (&found)[kOwnRows]) {
  const int column_warp = warp() / shape.row_warps, row = warp() % shape.row_warps * kTileRows;
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
    join_lanes(found[r]);
    if (lane() % 4 == 0)
      memory.found[(row + lane() / 4 + 8 * r) * shape.column_warps + column_warp] = found[r];
  }
  sync();
  for (int r = thread(); r < shape.rows(); r += threads()) {
    Found all = memory.found[r * shape.column_warps];
    for (int c = 1; c < shape.column_warps; ++c) all.join(memory.found[r * shape.column_warps + c]);
    memory.found[r * shape.column_warps] = all;
  }
  sync();
}

// One search of a block: `found` of every row of memory afterwards.
template <class T, int parts>
__device__ void search_block(const Packed& p, int64_t group, int64_t begin, int64_t end,
                             const BlockShape& shape, const SearchMemory& memory) {
  sync();
  Found found[kOwnRows];
  scan<T, parts>(p, group, static_cast<int>(begin), static_cast<int>(end), shape, memory, found);
  join_threads(shape, memory, found);
}

}  // namespace tk::cuda
