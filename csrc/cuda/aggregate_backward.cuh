// The gradients of the soft aggregations on a GPU: weights and slopes of 64 tokens × 64 slots, made
// again from the logarithms of the totals, and what is multiplied with them. No atomics.
//
// The slope of a score is weight · (⟨value, gradient⟩ − ⟨out, gradient⟩). Halves hold weights times
// 2¹⁴, and slopes divided by a power of two of each 64 × 64, to keep within their range.
#pragma once

#include "cuda/aggregate.cuh"

namespace tk::cuda {

constexpr int kTokens = 64;   // of a block
constexpr int kSpread = 128;  // columns that are summed at a time
template <class T>
constexpr int kWidth = sizeof(T) == 4 ? 32 : 64;  // columns of a tile of factors
template <class T>
constexpr int kTerms = 16;  // at a time: more take more registers
template <class T>
constexpr int kStep = sizeof(T) == 4 ? 8 : 32;
template <class T>
constexpr int kDown = sizeof(T) == 4 ? 32 : 64;  // rows of a tile of what is spread
template <class T>
constexpr int kStage = (kTokens + kSlots) * tile_stride<T>(kWidth<T>);
static_assert(kDown<float> * tile_stride<float>(kSpread) <= kStage<float>);
static_assert(kDown<Half> * tile_stride<Half>(kSpread) <= kStage<Half>);
template <class T>
constexpr float kWeightUnit = std::is_same_v<T, Half> ? 0x1p-14f : 1.0f;

// What both gradients read and write; null outputs are not wanted. `keys` are the logits where
// there is no query.
struct Gradients {
  DType dtype;
  int64_t B, M, N, E, C;
  Matrices query, keys, value, gradient, tokens;
  PerToken<float> bias;
  PerToken<bool> mask;
  float scale;
  const float *scale_tensor, *lse, *weights;
  void *keys_grad, *value_grad;
  float *bias_grad, *scale_grads;  // (B, N); one number of each block of tokens
  __device__ float factor() const { return scale_tensor == nullptr ? scale : *scale_tensor; }
  __host__ __device__ bool sloping() const {
    return keys_grad != nullptr || bias_grad != nullptr || scale_grads != nullptr;
  }
};

// The tokens and slots that a block has at hand. It lies in shared memory, as registers are few.
template <class T, bool soft>
struct Pair {
  int64_t image, token, slot;  // the first ones
  int tokens, slots;
  Shown shown;
  Rows<T> keys, values, queries, gradients, outs, spread;
  const float *bias, *lse, *weights;
  T* keys_grad;  // of logits

  __device__ void set_tokens(const Gradients& p, int64_t of_image, int64_t first, int64_t end) {
    image = of_image;
    token = first;
    tokens = static_cast<int>(end - first < kTokens ? end - first : kTokens);
    shown.set(p.mask, image, token, tokens);
    keys.set(p.keys, image, token, soft ? p.E : p.M, 0);
    values.set(p.value, image, token, p.C, 0);
    bias = p.bias.data == nullptr
               ? nullptr
               : p.bias.data + image * p.bias.batch_stride + token * p.bias.token_stride;
  }
  __device__ void set_slots(const Gradients& p, int64_t first) {
    slot = first;
    slots = static_cast<int>(p.M - slot < kSlots ? p.M - slot : kSlots);
    if constexpr (soft) queries.set(p.query, image, slot, p.E, 0);
    gradients.set(p.gradient, image, slot, p.C, 0);
    outs.set(p.tokens, image, slot, p.C, 0);
    lse = p.lse + image * p.M + slot;
    const int64_t at = (image * p.N + token) * p.M + slot;
    weights = p.weights == nullptr ? nullptr : p.weights + at;
    keys_grad = p.keys_grad == nullptr ? nullptr : static_cast<T*>(p.keys_grad) + at;
  }
};

template <class T, bool soft>
struct PairRoom {
  Pair<T, soft>* pair;
  T* stages;     // two of kStage
  float* means;  // (slots): ⟨out, gradient⟩
  float* by_warp;
  float *bias_sums, *scale_sums;  // (2, tokens)

  __device__ explicit PairRoom(Arena& arena) {
    pair = arena.shared<Pair<T, soft>>(1);
    stages = arena.shared<T>(2 * kStage<T>);
    means = arena.shared<float>(kSlots);
    by_warp = arena.shared<float>(kThreads / kWarp);
    bias_sums = arena.shared<float>(2 * kTokens);
    scale_sums = arena.shared<float>(2 * kTokens);
  }
  static int64_t bytes() {
    return shared_bytes<Pair<T, soft>>(1) + shared_bytes<T>(2 * kStage<T>) +
           shared_bytes<float>(kSlots) + shared_bytes<float>(kThreads / kWarp) +
           2 * shared_bytes<float>(2 * kTokens);
  }
};

// A lane's part of 64 tokens × 64 slots: a warp has 16 × 32 of them.
using Square = float[1][4][4];

__device__ inline int square_row() { return warp() % 4 * 16; }
__device__ inline int square_column() { return warp() / 4 * 32; }

// sums += left · rightᵀ of rows that stream past: tokens and slots.
template <class T, bool soft>
__device__ void multiply_rows(Square& sums, const PairRoom<T, soft>& room, const Rows<T>& left,
                              const Rows<T>& right) {
  constexpr int stride = tile_stride<T>(kWidth<T>);
#pragma unroll 1
  for (int column = -kWidth<T>; column < left.columns; column += kWidth<T>) {
    wait_copies<0>();
    sync();
    const int next = column + kWidth<T>;
    if (next < left.columns) {
      T* to = room.stages + next / kWidth<T> % 2 * kStage<T>;
      const int slots = room.pair->slots;
      fetch_some<T, kTokens, kWidth<T>>(to, left, 0, next, room.pair->shown);
      fetch_some<T, kSlots, kWidth<T>>(to + kTokens * stride, right, 0, next,
                                       [=](int slot) { return slot < slots; });
    }
    commit_copies();
    if (column < 0) continue;
    const T* from = room.stages + column / kWidth<T> % 2 * kStage<T>;
#pragma unroll 1
    for (int term = 0; term < kWidth<T>; term += kTerms<T>)
      add_product<T>(sums, from + square_row() * stride + term, stride,
                     from + (kTokens + square_column()) * stride + term, stride, kTerms<T>);
  }
}

// ⟨out, gradient⟩ of eight slots for each warp.
template <class T, bool wide, bool soft>
__device__ void add_means(const PairRoom<T, soft>& room) {
  constexpr int each = 16 / sizeof(T), per_warp = kSlots / (kThreads / kWarp);
  const Pair<T, soft>& pair = *room.pair;
#pragma unroll 2
  for (int i = 0; i < per_warp; ++i) {
    const int slot = warp() * per_warp + i;
    float sum = 0.0f;
    if (slot < pair.slots) {
      const T *one = pair.gradients.at + slot * pair.gradients.stride,
              *two = pair.outs.at + slot * pair.outs.stride;
#pragma unroll 2
      for (int c = lane() * each; c < pair.outs.columns; c += kWarp * each) {
        Vector<T, each> a = {}, b = {};
        if constexpr (wide) {
          a = load<Vector<T, each>, kReadOnly>(one + c);
          b = load<Vector<T, each>, kReadOnly>(two + c);
        } else {
          for (int v = 0; v < each && c + v < pair.outs.columns; ++v) {
            a.at[v] = one[c + v];
            b.at[v] = two[c + v];
          }
        }
#pragma unroll
        for (int v = 0; v < each; ++v) sum += widen(a.at[v]) * widen(b.at[v]);
      }
    }
    sum = warp_sum(sum);
    if (lane() == 0) room.means[slot] = sum;
  }
}

// A power of two that brings what is no larger than `most` below 2¹⁴.
__device__ inline float unit_of(float most) {
  uint32_t bits;
  memcpy(&bits, &most, sizeof bits);
  const uint32_t exponent = bits >> 23 & 255;
  return float_of_word(((exponent < 27 ? 27 : exponent) - 13) << 23);
}

// body(number, next number, row, column) for each pair of a square.
template <class Body>
__device__ void for_square(Square& sums, const Body& body) {
  for_pairs(sums, [&](float& one, float& two, int row, int column) {
    body(one, two, square_row() + row, square_column() + column);
  });
}

// Weights of the square; this lane's scores before the scale to `raw_to`, if that is not null.
template <class T, bool soft>
__device__ void make_weights(Square& weights, const PairRoom<T, soft>& room, const Gradients& p,
                             float* raw_to) {
  const bool given = soft && p.weights != nullptr;
  Square raw = {};
  if (soft && (!given || raw_to != nullptr))
    multiply_rows(raw, room, room.pair->keys, room.pair->queries);
  const float factor = p.factor();
  const int first = square_column() + lane() % 4 * 2, slots = room.pair->slots - first;
  const float* lse = room.pair->lse + first;
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const int token = square_row() + lane() / 4 + v / 2 * 8;
    const bool visible = room.pair->shown(token);
    const bool taken = given ? token < room.pair->tokens : visible;
    const float added =
        visible && room.pair->bias != nullptr ? room.pair->bias[token * p.bias.token_stride] : 0.0f;
    const T* logits =
        soft ? nullptr
             : room.pair->keys.at + token * room.pair->keys.stride + room.pair->slot + first;
    const float* known = given ? room.pair->weights + token * p.M + first : nullptr;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int slot = 8 * j + v % 2;
      float weight = 0.0f;
      if (taken && slot < slots) {
        if constexpr (!soft) raw[0][j][v] = widen(logits[slot]);
        weight =
            given ? known[slot] : exponential(raw[0][j][v] * factor + added, shift_of(lse[slot]));
      }
      weights[0][j][v] = weight;
      if (raw_to != nullptr) raw_to[(4 * j + v) * kThreads + thread()] = raw[0][j][v];
    }
  }
}

// What slopes sum up to by token, onto what slots before did; `raw` are this lane's scores before
// the scale, where the scale has a gradient.
template <class T, bool soft>
__device__ void add_by_token(Square& slopes, const float* raw, const PairRoom<T, soft>& room) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    float sum = 0.0f, product = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float slope = slopes[0][j][2 * v + c];
        sum += slope;
        if (raw != nullptr) product += slope * raw[(4 * j + 2 * v + c) * kThreads + thread()];
      }
    for (int step = 1; step < 4; step *= 2) {
      sum += shuffle_xor(sum, step);
      product += shuffle_xor(product, step);
    }
    if (lane() % 4 != 0) continue;
    const int at = warp() / 4 * kTokens + square_row() + lane() / 4 + 8 * v;
    room.bias_sums[at] += sum;
    room.scale_sums[at] += product;
  }
}

template <class T>
__device__ void put_square(T* to, int stride, Square& sums, float factor) {
  for_square(sums, [&](float one, float two, int row, int column) {
    store(to + row * stride + column,
          Vector<T, 2>{{narrow<T>(one * factor), narrow<T>(two * factor)}});
  });
}

// What is wanted of a square.
struct Wanted {
  bool weights, slopes, sums;  // sums: by token, and gradients of logits
};

// Weights and slopes of the tokens and slots at hand, to tiles of `stride`; gives the unit of the
// slopes. The block waits before it goes on to what it wrote. `aside` is room for 64 × 64 numbers
// where the scale has a gradient.
template <class T, bool soft>
__device__ float make_square(const PairRoom<T, soft>& room, const Gradients& p, T* weights_to,
                             T* slopes_to, int stride, const Wanted wanted, float* aside) {
  Square weights;
  float* raw = soft && wanted.sums && p.scale_grads != nullptr ? aside : nullptr;
  make_weights(weights, room, p, raw);
  if (wanted.weights) put_square<T>(weights_to, stride, weights, 1 / kWeightUnit<T>);
  float unit = 1.0f;
  if (wanted.slopes) {
    if (room.pair->outs.wide && room.pair->gradients.wide)
      add_means<T, true>(room);
    else
      add_means<T, false>(room);
    Square slopes = {};
    multiply_rows(slopes, room, room.pair->values, room.pair->gradients);
    sync();
    float most = 0.0f;
    const int first = square_column() + lane() % 4 * 2, slots = room.pair->slots - first;
    const float* means = room.means + first;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const bool visible = room.pair->shown(square_row() + lane() / 4 + v / 2 * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int slot = 8 * j + v % 2;
        float& slope = slopes[0][j][v];
        slope = visible && slot < slots ? weights[0][j][v] * (slope - means[slot]) : 0.0f;
        most = fmaxf(most, fabsf(slope));
      }
    }
    if (soft && wanted.sums) add_by_token(slopes, raw, room);
    if (!soft && wanted.sums) {
      for_square(slopes, [&](float one, float two, int token, int slot) {
        if (token < room.pair->tokens)
          store_pair(room.pair->keys_grad + token * p.M + slot, one, two, room.pair->slots - slot,
                     p.M % 2 == 0);
      });
    }
    if constexpr (std::is_same_v<T, Half>) {
      most = warp_max(most);
      if (lane() == 0) room.by_warp[warp()] = most;
      sync();
      for (int w = 0; w < kThreads / kWarp; ++w) most = fmaxf(most, room.by_warp[w]);
      unit = unit_of(most);
    }
    if (slopes_to != nullptr) put_square<T>(slopes_to, stride, slopes, 1 / unit);
  }
  sync();
  return unit;
}

// A lane's part of 64 rows × kSpread columns: a warp has 32 × 32 of them.
using Sheet = float[2][4][4];

__device__ inline int sheet_row() { return warp() % 2 * 32; }
__device__ inline int sheet_column() { return warp() / 2 * 32; }

// body(sum, number) for each of this lane's 32.
template <class Body>
__device__ void for_lane(Sheet& sums, const Body& body) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) body(sums[i][j][v], (i * 4 + j) * 4 + v);
}

// Σ left · row of `depth` rows (room.pair->spread, those that `here`), for the blocks of columns
// first … end − 1, each 64 terms times their unit; write(sums, block) after each. Where only some
// of the terms are at hand, sums are put aside in `parked`: `fresh` the first ones, `last` the
// last.
template <class T, Lies lies, bool soft, class Here, class Write>
__device__ void spread_rows(const PairRoom<T, soft>& room, const T* left, int stride,
                            const float* units, int depth, const Here& here, int first, int end,
                            float* parked, bool fresh, bool last, const Write& write) {
  constexpr int tile_rows = kDown<T>, right_stride = tile_stride<T>(kSpread);
  const int tiles = (depth + tile_rows - 1) / tile_rows, all = (end - first) * tiles;
  Sheet sums;
#pragma unroll 1
  for (int at = -1; at < all; ++at) {
    wait_copies<0>();
    sync();
    if (at + 1 < all)
      fetch_some<T, tile_rows, kSpread>(room.stages + (at + 1) % 2 * kStage<T>, room.pair->spread,
                                        (at + 1) % tiles * tile_rows,
                                        (first + (at + 1) / tiles) * kSpread, here);
    commit_copies();
    if (at < 0) continue;
    const int tile = at % tiles, term = tile * tile_rows;
    if (tile == 0) {
      for_lane(sums,
               [&](float& sum, int i) { sum = fresh ? 0.0f : parked[i * kThreads + thread()]; });
    }
    const T* rows =
        lies == kAlong ? left + sheet_row() * stride + term : left + term * stride + sheet_row();
    const T* right = room.stages + at % 2 * kStage<T> + sheet_column();
    if (sheet_column() + (first + at / tiles) * kSpread < room.pair->spread.columns) {
      if constexpr (std::is_same_v<T, Half>) {
        Sheet some = {};
        add_product<T, lies, kAcross>(some, rows, stride, right, right_stride, tile_rows);
        const float unit = units == nullptr ? kWeightUnit<T> : units[term / 64];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int v = 0; v < 4; ++v) sums[i][j][v] += some[i][j][v] * unit;
      } else {
#pragma unroll 1
        for (int k = 0; k < tile_rows; k += kStep<T>)
          add_product<T, lies, kAcross>(sums, rows + k * (lies == kAlong ? 1 : stride), stride,
                                        right + k * right_stride, right_stride, kStep<T>);
      }
    }
    if (tile < tiles - 1) continue;
    if (last)
      write(sums, first + at / tiles);
    else
      for_lane(sums, [&](float& sum, int i) { parked[i * kThreads + thread()] = sum; });
  }
}

__host__ __device__ inline int64_t whole_blocks(int64_t count, int64_t each) {
  return (count + each - 1) / each;
}

}  // namespace tk::cuda
