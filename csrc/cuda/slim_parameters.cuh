// slim_tokens_backward, what remains: the gradient of x, and the sums over the batch that the
// weights' gradients are. Those are made in up to 16 splits of the tokens, which the last launch
// adds.
#pragma once

#include "cuda/slim_gradients.cuh"

namespace tk::cuda {

constexpr int kWarpsDown = 2, kWarpsAcross = 4;  // warps of a block that share its sums
constexpr int kLeft = 64;                        // rows of these sums
template <class T>
constexpr int kRight = 256 / sizeof(T);  // columns
template <class T>
constexpr int kRightStrips = kRight<T> / 8 / kWarpsAcross;
constexpr int kLeftStrips = kLeft / 16 / kWarpsDown;

template <class T>
using BlockSums = float[kLeftStrips][kRightStrips<T>][4];

__device__ inline int warp_row() { return warp() / kWarpsAcross * 16 * kLeftStrips; }
template <class T>
__device__ int warp_column() {
  return warp() % kWarpsAcross * 8 * kRightStrips<T>;
}

// sums += left · right for `depth` terms: left's rows are tokens, right's the terms.
template <class T, class Sums>
__device__ void add_blocks(Sums& sums, const Operand& left, int64_t left_at, int64_t rows,
                           const Operand& right, int64_t right_at, int64_t columns, int64_t depth,
                           int64_t right_depth, T* ring) {
  constexpr int left_size = kLeft * kChunkStride<T>, right_stride = tile_stride<T>(kRight<T>);
  constexpr int stage_size = left_size + kChunk<T> * right_stride;
  const auto chunks = static_cast<int>(parts_of(depth, kChunk<T>));
  const auto fetch_chunk = [&](int i, int stage) {
    const int64_t term = int64_t{i} * kChunk<T>;
    T* to = ring + stage * stage_size;
    fetch<T, kLeft, kChunk<T>>(to, left, left_at + term, rows, depth - term);
    fetch<T, kChunk<T>, kRight<T>>(to + left_size, right, right_at + term * right.stride,
                                   right_depth - term, columns);
  };
  const bool busy = warp_row() < rows && warp_column<T>() < columns;
  begin_chunks(chunks, fetch_chunk);
  for_chunks(chunks, fetch_chunk, [&](int, int stage) {
    const T* to = ring + stage * stage_size;
    if (busy)
      add_product<T, kAlong, kAcross>(sums, to + warp_row() * kChunkStride<T>, kChunkStride<T>,
                                      to + left_size + warp_column<T>(), right_stride, kChunk<T>);
  });
}

template <class T>
constexpr int64_t resist_shared() {
  return shared_bytes<T>(kStages *
                         (kLeft * kChunkStride<T> + kChunk<T> * tile_stride<T>(kRight<T>)));
}

template <class T>
__device__ void store_number(const Operand& like, void* to, int64_t at, float value) {
  if (sizeof(T) == 2 || like.dtype == DType::kFloat32)
    static_cast<T*>(to)[at] = narrow<T>(value);
  else if (like.dtype == DType::kFloat16)
    static_cast<Half*>(to)[at] = narrow<Half>(value);
  else
    static_cast<BFloat16*>(to)[at] = narrow<BFloat16>(value);
}

// The gradient of some tokens of one image and some channels, through layer norm and the sums.
template <class T>
__device__ void resist_block(const SlimBackward& job, int64_t number) {
  const Slim& p = job.slim;
  const int64_t across = parts_of(p.channels, kRight<T>);
  const int64_t down = parts_of(p.tokens, kLeft);
  const int64_t channel = number % across * kRight<T>, token = number / across % down * kLeft;
  const int64_t image = number / (across * down), row = image * p.tokens + token;
  const int64_t rows = p.tokens - token, columns = p.channels - channel;
  Arena arena;
  T* ring =
      arena.shared<T>(kStages * (kLeft * kChunkStride<T> + kChunk<T> * tile_stride<T>(kRight<T>)));
  BlockSums<T> sums = {};
  const Operand changes = {job.changes, p.hidden, kTypeOf<T>,
                           p.hidden * int64_t{sizeof(T)} % 16 == 0};
  const Operand weights = {job.weights, job.width, kTypeOf<T>, true};
  add_blocks<T>(sums, changes, row * p.hidden, rows, p.w1, channel, columns, p.hidden, p.hidden,
                ring);
#pragma unroll
  for (int i = 0; i < 2 * kLeftStrips; ++i) {
    const int r = warp_row() + lane() / 4 + 8 * i;
    if (r >= rows) continue;
    const float* about = job.statistics + row + r;
    const float mean = about[0], rstd = about[job.rows];
    const float offset = about[2 * job.rows], along = about[3 * job.rows];
    const int64_t x = image * p.x_batch + (token + r) * p.x.stride + channel;
#pragma unroll
    for (int j = 0; j < kRightStrips<T>; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int c = warp_column<T>() + 8 * j + lane() % 4 * 2 + v;
        if (c >= columns) continue;
        const float gamma = widen(load_one<T>(p.norm_weight, channel + c));
        const float standard = (widen(load_one<T>(p.x, x + c)) - mean) * rstd;
        float& sum = sums[i / 2][j][i % 2 * 2 + v];
        sum = (sum * gamma - offset - standard * along) * rstd;
      }
    }
  }
  add_blocks<T>(sums, weights, row * job.width, rows, job.grad, image * job.grad_batch + channel,
                columns, job.width, p.slots, ring);
  for_sums(sums, [&](float sum, int r, int c) {
    r += warp_row();
    c += warp_column<T>();
    if (r < rows && c < columns)
      store_number<T>(p.x, job.grad_x, (row + r) * p.channels + channel + c, sum);
  });
}

// The shared memory of `collect`: a ring of both operands, and x̂ of two chunks.
template <class T>
struct CollectMemory {
  static constexpr int kLeftStride = tile_stride<T>(kLeft);
  static constexpr int kRightStride = tile_stride<T>(kRight<T>);
  static constexpr int kLeftSize = kChunk<T> * kLeftStride;
  static constexpr int kRightSize = kChunk<T> * kRightStride;
  T *left, *right, *standard;

  __device__ explicit CollectMemory(Arena& arena) {
    left = arena.shared<T>(kStages * kLeftSize);
    right = arena.shared<T>(kStages * kRightSize);
    standard = arena.shared<T>(2 * kRightSize);
  }
  static int64_t bytes() {
    return shared_bytes<T>(kStages * kLeftSize) + shared_bytes<T>(kStages * kRightSize) +
           shared_bytes<T>(2 * kRightSize);
  }

  __device__ void add(BlockSums<T>& sums, int stage, const T* columns) const {
    add_product<T, kAcross, kAcross>(sums, left + stage * kLeftSize + warp_row(), kLeftStride,
                                     columns + warp_column<T>(), kRightStride, kChunk<T>);
  }
};

template <class T>
__device__ void store_block(BlockSums<T>& sums, float* to, int64_t stride, int64_t rows,
                            int64_t columns) {
  for_sums(sums, [&](float sum, int r, int c) {
    r += warp_row();
    c += warp_column<T>();
    if (r < rows && c < columns) to[r * stride + c] = sum;
  });
}

// Tokens of the batch from row `begin` on: row r of them.
struct Tokens {
  int64_t image, token;

  __device__ Tokens(const Slim& p, int64_t begin)
      : image(begin / p.tokens), token(begin % p.tokens) {}

  __device__ int64_t at(const Slim& p, int r) const {
    int64_t i = image, t = token + r;
    for (; t >= p.tokens; t -= p.tokens) ++i;
    return i * p.x_batch + t * p.x.stride;
  }
};

// Σ dU·x̂ᵀ and Σ dU over the tokens [begin, end), for a block of hidden channels and of channels.
template <class T>
__device__ void collect_tokens(const SlimBackward& job, int64_t part, int64_t split, int64_t begin,
                               int64_t end) {
  using Memory = CollectMemory<T>;
  const Slim& p = job.slim;
  const int64_t across = parts_of(p.channels, kRight<T>);
  const int64_t h = part / across * kLeft, channel = part % across * kRight<T>;
  const int64_t rows = p.hidden - h, columns = p.channels - channel;
  Arena arena;
  const Memory memory(arena);
  const Operand changes = {job.changes, p.hidden, kTypeOf<T>,
                           p.hidden * int64_t{sizeof(T)} % 16 == 0};
  const auto chunks = static_cast<int>(parts_of(end - begin, kChunk<T>));
  const auto fetch_x = [&](int i) {
    const int64_t first = begin + int64_t{i} * kChunk<T>;
    const Tokens tokens(p, first);
    fetch_rows_of<T, kChunk<T>, kRight<T>>(memory.right + i % kStages * Memory::kRightSize, p.x,
                                           end - first, columns,
                                           [&](int r) { return tokens.at(p, r) + channel; });
  };
  const auto fetch_chunk = [&](int i, int stage) {  // x̂ is one chunk ahead of the product
    const int64_t first = begin + int64_t{i} * kChunk<T>;
    fetch<T, kChunk<T>, kLeft>(memory.left + stage * Memory::kLeftSize, changes,
                               first * p.hidden + h, end - first, rows);
    if (i + 1 < chunks) fetch_x(i + 1);
  };
  const auto standardise = [&](int i) {
    const T* raw = memory.right + i % kStages * Memory::kRightSize;
    T* to = memory.standard + i % 2 * Memory::kRightSize;
    for (int at = thread(); at < kChunk<T> * kRight<T>; at += kSlimThreads) {
      const int r = at / kRight<T>, place = r * Memory::kRightStride + at % kRight<T>;
      const int64_t row = begin + int64_t{i} * kChunk<T> + r;
      const bool there = row < end;
      const float mean = there ? job.statistics[row] : 0;
      const float rstd = there ? job.statistics[job.rows + row] : 0;
      to[place] = narrow<T>((widen(raw[place]) - mean) * rstd);
    }
  };
  if (chunks > 0) fetch_x(0);
  commit_copies();
  begin_chunks(chunks, fetch_chunk);
  wait_copies<kStages - 1>();
  sync();
  if (chunks > 0) standardise(0);
  BlockSums<T> sums = {};
  float total = 0;
  const bool busy = warp_row() < rows && warp_column<T>() < columns;
  for_chunks(chunks, fetch_chunk, [&](int i, int stage) {
    if (i + 1 < chunks) standardise(i + 1);
    if (busy) memory.add(sums, stage, memory.standard + i % 2 * Memory::kRightSize);
    if (thread() < kLeft && channel == 0) {
      const T* changes_here = memory.left + stage * Memory::kLeftSize + thread();
#pragma unroll
      for (int r = 0; r < kChunk<T>; ++r) total += widen(changes_here[r * Memory::kLeftStride]);
    }
  });
  if (thread() < kLeft && channel == 0 && thread() < rows)
    job.totals[split * p.hidden + h + thread()] = total;
  if (busy)
    store_block<T>(sums, job.products + (split * p.hidden + h) * p.channels + channel, p.channels,
                   rows, columns);
}

// The gradient of a block of w2 from the tokens [begin, end).
template <class T>
__device__ void collect_hidden(const SlimBackward& job, int64_t part, int64_t split, int64_t begin,
                               int64_t end) {
  using Memory = CollectMemory<T>;
  const Slim& p = job.slim;
  const int64_t across = parts_of(p.hidden, kRight<T>);
  const int64_t slot = part / across * kLeft, h = part % across * kRight<T>;
  const int64_t rows = p.slots - slot, columns = p.hidden - h;
  Arena arena;
  const Memory memory(arena);
  const Operand logits = {job.logits, job.width, kTypeOf<T>, true};
  const Operand hidden = {job.hidden, p.hidden, kTypeOf<T>,
                          p.hidden * int64_t{sizeof(T)} % 16 == 0};
  const auto chunks = static_cast<int>(parts_of(end - begin, kChunk<T>));
  const auto fetch_chunk = [&](int i, int stage) {
    const int64_t first = begin + int64_t{i} * kChunk<T>;
    fetch<T, kChunk<T>, kLeft>(memory.left + stage * Memory::kLeftSize, logits,
                               first * job.width + slot, end - first, job.width - slot);
    fetch<T, kChunk<T>, kRight<T>>(memory.right + stage * Memory::kRightSize, hidden,
                                   first * p.hidden + h, end - first, columns);
  };
  BlockSums<T> sums = {};
  const bool busy = warp_row() < rows && warp_column<T>() < columns;
  begin_chunks(chunks, fetch_chunk);
  for_chunks(chunks, fetch_chunk, [&](int, int stage) {
    if (busy) memory.add(sums, stage, memory.right + stage * Memory::kRightSize);
  });
  if (busy)
    store_block<T>(sums, job.w2_sums + (split * p.slots + slot) * p.hidden + h, p.hidden, rows,
                   columns);
}

// The sum of all splits at a place.
__device__ inline float added(const float* from, int64_t splits, int64_t apart) {
  float sum = 0;
#pragma unroll 8
  for (int64_t s = 0; s < splits; ++s) sum += from[s * apart];
  return sum;
}

constexpr int kFinishChannels = 16, kFinishRows = kSlimThreads / kFinishChannels;

// The gradients of w1 and the norm's weights for a block of channels.
template <class T>
__device__ void finish_norm(const SlimBackward& job, int64_t part, float* partial) {
  const Slim& p = job.slim;
  const int64_t c = part * kFinishChannels + thread() % kFinishChannels;
  const bool inside = c < p.channels;
  const float gamma = inside ? widen(load_one<T>(p.norm_weight, c)) : 0.0f;
  const float beta = inside ? widen(load_one<T>(p.norm_bias, c)) : 0.0f;
  float of_gamma = 0, of_beta = 0;
  for (int64_t h = thread() / kFinishChannels; inside && h < p.hidden; h += kFinishRows) {
    const float total = added(job.totals + h, job.splits, p.hidden);
    const float sum = added(job.products + h * p.channels + c, job.splits, p.hidden * p.channels);
    const float w1 = widen(load_one<T>(p.w1, h * p.w1.stride + c));
    of_gamma += w1 * sum;
    of_beta += w1 * total;
    store_number<T>(p.w1, job.grad_w1, h * p.channels + c, gamma * sum + beta * total);
  }
  partial[thread()] = of_gamma;
  partial[kSlimThreads + thread()] = of_beta;
  sync();
  if (thread() >= kFinishChannels || !inside) return;
  of_gamma = of_beta = 0;
  for (int i = 0; i < kFinishRows; ++i) {
    of_gamma += partial[i * kFinishChannels + thread()];
    of_beta += partial[kSlimThreads + i * kFinishChannels + thread()];
  }
  store_number<T>(p.w1, job.grad_norm_weight, c, of_gamma);
  store_number<T>(p.w1, job.grad_norm_bias, c, of_beta);
}

__device__ inline void finish_scale(const SlimBackward& job, float* partial) {
  float sum = 0;
#pragma unroll 4
  for (int64_t i = thread(); i < job.all_tiles; i += kSlimThreads) sum += job.scale_sums[i];
  sum = warp_sum(sum);
  if (lane() == 0) partial[warp()] = sum;
  sync();
  if (thread() != 0) return;
  sum = 0;
  for (int w = 0; w < kSlimWarps; ++w) sum += partial[w];
  *job.grad_scale = sum;
}

}  // namespace tk::cuda
