// What the soft aggregations share on a GPU: tokens that take part, the softmax of a piece of them,
// rows of results, and the launch that joins what splits of the tokens have summed.
#pragma once

#include <cmath>

#include "cuda/product.cuh"

namespace tk::cuda {

constexpr int kSlots = 64;  // of a block
constexpr int kMostSplits = 16;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNothing = -INFINITY;  // the score of what takes no part

// The difference first: it is exact where it matters.
__device__ inline float exponential(float score, float shift) {
  return exp2f((score - shift) * kLog2e);
}

// What scores are lowered by.
__device__ inline float shift_of(float highest) { return highest == kNothing ? 0.0f : highest; }

// What sums are multiplied with: 0 for a slot that no token reaches, else the total is at least 1.
__device__ inline float inverse(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// 0 for such a slot, whatever its tokens hold.
__device__ inline float scaled(float sum, float inverse) {
  return inverse == 0.0f ? 0.0f : sum * inverse;
}

__device__ inline float logarithm(float highest, float total) {
  return total == 0.0f ? kNothing : highest + logf(total);
}

// The tokens of one image, from one on, that take part.
struct Shown {
  const bool* mask;  // or null
  int64_t stride, count;
  __device__ void set(const PerToken<bool>& of, int64_t image, int64_t first, int64_t left) {
    mask =
        of.data == nullptr ? nullptr : of.data + image * of.batch_stride + first * of.token_stride;
    stride = of.token_stride;
    count = left;
  }
  __device__ bool operator()(int token) const {
    return token < count && (mask == nullptr || mask[token * stride]);
  }
};

// Rows of a matrix of one image, from one row and column on.
template <class T>
struct Rows {
  const T* at;
  int64_t stride;
  int columns, wide;
  __device__ void set(const Matrices& from, int64_t image, int64_t row, int64_t width,
                      int64_t column) {
    at = static_cast<const T*>(from.data) + image * from.batch_stride + row * from.row_stride +
         column;
    stride = from.row_stride;
    const int64_t left = width - column;
    columns = static_cast<int>(left < 0 ? 0 : left < 1 << 30 ? left : 1 << 30);
    wide = fetches_wide<T>(at, from.row_stride, width);
  }
};

// Asks for rows row … from `column` on as a tile of tile_rows × tile_columns: zeros where
// shown(row) is false and beyond the last column.
template <class T, int tile_rows, int tile_columns, class Here>
__device__ void fetch_some(T* tile, const Rows<T> from, int row, int column, const Here shown) {
  constexpr int stride = tile_stride<T>(tile_columns);
  constexpr int each = 16 / sizeof(T), across = tile_columns / each;
  static_assert(kThreads % across == 0);
  if (from.wide) {
    const int c = thread() % across * each;
    const bool inside = column + c < from.columns;
    const T* source = from.at + (row + thread() / across) * from.stride + column + c;
    T* to = tile + thread() / across * stride + c;
#pragma unroll 1
    for (int r = thread() / across; r < tile_rows; r += kThreads / across) {
      const bool take = inside && shown(row + r);
      copy_async<16>(to, take ? source : from.at, take);
      source += kThreads / across * from.stride;
      to += kThreads / across * stride;
    }
    return;
  }
#pragma unroll 1
  for (int at = thread(); at < tile_rows * tile_columns; at += kThreads) {
    const int r = at / tile_columns, c = at % tile_columns;
    const bool take = column + c < from.columns && shown(row + r);
    const T* source = take ? from.at + (row + r) * from.stride + column + c : from.at;
    if constexpr (sizeof(T) == 4)
      copy_async<4>(tile + r * stride + c, source, take);
    else
      tile[r * stride + c] = take ? *source : T{};
  }
}

// body(first, second, row, column) for each pair of neighbouring sums of a warp's tile.
template <int I, int J, class Body>
__device__ void for_pairs(float (&sums)[I][J][4], const Body& body) {
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int j = 0; j < J; ++j)
        body(sums[i][j][2 * v], sums[i][j][2 * v + 1], 16 * i + lane() / 4 + v * 8,
             8 * j + lane() % 4 * 2);
}

// Two numbers of a row with `left` places from here on; rows of an even length hold pairs aligned.
template <class T>
__device__ void store_pair(T* to, float first, float second, int left, bool even) {
  if (even) {
    if (left > 0) store(to, Vector<T, 2>{{narrow<T>(first), narrow<T>(second)}});
    return;
  }
  if (left > 0) to[0] = narrow<T>(first);
  if (left > 1) to[1] = narrow<T>(second);
}

// Sums of each split of the tokens, and the softmax they stand in.
struct Partial {
  float *sums, *highest, *total;  // (B, splits, M, C), (B, splits, M) twice
  int splits;
  int64_t span;  // tokens of a split
};

inline int64_t partial_bytes(int64_t rows, int64_t channels) {
  return rows * (channels + 2) * int64_t{sizeof(float)};
}

inline Partial partial_in(void* scratch, int64_t rows, int64_t channels, int splits, int64_t span) {
  auto* sums = static_cast<float*>(scratch);
  return {sums, sums + rows * channels, sums + rows * (channels + 1), splits, span};
}

struct JoinJob {
  Partial partial;
  int64_t B, M, N, C;
  void* out;
  float* lse;
  float* weights;  // (B, N, M), scores that are to become weights, or null
};

constexpr int kJoinedTokens = 32;  // whose weights one thread makes

// The softmax of a slot over all splits.
struct Joined {
  const float *some_highest, *some_total;
  int64_t slots;
  float highest = kNothing, shift = 0.0f, total = 0.0f;

  __device__ Joined(const JoinJob& job, int64_t image, int64_t slot)
      : some_highest(job.partial.highest + image * job.partial.splits * job.M + slot),
        some_total(job.partial.total + image * job.partial.splits * job.M + slot),
        slots(job.M) {
    for (int s = 0; s < job.partial.splits; ++s) highest = fmaxf(highest, some_highest[s * slots]);
    shift = shift_of(highest);
    for (int s = 0; s < job.partial.splits; ++s) total += factor(s) * some_total[s * slots];
  }
  __device__ float factor(int split) const {
    return exponential(some_highest[split * slots], shift);
  }
};

template <class T>
__device__ void join_four(const JoinJob& job, int64_t number) {
  const int64_t across = job.C > 4 ? (job.C + 3) / 4 : 1, row = number / across;
  const int64_t column = number % across * 4, image = row / job.M, slot = row % job.M;
  const Joined joined(job, image, slot);
  float sums[4] = {};
  for (int s = 0; s < job.partial.splits; ++s) {
    const float factor = joined.factor(s);
    const float* from =
        job.partial.sums + ((image * job.partial.splits + s) * job.M + slot) * job.C + column;
    if (job.C % 4 == 0 && job.C > 0) {
      const auto some = load<Vector<float, 4>, kStream>(from);
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[v] += factor * some.at[v];
    } else {
#pragma unroll
      for (int v = 0; v < 4; ++v)
        if (column + v < job.C) sums[v] += factor * from[v];
    }
  }
  auto* to = static_cast<T*>(job.out) + row * job.C + column;
#pragma unroll
  for (int v = 0; v < 4; ++v)
    if (column + v < job.C) to[v] = narrow<T>(scaled(sums[v], inverse(joined.total)));
  if (column == 0) job.lse[row] = logarithm(joined.highest, joined.total);
}

__device__ inline void normalise(const JoinJob& job, int64_t number) {
  const int64_t down = (job.N + kJoinedTokens - 1) / kJoinedTokens, slot = number % job.M;
  const int64_t image = number / job.M / down, first = number / job.M % down * kJoinedTokens;
  const Joined joined(job, image, slot);
  for (int64_t n = first; n < first + kJoinedTokens && n < job.N; ++n) {
    float* weight = job.weights + (image * job.N + n) * job.M + slot;
    *weight = scaled(exponential(*weight, joined.shift), inverse(joined.total));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    aggregate_join_kernel(const __grid_constant__ JoinJob job, int64_t normalising, int64_t all) {
  for_each(all, [&](int64_t i) {
    if (i < normalising)
      normalise(job, i);
    else
      join_four<T>(job, i - normalising);
  });
}

template <class T>
const char* launch_join(const JoinJob& job, void* stream) {
  const int64_t down = (job.N + kJoinedTokens - 1) / kJoinedTokens;
  const int64_t normalising = job.weights == nullptr ? 0 : job.B * down * job.M;
  const int64_t all = normalising + job.B * job.M * (job.C > 4 ? (job.C + 3) / 4 : 1);
  return launch<aggregate_join_kernel<T>>(
      {.blocks = blocks_for(all, kThreads), .threads = kThreads, .stream = stream}, job,
      normalising, all);
}

}  // namespace tk::cuda
