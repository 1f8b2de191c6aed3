// The hidden tokens of slim_tokens, GELU(LN(x)·w1ᵀ + b1), and their logits, for a tile.
//
// A tile is some tokens of one image. Eight warps share it: each has all its tokens and a strip of
// the columns that are computed, so a column's sums and maxima stay in one warp.
#pragma once

#include "cuda/slim.cuh"

namespace tk::cuda {

template <class T>
struct Tile {
  static constexpr int kTokens = kTileTokens;
  static constexpr int kThreadsEach = kSlimThreads / kTokens;  // threads that share a token
  static constexpr int kEach = kChunk<T> / kThreadsEach;       // channels of a chunk per thread

  int64_t image, first;  // token
  int rows;              // tokens that are there
  int64_t at;            // of its first channel in x

  __device__ Tile(const Slim& p, int64_t number, int64_t row_stride) {
    image = number / p.tiles;
    first = number % p.tiles * kTokens;
    rows = p.tokens - first < kTokens ? static_cast<int>(p.tokens - first) : kTokens;
    at = image * p.x_batch + first * row_stride;
  }

  // The token and the channels of a chunk that this thread normalises.
  static __device__ int row() { return thread() / kThreadsEach; }
  static __device__ int column() { return thread() % kThreadsEach * kEach; }

  __device__ Vector<T, kEach> load_x(const Slim& p, int chunk) const {
    const int64_t c = int64_t{chunk} * kChunk<T> + column();
    return load_values<T, kEach>(p.x, at + row() * p.x.stride + c,
                                 row() < rows ? p.channels - c : 0);
  }
};

struct Statistics {
  float mean, rstd;
};

template <int lanes>
__device__ float sum_of_lanes(float value) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) value += shuffle_xor(value, step);
  return value;
}

// Mean and 1 / deviation of this thread's token, in one pass: sums are of distances from the mean
// of the first channels, so hardly anything cancels where a token is far from 0.
template <class T>
__device__ Statistics statistics_of(const Slim& p, const Tile<T>& tile) {
  constexpr int each = Tile<T>::kEach, lanes = Tile<T>::kThreadsEach;
  const auto chunks = static_cast<int>(parts_of(p.channels, kChunk<T>));
  float sum = 0, square = 0, shift = 0;
  {
    const auto some = tile.load_x(p, 0);
#pragma unroll
    for (int v = 0; v < each; ++v) shift += widen(some.at[v]);
    const int64_t first = p.channels < kChunk<T> ? p.channels : kChunk<T>;
    shift = sum_of_lanes<lanes>(shift) / static_cast<float>(first);
  }
#pragma unroll 4
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const auto some = tile.load_x(p, chunk);
    const int64_t left = p.channels - int64_t{chunk} * kChunk<T> - Tile<T>::column();
#pragma unroll
    for (int v = 0; v < each; ++v) {
      const float value = v < left ? widen(some.at[v]) - shift : 0;
      sum += value;
      square += value * value;
    }
  }
  const auto count = static_cast<float>(p.channels);
  const float offset = sum_of_lanes<lanes>(sum) / count;
  const float variance = sum_of_lanes<lanes>(square) / count - offset * offset;
  return {shift + offset, 1.0f / sqrtf((variance < 0 ? 0 : variance) + p.eps)};
}

// The shared memory in which hidden tokens are made.
template <class T>
struct HiddenMemory {
  static constexpr int kNormal = kTileTokens * kChunkStride<T>;
  static constexpr int kStage = kHiddenGroup * kChunkStride<T>;
  static constexpr int kRaw = (kTileTokens + 2) * kChunkStride<T>;
  static constexpr int64_t kWaiting = int64_t{kTileTokens} * kSlotBlock;

  T* ring;         // kStages × rows of a weight
  T* raw;          // kStages × rows of x, a row of the norm's weight, one of its bias
  T* normal;       // 2 chunks of LN(x), each in its kRounded parts
  T* hidden;       // tokens × held hidden channels, likewise
  float* waiting;  // logits
  int stride;      // of its rows
  int part;        // elements from one part to the next

  __device__ HiddenMemory(Arena& arena, const Slim& p) {
    ring = arena.shared<T>(kStages * kStage);
    raw = arena.shared<T>(kStages * kRaw);
    normal = arena.shared<T>(2 * kRounded<T> * kNormal);
    stride = tile_stride<T>(p.group * p.held);
    part = kTileTokens * stride;
    hidden = arena.shared<T>(kRounded<T> * part);
    const bool whole = int64_t{p.group} * p.held >= p.hidden;
    waiting = whole ? nullptr : arena.shared<float>(kWaiting);
  }

  static int64_t bytes(const Slim& p) {
    const int columns = p.group * p.held;
    return shared_bytes<T>(kStages * kStage) + shared_bytes<T>(kStages * kRaw) +
           shared_bytes<T>(2 * kRounded<T> * kNormal) +
           shared_bytes<T>(int64_t{kRounded<T>} * kTileTokens * tile_stride<T>(columns)) +
           (columns >= p.hidden ? 0 : shared_bytes<float>(kWaiting));
  }

  __device__ T* stage(int i) const { return ring + i * kStage; }
};

// Decides how many groups of hidden channels are in shared memory at a time: all, where a
// multiprocessor still has room for two blocks, or where else they came again for other slots.
// `more` bytes are shared besides.
template <class T>
void hold(Slim& p, int64_t more = 0) {
  constexpr int64_t kTwoBlocks = 113 * 1024;
  const int64_t most = most_shared() - more;
  const int64_t often = most < kTwoBlocks - more ? most : kTwoBlocks - more;
  const auto groups = static_cast<int>(parts_of(p.hidden, p.group));
  p.held = groups;
  const int64_t all = HiddenMemory<T>::bytes(p);
  if (all <= often || (all <= most && p.slots > kSlotBlock)) return;
  do --p.held;
  while (p.held > 1 && HiddenMemory<T>::bytes(p) > often);
}

// What a second part brings back to a float16: of more than its largest, its largest.
__device__ inline float within_half(float value) {
  constexpr float kMost = 65504.0f;
  return value > kMost ? kMost : value < -kMost ? -kMost : value;
}

// Stores a number in its parts, the second `apart` elements behind the first.
template <class T>
__device__ void put(T* to, int apart, float value) {
  if constexpr (kRounded<T> == 2) {
    const bool finite = value - value == 0.0f;
    const T high = narrow<T>(finite ? within_half(value) : value);
    to[0] = high;
    to[apart] = narrow<T>(finite ? within_half(value - widen(high)) : 0.0f);
  } else {
    to[0] = narrow<T>(value);
  }
}

// sums += left · rightᵀ where left has parts. One step at a time, for registers.
template <class T, int I, int J>
__device__ void add_parts(float (&sums)[I][J][4], const T* left, int left_stride, int apart,
                          const T* right, int right_stride, int depth) {
#pragma unroll 1
  for (int term = 0; term < depth; term += kDepth<T>) {
    add_product<T>(sums, left + term, left_stride, right + term, right_stride, kDepth<T>);
    if constexpr (kRounded<T> == 2)
      add_product<T>(sums, left + apart + term, left_stride, right + term, right_stride, kDepth<T>);
  }
}

// LN of this thread's channels of a chunk that lies in shared memory.
template <class T>
__device__ void normalise(const Statistics& s, const T* raw, T* to) {
  constexpr int each = Tile<T>::kEach;
  using Some = Vector<T, each>;
  raw += Tile<T>::column();
  const int at = Tile<T>::row() * kChunkStride<T>;
  const auto x = load<Some>(raw + at);
  const auto gamma = load<Some>(raw + kTileTokens * kChunkStride<T>);
  const auto beta = load<Some>(raw + (kTileTokens + 1) * kChunkStride<T>);
#pragma unroll
  for (int v = 0; v < each; ++v)
    put(to + at + Tile<T>::column() + v, HiddenMemory<T>::kNormal,
        (widen(x.at[v]) - s.mean) * s.rstd * widen(gamma.at[v]) + widen(beta.at[v]));
}

// LN(x)·w1ᵀ + b1 of a tile for `count` hidden channels from `first`: store_value(row, channel,
// value, there) takes it, and 0 for the channels up to a whole chunk that are not there.
template <class T, class Store>
__device__ void project(const Slim& p, const Tile<T>& tile, const Statistics& s,
                        const HiddenMemory<T>& memory, int64_t first, int count,
                        const Store& store_value) {
  constexpr int stride = kChunkStride<T>, buffer = kRounded<T> * HiddenMemory<T>::kNormal;
  const auto chunks = static_cast<int>(parts_of(p.channels, kChunk<T>));
  const auto fetch_raw = [&](int i) {
    T* raw = memory.raw + i % kStages * HiddenMemory<T>::kRaw;
    const int64_t c = int64_t{i} * kChunk<T>, left = p.channels - c;
    fetch<T, kTileTokens, kChunk<T>>(raw, p.x, tile.at + c, tile.rows, left);
    raw += kTileTokens * stride;
    fetch<T, 1, kChunk<T>>(raw, p.norm_weight, c, 1, left);
    fetch<T, 1, kChunk<T>>(raw + stride, p.norm_bias, c, 1, left);
  };
  // LN is one chunk ahead of the product, so x comes with the weight of the chunk before it.
  const auto fetch_chunk = [&](int i, int stage) {
    const int64_t c = int64_t{i} * kChunk<T>;
    fetch<T, kHiddenGroup, kChunk<T>>(memory.stage(stage), p.w1, first * p.w1.stride + c, count,
                                      p.channels - c);
    if (i + 1 < chunks) fetch_raw(i + 1);
  };
  sync();
  fetch_raw(0);
  commit_copies();
  begin_chunks(chunks, fetch_chunk);
  wait_copies<kStages - 1>();
  sync();
  normalise(s, memory.raw, memory.normal);
  const int strip = warp() * 8 * kStrips;
  float sums[kTileTokens / 16][kStrips][4] = {};
  for_chunks(chunks, fetch_chunk, [&](int i, int stage) {
    if (i + 1 < chunks)
      normalise(s, memory.raw + (i + 1) % kStages * HiddenMemory<T>::kRaw,
                memory.normal + (i + 1) % 2 * buffer);
    if (strip < count)
      add_parts<T>(sums, memory.normal + i % 2 * buffer, stride, HiddenMemory<T>::kNormal,
                   memory.stage(stage) + strip * stride, stride, kChunk<T>);
  });
  const int whole = (count + kChunk<T> - 1) / kChunk<T> * kChunk<T>;
  if (strip >= whole) return;
#pragma unroll
  for (int j = 0; j < kStrips; ++j) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int channel = strip + 8 * j + lane() % 4 * 2 + v;
      if (channel >= whole) continue;
      const bool there = channel < count;
      const float bias = widen(load_values<T, 1>(p.b1, first + channel, there).at[0]);
#pragma unroll
      for (int i = 0; i < kTileTokens / 8; ++i)
        store_value(lane() / 4 + 8 * i, channel, sums[i / 2][j][i % 2 * 2 + v] + bias, there);
    }
  }
}

// The raw logits of a tile for a strip of 8·J slots per warp from slot `first`: sums += hidden
// tokens · w2ᵀ over `count` hidden channels from `channel`, those in shared memory.
template <class T, int J, int I>
__device__ void add_logits(float (&sums)[I][J][4], const Slim& p, const HiddenMemory<T>& memory,
                           int64_t first, int64_t channel, int64_t count) {
  constexpr int stride = kChunkStride<T>;
  const auto chunks = static_cast<int>(parts_of(count, kChunk<T>));
  const auto fetch_chunk = [&](int i, int stage) {
    const int64_t c = int64_t{i} * kChunk<T>;
    fetch<T, 8 * J * kSlimWarps, kChunk<T>>(
        memory.stage(stage), p.w2, first * p.w2.stride + channel + c, p.slots - first, count - c);
  };
  begin_chunks(chunks, fetch_chunk);
  for_chunks(chunks, fetch_chunk, [&](int i, int stage) {
    if (first + warp() * 8 * J < p.slots)
      add_parts<T>(sums, memory.hidden + i * kChunk<T>, memory.stride, memory.part,
                   memory.stage(stage) + warp() * 8 * J * stride, stride, kChunk<T>);
  });
}

template <int I, int J, class Move>
__device__ void for_waiting(float (&sums)[I][J][4], float* waiting, const Move& move) {
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v)
        move(sums[i][j][v], waiting[((i * J + j) * 4 + v) * kSlimThreads]);
}

// Runs use(sums, first) for each block of slots [begin, end) with the raw logits of a tile;
// make(first, count) puts that many hidden channels into shared memory. Where not all fit, logits
// wait in shared memory meanwhile.
template <class T, int J, class Make, class Use>
__device__ void for_logits(const Slim& p, const HiddenMemory<T>& memory, int64_t begin, int64_t end,
                           const Make& make, const Use& use) {
  constexpr int I = kTileTokens / 16;
  const int64_t held = int64_t{p.group} * p.held;
  float* waiting = memory.waiting + thread();
  for (int64_t first = begin; first < end; first += 8 * J * kSlimWarps) {
    for (int64_t channel = 0; channel < p.hidden; channel += held) {
      const int64_t left = p.hidden - channel;
      if (first == begin || held < p.hidden) make(channel, left < held ? left : held);
      float sums[I][J][4] = {};
      if (channel > 0) for_waiting(sums, waiting, [](float& sum, float& at) { sum = at; });
      add_logits<T, J>(sums, p, memory, first, channel, left < held ? left : held);
      if (left > held)
        for_waiting(sums, waiting, [](float& sum, float& at) { at = sum; });
      else
        use(sums, first);
    }
  }
}

// Sums or maxima over the tokens of a tile: over rows of sums and the lanes that share a column.
template <int I, class Join>
__device__ float over_tokens(const float (&values)[I][2], const Join& join) {
  float all = values[0][0];
#pragma unroll
  for (int i = 0; i < 2 * I; ++i) {
    if (i > 0) all = join(all, values[i / 2][i % 2]);
  }
#pragma unroll
  for (int step = 4; step < kWarp; step *= 2) all = join(all, shuffle_xor(all, step));
  return all;
}

}  // namespace tk::cuda
