// What the kernels of slim_tokens compute with: matrices in memory of any dtype, and chunks of them
// that stream through shared memory.
//
// Depth comes in chunks of 64 bytes a row, two of them under way while a third is multiplied.
#pragma once

#include "cuda/product.cuh"
#include "cuda/values.cuh"

namespace tk::cuda {

constexpr int kSlimThreads = 256;
constexpr int kSlimWarps = kSlimThreads / kWarp;
constexpr int kStages = 3;

// LN(x) and the hidden tokens are rounded to T. float16 takes two of them: what it rounds away
// would show in a result of its precision.
template <class T>
constexpr int kRounded = 1;
template <>
constexpr int kRounded<Half> = 2;

constexpr int kTileTokens = 32;

template <class T>
constexpr int kChunk = 64 / sizeof(T);
template <class T>
constexpr int kChunkStride = tile_stride<T>(kChunk<T>);

constexpr int kStrips = 3;                              // of 8 columns that a warp computes
constexpr int kHiddenGroup = 8 * kStrips * kSlimWarps;  // hidden channels computed at a time

constexpr int kSlotBlock = 8 * kSlimWarps;  // slots likewise, or twice as many
constexpr int kSlotPad = 16;  // a multiple of so many slots is a row of scratch: read aligned

__host__ __device__ constexpr int64_t parts_of(int64_t count, int64_t each) {
  return (count + each - 1) / each;
}

// A matrix in memory. float32 is also made of narrower numbers on the way.
struct Operand {
  const void* data;
  int64_t stride;  // of rows
  DType dtype;
  bool wide;  // fetched 16 bytes at a time
};

template <class T>
constexpr DType kTypeOf = DType::kFloat32;
template <>
constexpr DType kTypeOf<Half> = DType::kFloat16;
template <>
constexpr DType kTypeOf<BFloat16> = DType::kBFloat16;

// `strides`: those in elements that matter beside the rows' own, or-ed.
inline Operand operand(const void* data, DType dtype, int64_t stride, int64_t columns,
                       int64_t strides = 0) {
  const int64_t place = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  return {data, stride, dtype, ((place | (stride | columns | strides) * size_of(dtype)) & 15) == 0};
}

template <class T>
__device__ T load_one(const Operand& from, int64_t at) {
  if constexpr (sizeof(T) == 4)
    return score_of(from.data, from.dtype, at);
  else
    return load<T>(static_cast<const T*>(from.data) + at);
}

// Asks for a tile of rows × columns as fetch_tile does: row r begins at element row(r); `there` and
// `across` are the rows and columns that are there.
template <class T, int rows, int columns, class Row>
__device__ void fetch_rows_of(T* tile, const Operand& from, int64_t there, int64_t across,
                              const Row& row) {
  constexpr int stride = tile_stride<T>(columns);
  if ((sizeof(T) == 2 || from.dtype == DType::kFloat32) && from.wide) {
    constexpr int each = 16 / sizeof(T);
#pragma unroll 1  // for registers
    for (int i = thread(); i < rows * columns / each; i += kSlimThreads) {
      const int r = i / (columns / each), c = i % (columns / each) * each;
      const bool here = r < there && c < across;
      copy_async<16>(tile + r * stride + c,
                     static_cast<const T*>(from.data) + (here ? row(r) + c : 0), here);
    }
    return;
  }
  if constexpr (sizeof(T) == 4) {
    if (from.wide) {
#pragma unroll 1
      for (int i = thread(); i < rows * columns / 8; i += kSlimThreads) {
        const int r = i / (columns / 8), c = i % (columns / 8) * 8;
        Vector<uint16_t, 8> some = {};
        if (r < there && c < across)
          some = load<Vector<uint16_t, 8>>(static_cast<const uint16_t*>(from.data) + row(r) + c);
#pragma unroll
        for (int v = 0; v < 8; ++v)
          tile[r * stride + c + v] =
              from.dtype == DType::kFloat16 ? widen(Half{some.at[v]}) : widen(BFloat16{some.at[v]});
      }
      return;
    }
  }
#pragma unroll 1
  for (int i = thread(); i < rows * columns; i += kSlimThreads) {
    const int r = i / columns, c = i % columns;
    T value = {};
    if (r < there && c < across) value = load_one<T>(from, row(r) + c);
    tile[r * stride + c] = value;
  }
}

// The same of rows that lie from.stride apart, from element `at` on.
template <class T, int rows, int columns>
__device__ void fetch(T* tile, const Operand& from, int64_t at, int64_t there, int64_t across) {
  fetch_rows_of<T, rows, columns>(tile, from, there, across,
                                  [&](int r) { return at + r * from.stride; });
}

// N values from `at` on, of which `count` are there.
template <class T, int N>
__device__ Vector<T, N> load_values(const Operand& from, int64_t at, int64_t count) {
  Vector<T, N> values = {};
  if (count <= 0) return values;
  if ((sizeof(T) == 2 || from.dtype == DType::kFloat32) && from.wide)
    return load<Vector<T, N>, kReadOnly>(static_cast<const T*>(from.data) + at);
#pragma unroll
  for (int v = 0; v < N; ++v) {
    if (v < count) values.at[v] = load_one<T>(from, at + v);
  }
  return values;
}

// fetch(i, stage) asks for chunk i of a ring of stages, use(i, stage) multiplies it. The first two
// are asked for by begin_chunks, when nobody reads the ring any more.
template <class Fetch>
__device__ void begin_chunks(int count, const Fetch& fetch_chunk) {
  sync();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) fetch_chunk(i, i);
    commit_copies();
  }
}

template <class Fetch, class Use>
__device__ void for_chunks(int count, const Fetch& fetch_chunk, const Use& use) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    wait_copies<kStages - 2>();
    sync();
    const int next = i + kStages - 1;
    if (next < count) fetch_chunk(next, next % kStages);
    commit_copies();
    use(i, i % kStages);
  }
}

// The normal distribution function.
__device__ inline float below(float x) { return 0.5f + 0.5f * erff(x * 0.7071067811865476f); }

__device__ inline float gelu(float x) { return x * below(x); }

constexpr float kLog2E = 1.4426950408889634f;

__device__ inline float maximum(float a, float b) { return b > a ? b : a; }

// What it takes to make hidden tokens. Hidden channels come in groups of `group`, of which `held`
// fit into shared memory beside each other: where that is not all, they come again for each block
// of slots.
struct Slim {
  int64_t batch, tokens, channels, hidden, slots;
  int64_t x_batch;
  Operand x, norm_weight, norm_bias, w1, b1, w2;
  float scale, eps;
  const void* scale_tensor;
  DType scale_dtype;
  int64_t tiles;  // of an image
  int group, held;
};

// Of kernels that compute with T.
template <class T>
Slim slim_of(const SlimTokens& p) {
  Slim s{};
  s.batch = p.batch;
  s.tokens = p.tokens;
  s.channels = p.channels;
  s.hidden = p.hidden;
  s.slots = p.slots;
  s.x_batch = p.x_batch;
  s.x = operand(p.x, p.dtype, p.x_token, p.channels, p.x_batch);
  s.norm_weight = operand(p.norm_weight, p.dtype, 0, p.channels);
  s.norm_bias = operand(p.norm_bias, p.dtype, 0, p.channels);
  s.w1 = operand(p.w1, p.dtype, p.w1_row, p.channels);
  s.b1 = operand(p.b1, p.dtype, 0, p.hidden);
  s.w2 = operand(p.w2, p.dtype, p.w2_row, p.hidden);
  s.scale = p.scale;
  s.eps = p.eps;
  s.scale_tensor = p.scale_tensor;
  s.scale_dtype = p.scale_dtype;
  s.tiles = parts_of(p.tokens, kTileTokens);
  const int64_t groups = parts_of(p.hidden, kHiddenGroup);
  const int64_t even = parts_of(p.hidden, groups);
  s.group = static_cast<int>(parts_of(even, kChunk<T>) * kChunk<T>);
  return s;
}

inline bool holds_all(const Slim& p) { return int64_t{p.group} * p.held >= p.hidden; }

__device__ inline float scale_of(const Slim& p) {
  return p.scale_tensor == nullptr ? p.scale : score_of(p.scale_tensor, p.scale_dtype, 0);
}

}  // namespace tk::cuda
