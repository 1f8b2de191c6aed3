// What the forward and the backward pass of slim_tokens share: scratch, packed weights, layer norm, the hidden layer of a tile.
#pragma once

#include "cpu/gelu.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

TK_INLINE int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// Deals out arrays from a block of memory aligned to 64 bytes. From a null pointer it only counts what would be `used`.
struct Arena {
  char* base;
  int64_t used = 0;

  TK_INLINE char* bytes(int64_t count) {
    char* part = base == nullptr ? nullptr : base + used;
    used += round_up(count, 64);
    return part;
  }

  TK_INLINE float* floats(int64_t count) {
    return reinterpret_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float))));
  }
};

// Calls body(c, count) for each vector of a row of `cols`.
template <class Body>
TK_INLINE void for_vectors(int64_t cols, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) body(c, kLanes);
  if (c < cols) body(c, static_cast<int>(cols - c));
}

template <class T>
TK_INLINE Floats load_some(const T* from, int count) {
  return count == kLanes ? load(from) : load(from, count);
}

template <class T>
TK_INLINE void store_some(T* to, Floats value, int count) {
  count == kLanes ? store(to, value) : store(to, value, count);
}

static void scale_all(float* values, int64_t count, float scale) {
  for_vectors(count, [&](int64_t i, int lanes) { store_some(values + i, load_some(values + i, lanes) * scale, lanes); });
}

// The weights as float32, as every tile reads them.
struct Weights {
  float *norm_weight, *norm_bias;  // (C)
  float* b1;                       // (H)
  float* w1;                       // packed (C, H)
  float* w2;                       // packed (H, M), times the scale
};

static Weights take_weights(const SlimTokens& p, Arena& arena) {
  return {arena.floats(p.channels), arena.floats(p.channels), arena.floats(p.hidden),
          arena.floats(packed_size(p.channels, p.hidden)), arena.floats(packed_size(p.hidden, p.slots))};
}

template <class T>
void pack_weights(const SlimTokens& p, const Weights& w) {
  widen_rows(static_cast<const T*>(p.norm_weight), 0, 1, p.channels, w.norm_weight, 0);
  widen_rows(static_cast<const T*>(p.norm_bias), 0, 1, p.channels, w.norm_bias, 0);
  widen_rows(static_cast<const T*>(p.b1), 0, 1, p.hidden, w.b1, 0);
  pack(static_cast<const T*>(p.w1), 1, p.w1_row, p.channels, p.hidden, w.w1);
  pack(static_cast<const T*>(p.w2), 1, p.w2_row, p.hidden, p.slots, w.w2);
  scale_all(w.w2, packed_size(p.hidden, p.slots), p.scale);
}

// Of one token's channels. `rest` is what `mean` lost by rounding: far from the origin it is not small.
struct Moments {
  float mean, rest, rstd;

  TK_INLINE Floats standard(Floats value) const { return ((value - mean) - rest) * rstd; }
};

// One row to zero mean and unit variance, times weight, plus bias.
template <class T>
Moments layer_norm(const SlimTokens& p, const Weights& w, const T* from, float* to) {
  const auto channels = static_cast<float>(p.channels);
  Floats total{};
  for_vectors(p.channels, [&](int64_t c, int count) { total += load_some(from + c, count); });
  const float mean = sum(total) / channels;
  Floats rests{}, squares{};
  for_vectors(p.channels, [&](int64_t c, int count) {
    const Floats centred = select(iota() < splat_int(count), load_some(from + c, count) - mean, splat(0.0f));
    rests += centred;
    squares += centred * centred;
  });
  const float rest = sum(rests) / channels;
  const float variance = sum(squares) / channels - rest * rest;
  const Moments moments = {mean, rest, 1.0f / __builtin_sqrtf(variance + p.eps)};
  for_vectors(p.channels, [&](int64_t c, int count) {
    const Floats standard = moments.standard(load_some(from + c, count));
    store_some(to + c, standard * load_some(w.norm_weight + c, count) + load_some(w.norm_bias + c, count), count);
  });
  return moments;
}

template <class T>
TK_INLINE const T* token(const SlimTokens& p, int64_t image, int64_t n) {
  return static_cast<const T*>(p.x) + image * p.x_batch + n * p.x_token;
}

// projected (rows, H) = normal (rows, C) · w1ᵀ + b1
static void project(const SlimTokens& p, const Weights& w, const float* normal, int64_t rows, float* projected) {
  multiply({normal, p.channels, 1}, w.w1, rows, p.hidden, p.channels, projected, p.hidden, false);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = projected + i * p.hidden;
    for_vectors(p.hidden, [&](int64_t j, int count) {
      store_some(row + j, load_some(row + j, count) + load_some(w.b1 + j, count), count);
    });
  }
}

static void gelu_rows(const float* from, int64_t count, float* to) {
  for_vectors(count, [&](int64_t i, int lanes) { store_some(to + i, gelu(load_some(from + i, lanes)), lanes); });
}

// Hands the items [0, count) to `workers`, the next one to whoever is free: body(worker, item).
template <class Body>
TK_INLINE void share(const Pool& pool, int64_t workers, int64_t count, const Body& body) {
  int64_t ticket = 0;
  parallel_for(pool, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i; (i = __atomic_fetch_add(&ticket, 1, __ATOMIC_RELAXED)) < count;) body(worker, i);
    }
  });
}

TK_INLINE int64_t slot_stride(const SlimTokens& p) { return round_up(p.slots, kLanes); }

// Where part i of `parts` begins in [0, count).
TK_INLINE int64_t part(int64_t count, int64_t i, int64_t parts) { return count * i / parts; }

}  // namespace
}  // namespace tk::TK_ISA
