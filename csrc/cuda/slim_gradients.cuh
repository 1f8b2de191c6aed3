// slim_tokens_backward up to the gradient of the projection: the softmax and the hidden tokens of a
// tile again, the gradient of its logits, and what layer norm needs of it.
//
// Beside G = Σ dU·x̂ᵀ (dU the gradient of the projection U = w1·(γx̂ + β) + b1), layer norm takes
// three numbers per token only: w1's gradient = γG + Σ dU·βᵀ, γ's = Σ_h w1·G, β's = w1ᵀ·Σ dU,
// Σ_c t = dU·(w1·γ), Σ_c t·x̂ = dU·(U − b1 − w1·β) for t = γ·(w1ᵀ·dU). So the gradient of x is one
// product of matrices with these numbers at its end.
#pragma once

#include "cuda/slim_hidden.cuh"

namespace tk::cuda {

struct SlimBackward {
  Slim slim;
  Operand grad, out;  // (B, M, C)
  int64_t grad_batch, out_batch;
  const float* lse;        // (B, M)
  const float* projected;  // (B, N, H)
  float* made;             // the same memory where it is computed again, or null
  int64_t rows, width;     // B·N; slots of a row of scratch
  int64_t all_tiles;
  // Scratch in the type that is computed with, one row per token.
  void *weights, *logits, *hidden, *changes;  // softmax and the gradient of the logits (width), the
                                              // hidden tokens and the gradient of the projection
  float* statistics;     // (4, B·N): mean, 1 / deviation, and the means over t and t·x̂
  float* folded;         // (2, H): w1·γ, w1·β + b1
  float* sums;           // (4, tiles, M): of weights w, changes c, w·raw logits, c·raw logits
  float* scale_sums;     // (tiles)
  int64_t span, splits;  // tokens of a split of the sums over the batch
  float *products, *totals, *w2_sums;  // (splits, H, C), (splits, H), (splits, M, H)
  void *grad_x, *grad_norm_weight, *grad_norm_bias, *grad_w1, *grad_b1, *grad_w2;
  float* grad_scale;
};

// One slot of a tile: its weights in place of the raw logits, the gradient of the scaled logits, to
// within a multiple of the weights, in place of ⟨x, grad⟩.
template <int I>
__device__ void weigh_slot(const SlimBackward& job, float (&raw)[I][2], float (&shares)[I][2],
                           int rows, float factor, float lse, float mean, float* sums, bool there) {
  float parts[4][I][2];
#pragma unroll
  for (int i = 0; i < 2 * I; ++i) {
    const bool inside = there && lane() / 4 + 8 * i < rows;
    float &score = raw[i / 2][i % 2], &share = shares[i / 2][i % 2];
    // Rounded as the logit was that `lse` is made of.
    const float below_lse = rounded_product(score, factor) - lse;
    const float weight = inside ? exp2f(below_lse * kLog2E) : 0.0f;
    const float change = inside && job.slim.tokens > 1 ? weight * (share - mean) : 0.0f;
    parts[0][i / 2][i % 2] = weight;
    parts[1][i / 2][i % 2] = change;
    parts[2][i / 2][i % 2] = inside ? weight * score : 0.0f;
    parts[3][i / 2][i % 2] = inside ? change * score : 0.0f;
    score = weight;
    share = change * factor;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float sum = over_tokens<I>(parts[k], [](float a, float b) { return a + b; });
    if (lane() < 4 && there) sums[k * job.all_tiles * job.slim.slots] = sum;
  }
}

// ⟨x, grad⟩ of a tile for a strip of 8 slots per warp from slot `first`, and ⟨out, grad⟩, about its
// mean over all tokens, of the block's slots into shared memory.
template <class T, int I>
__device__ void add_shares(float (&sums)[I][1][4], const SlimBackward& job, const Tile<T>& tile,
                           const HiddenMemory<T>& memory, int64_t first, float* means) {
  constexpr int stride = kChunkStride<T>, each = kChunk<T> * kSlotBlock / kSlimThreads;
  constexpr int lanes = kChunk<T> / each;
  static_assert((2 * kSlotBlock + kTileTokens) <= kHiddenGroup);
  const Slim& p = job.slim;
  const int64_t slots = p.slots - first;
  const auto chunks = static_cast<int>(parts_of(p.channels, kChunk<T>));
  const auto fetch_chunk = [&](int i, int stage) {
    const int64_t c = int64_t{i} * kChunk<T>, left = p.channels - c;
    T* to = memory.stage(stage);
    fetch<T, kSlotBlock, kChunk<T>>(
        to, job.grad, tile.image * job.grad_batch + first * job.grad.stride + c, slots, left);
    to += kSlotBlock * stride;
    fetch<T, kSlotBlock, kChunk<T>>(
        to, job.out, tile.image * job.out_batch + first * job.out.stride + c, slots, left);
    fetch<T, kTileTokens, kChunk<T>>(to + kSlotBlock * stride, p.x, tile.at + c, tile.rows, left);
  };
  float mean = 0;
  begin_chunks(chunks, fetch_chunk);
  for_chunks(chunks, fetch_chunk, [&](int, int stage) {
    const T* grad = memory.stage(stage);
    const int at = thread() / lanes * stride + thread() % lanes * each;
#pragma unroll
    for (int v = 0; v < each; ++v)
      mean += widen(grad[at + v]) * widen(grad[kSlotBlock * stride + at + v]);
    if (first + warp() * 8 < p.slots)
      add_product<T>(sums, grad + 2 * kSlotBlock * stride, stride, grad + warp() * 8 * stride,
                     stride, kChunk<T>);
  });
  mean = sum_of_lanes<lanes>(mean);
  if (thread() % lanes == 0) means[thread() / lanes] = mean;
  sync();
}

// The hidden tokens of a tile, from what the forward call kept or from x.
template <class T>
__device__ void make_hidden(const SlimBackward& job, const Tile<T>& tile, const Statistics& s,
                            const HiddenMemory<T>& memory, int64_t first, int64_t count) {
  const Slim& p = job.slim;
  const int64_t row = tile.image * p.tokens + tile.first;
  T* hidden = static_cast<T*>(job.hidden) + row * p.hidden + first;
  if (job.made != nullptr) {
    float* made = job.made + row * p.hidden + first;
    for (int64_t begin = 0; begin < count; begin += p.group) {
      const auto here = static_cast<int>(count - begin < p.group ? count - begin : p.group);
      project(p, tile, s, memory, first + begin, here,
              [&](int r, int channel, float value, bool there) {
                const float made_hidden = there ? gelu(value) : 0.0f;
                put(memory.hidden + r * memory.stride + begin + channel, memory.part, made_hidden);
                if (!there || r >= tile.rows) return;
                made[r * p.hidden + begin + channel] = value;
                hidden[r * p.hidden + begin + channel] = narrow<T>(made_hidden);
              });
    }
    return;
  }
  const float* projected = job.projected + row * p.hidden + first;
  const auto whole = static_cast<int>(parts_of(count, kChunk<T>) * kChunk<T>);
  sync();
  for (int r = warp(); r < kTileTokens; r += kSlimWarps) {
#pragma unroll 4
    for (int c = lane(); c < whole; c += kWarp) {
      float value = 0;
      if (r < tile.rows && c < count) {
        value = gelu(projected[r * p.hidden + c]);
        hidden[r * p.hidden + c] = narrow<T>(value);
      }
      put(memory.hidden + r * memory.stride + c, memory.part, value);
    }
  }
}

// Weights, the gradient of the logits to within a multiple of them, sums of both, hidden tokens,
// mean and 1 / deviation of a tile.
template <class T>
__device__ void spread_tile(const SlimBackward& job, int64_t number) {
  const Slim& p = job.slim;
  Arena arena;
  const HiddenMemory<T> memory(arena, p);
  auto* means = arena.shared<float>(kSlotBlock);
  const Tile<T> tile(p, number, p.x.stride);
  const Statistics statistics = statistics_of(p, tile);
  const int64_t row = tile.image * p.tokens + tile.first;
  if (Tile<T>::column() == 0 && Tile<T>::row() < tile.rows) {
    job.statistics[row + Tile<T>::row()] = statistics.mean;
    job.statistics[job.rows + row + Tile<T>::row()] = statistics.rstd;
  }
  const auto make = [&](int64_t first, int64_t count) {
    make_hidden(job, tile, statistics, memory, first, count);
  };
  for_logits<T, 1>(p, memory, 0, p.slots, make, [&](auto& raw, int64_t first) {
    constexpr int I = kTileTokens / 16;
    float shares[I][1][4] = {};
    add_shares<T>(shares, job, tile, memory, first, means);
    const int64_t slot = first + warp() * 8 + lane() % 4 * 2;
    const float factor = scale_of(p);
    float pairs[2][2][I][2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int i = 0; i < 2 * I; ++i) {
        pairs[0][v][i / 2][i % 2] = raw[i / 2][0][i % 2 * 2 + v];
        pairs[1][v][i / 2][i % 2] = shares[i / 2][0][i % 2 * 2 + v];
      }
      const bool there = slot + v < p.slots;
      weigh_slot<I>(job, pairs[0][v], pairs[1][v], tile.rows, factor,
                    there ? job.lse[tile.image * p.slots + slot + v] : 0.0f,
                    means[warp() * 8 + lane() % 4 * 2 + v], job.sums + number * p.slots + slot + v,
                    there);
    }
    if (slot >= job.width) return;
    const int64_t at = (row + lane() / 4) * job.width + slot;
#pragma unroll
    for (int i = 0; i < 2 * I; ++i) {
      if (lane() / 4 + 8 * i >= tile.rows) continue;
      const int64_t here = at + 8 * i * job.width;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        T* to = static_cast<T*>(k == 0 ? job.weights : job.logits) + here;
        store(to, Vector<T, 2>{narrow<T>(pairs[k][0][i / 2][i % 2]),
                               narrow<T>(pairs[k][1][i / 2][i % 2])});
      }
    }
  });
}

// w1·γ and w1·β + b1 for the hidden channel of each warp.
template <class T>
__device__ void fold(const SlimBackward& job, int64_t number) {
  const Slim& p = job.slim;
  const int64_t h = number * kSlimWarps + warp();
  if (h >= p.hidden) return;
  float scaled = 0, shifted = 0;
#pragma unroll 4
  for (int64_t c = lane(); c < p.channels; c += kWarp) {
    const float w1 = widen(load_one<T>(p.w1, h * p.w1.stride + c));
    scaled += w1 * widen(load_one<T>(p.norm_weight, c));
    shifted += w1 * widen(load_one<T>(p.norm_bias, c));
  }
  scaled = warp_sum(scaled);
  shifted = warp_sum(shifted);
  if (lane() != 0) return;
  job.folded[h] = scaled;
  job.folded[p.hidden + h] = shifted + widen(load_one<T>(p.b1, h));
}

// Divides the weights of a tile by their sum over all tokens, of which a large `lse` is too coarse
// to make one, and takes from the logits' gradient the multiple of the weights by which its sum is
// not 0; gives what these slots of the tile add to the scale's.
template <class T>
__device__ float settle(const SlimBackward& job, const Tile<T>& tile, int64_t number) {
  const Slim& p = job.slim;
  const int64_t places = job.all_tiles * p.slots;
  const int64_t row = (tile.image * p.tokens + tile.first) * job.width;
  T *logits = static_cast<T*>(job.logits) + row, *weights = static_cast<T*>(job.weights) + row;
  int across = kWarp;  // threads side by side
  while (across < job.width && across < kSlimThreads) across *= 2;
  const int down = kSlimThreads / across, mine = thread() / across;
  const float factor = scale_of(p);
  float total = 0;
  for (int64_t slot = thread() % across; slot < job.width; slot += across) {
    float mass = 0, rest = 0, inverse = 1;
    if (slot < p.slots) {
      const float* source = job.sums + tile.image * p.tiles * p.slots + slot;
#pragma unroll 4
      for (int64_t t = 0; t < p.tiles; ++t) {
        mass += source[t * p.slots];
        rest += source[places + t * p.slots];
      }
      inverse = mass == 0 ? 1.0f : 1.0f / mass;
      rest *= inverse;
      source = job.sums + number * p.slots + slot;
      if (mine == 0) total += (source[3 * places] - rest * source[2 * places]) * inverse;
    }
#pragma unroll 4
    for (int64_t r = mine; r < tile.rows; r += down) {
      T &logit = logits[r * job.width + slot], &weight = weights[r * job.width + slot];
      logit = narrow<T>((widen(logit) - widen(weight) * (rest * factor)) * inverse);
      weight = narrow<T>(widen(weight) * inverse);
    }
  }
  return total;
}

// The derivative of GELU.
__device__ inline float slope(float x) {
  return below(x) + x * 0.3989422804014327f * exp2f(x * x * (-0.5f * kLog2E));
}

// The gradient of the logits of a tile times w2, for a group of hidden channels.
template <class T, int I>
__device__ void add_hidden_gradient(float (&sums)[I][kStrips][4], const SlimBackward& job,
                                    int64_t row, int64_t rows, int64_t first, int64_t count,
                                    T* ring) {
  constexpr int stride = kChunkStride<T>, w2_stride = tile_stride<T>(kHiddenGroup);
  constexpr int stage_size = kTileTokens * stride + kChunk<T> * w2_stride;
  const Slim& p = job.slim;
  const Operand logits{job.logits, job.width, kTypeOf<T>, true};
  const auto chunks = static_cast<int>(parts_of(job.width, kChunk<T>));
  const auto fetch_chunk = [&](int i, int stage) {
    const int64_t slot = int64_t{i} * kChunk<T>;
    T* to = ring + stage * stage_size;
    fetch<T, kTileTokens, kChunk<T>>(to, logits, row * job.width + slot, rows, job.width - slot);
    fetch<T, kChunk<T>, kHiddenGroup>(to + kTileTokens * stride, p.w2, slot * p.w2.stride + first,
                                      p.slots - slot, count);
  };
  const int strip = warp() * 8 * kStrips;
  begin_chunks(chunks, fetch_chunk);
  for_chunks(chunks, fetch_chunk, [&](int, int stage) {
    const T* left = ring + stage * stage_size;
    if (strip < count)
      add_product<T, kAlong, kAcross>(sums, left, stride, left + kTileTokens * stride + strip,
                                      w2_stride, kChunk<T>);
  });
}

template <class T>
constexpr int64_t lower_shared() {
  return shared_bytes<T>(
             kStages * (kTileTokens * kChunkStride<T> + kChunk<T> * tile_stride<T>(kHiddenGroup))) +
         shared_bytes<float>(2 * kSlimWarps * kTileTokens);
}

// The projection's gradient from the logits', of a tile, and the two means that layer norm needs.
template <class T>
__device__ void lower_tile(const SlimBackward& job, int64_t number) {
  constexpr int kTokens = kTileTokens, I = kTokens / 16;
  const Slim& p = job.slim;
  Arena arena;
  T* ring = arena.shared<T>(kStages *
                            (kTokens * kChunkStride<T> + kChunk<T> * tile_stride<T>(kHiddenGroup)));
  auto* partial = arena.shared<float>(2 * kSlimWarps * kTokens);
  const Tile<T> tile(p, number, p.x.stride);
  const int64_t row = tile.image * p.tokens + tile.first;
  const float of_scale = warp_sum(settle(job, tile, number));
  if (lane() == 0) partial[warp()] = of_scale;
  sync();  // what follows also reads logits that other threads wrote
  if (thread() == 0) {
    float sum = 0;
    for (int w = 0; w < kSlimWarps; ++w) sum += partial[w];
    job.scale_sums[number] = sum;
  }
  float mean[2 * I] = {}, along[2 * I] = {};
  for (int64_t first = 0; first < p.hidden; first += kHiddenGroup) {
    const int64_t count = p.hidden - first;
    float sums[I][kStrips][4] = {};
    add_hidden_gradient<T>(sums, job, row, tile.rows, first, count, ring);
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int channel = warp() * 8 * kStrips + 8 * j + lane() % 4 * 2 + v;
        if (channel >= count) continue;
        const int64_t h = first + channel;
        const float scaled = job.folded[h], shifted = job.folded[p.hidden + h];
#pragma unroll
        for (int i = 0; i < 2 * I; ++i) {
          const int r = lane() / 4 + 8 * i;
          if (r >= tile.rows) continue;
          const int64_t at = (row + r) * p.hidden + h;
          const float value = job.projected[at];
          const T change = narrow<T>(sums[i / 2][j][i % 2 * 2 + v] * slope(value));
          static_cast<T*>(job.changes)[at] = change;
          mean[i] += widen(change) * scaled;
          along[i] += widen(change) * (value - shifted);
        }
      }
    }
  }
  sync();
#pragma unroll
  for (int i = 0; i < 2 * I; ++i) {
    const float a = sum_of_lanes<4>(mean[i]), b = sum_of_lanes<4>(along[i]);
    if (lane() % 4 != 0) continue;
    partial[warp() * kTokens + lane() / 4 + 8 * i] = a;
    partial[(kSlimWarps + warp()) * kTokens + lane() / 4 + 8 * i] = b;
  }
  sync();
  if (thread() >= 2 * kTokens || thread() % kTokens >= tile.rows) return;
  const int which = thread() / kTokens;
  float sum = 0;
  for (int w = 0; w < kSlimWarps; ++w)
    sum += partial[(which * kSlimWarps + w) * kTokens + thread() % kTokens];
  job.statistics[(2 + which) * job.rows + row + thread() % kTokens] =
      sum / static_cast<float>(p.channels);
}

}  // namespace tk::cuda
