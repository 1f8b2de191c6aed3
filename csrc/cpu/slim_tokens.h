// What the forward and the backward pass of slim_tokens share: scratch, packed weights, layer norm,
// the hidden layer of a tile.
#pragma once

#include "cpu/gelu.h"
#include "cpu/gemm.h"
#include "cpu/work.h"

namespace tk::TK_ISA {
namespace {

TK_INLINE int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// Slots of a row of logits, padded to whole vectors.
TK_INLINE int64_t slot_stride(const SlimTokens& p) { return round_up(p.slots, kLanes); }

// Calls body(c, count) for each vector of a row of `cols`.
template <class Body>
TK_INLINE void for_vectors(int64_t cols, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) body(c, kLanes);
  if (c < cols) body(c, static_cast<int>(cols - c));
}

// A sum over the vectors of a row in four interleaved chains, which do not wait for one another:
// body(c, count) gives what a vector adds.
template <class Body>
TK_INLINE float sum_vectors(int64_t cols, const Body& body) {
  Floats sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= cols; c += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += body(c + i * kLanes, kLanes);
  }
  for_vectors(cols - c, [&](int64_t i, int count) { sums[0] += body(c + i, count); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// What the kernel itself makes and multiplies: float32, or T where pairs of T are multiplied.
template <class Kind, class T>
struct OperandOf {
  using type = float;
};
template <class T>
struct OperandOf<Pairs, T> {
  using type = T;
};
template <class T>
using Operand = typename OperandOf<typename Product<T>::Kind, T>::type;

// Writes `count` operands of a product: body(i, lanes) gives a vector of them.
template <class Body>
TK_INLINE void for_operands(float* to, int64_t count, const Body& body) {
  for_vectors(count, [&](int64_t i, int lanes) { store_some(to + i, body(i, lanes), lanes); });
}

#if defined(__AVX512BF16__)
// Whole registers of halves, which the compiler does not make of two conversions.
template <class Body>
TK_INLINE void for_operands(BFloat16* to, int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    store_words(to + i, round_words(body(i, kLanes), body(i + kLanes, kLanes)));
  }
  for_vectors(count - i, [&](int64_t rest, int lanes) {
    store_some(to + i + rest, body(i + rest, lanes), lanes);
  });
}
#endif

// The weights as every tile reads them.
struct Weights {
  float *norm_weight, *norm_bias;  // (C)
  float* b1;                       // (H)
  float* w1;                       // packed (C, H)
  float* w2;                       // packed (H, M)
};

static Weights take_weights(const SlimTokens& p, Arena& arena) {
  return {arena.floats(p.channels), arena.floats(p.channels), arena.floats(p.hidden),
          arena.floats(packed_size(p.channels, p.hidden)),
          arena.floats(packed_size(p.hidden, p.slots))};
}

template <class T>
void pack_weights(const SlimTokens& p, const Weights& w) {
  widen_rows(static_cast<const T*>(p.norm_weight), 0, 1, p.channels, w.norm_weight, 0);
  widen_rows(static_cast<const T*>(p.norm_bias), 0, 1, p.channels, w.norm_bias, 0);
  widen_rows(static_cast<const T*>(p.b1), 0, 1, p.hidden, w.b1, 0);
  Product<T>::pack(static_cast<const T*>(p.w1), 1, p.w1_row, p.channels, p.hidden, w.w1);
  Product<T>::pack(static_cast<const T*>(p.w2), 1, p.w2_row, p.hidden, p.slots, w.w2);
}

// Words that products of halves need beside their operands.
static int64_t stage_size(const SlimTokens& p, int64_t rows) {
  return p.dtype == DType::kFloat32 ? 0 : Product<BFloat16>::stage(rows);
}

// Of one token's channels. `rest` is what `mean` lost by rounding, far from the origin no small
// thing, times rstd.
struct Moments {
  float mean, rest, rstd;

  TK_INLINE Floats standard(Floats value) const { return (value - mean) * rstd - rest; }
};

// Sums over a row of the values, and of the distances from `mean` and their squares.
template <class T>
TK_INLINE float sum_row(const T* from, int64_t count) {
  return sum_vectors(count, [&](int64_t c, int lanes) { return load_some(from + c, lanes); });
}

struct Spread {
  float rests, squares;
};

template <class T>
TK_INLINE Spread spread_row(const T* from, int64_t count, float mean) {
  Floats rests{};
  const float squares = sum_vectors(count, [&](int64_t c, int lanes) {
    const Floats centred =
        select(iota() < splat_int(lanes), load_some(from + c, lanes) - mean, splat(0.0f));
    rests += centred;
    return centred * centred;
  });
  return {sum(rests), squares};
}

#if defined(__AVX512BF16__)
// Halves two by two: the order within a sum is free.
TK_INLINE float sum_row(const BFloat16* from, int64_t count) {
  const auto ones = reinterpret_cast<Floats>(splat_int(0x3f803f80));
  Floats sums[2] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= count; c += 4 * kLanes) {
    sums[0] = multiply_add(Pairs{}, sums[0], load_words(from + c), ones);
    sums[1] = multiply_add(Pairs{}, sums[1], load_words(from + c + 2 * kLanes), ones);
  }
  for (; c < count; c += 2 * kLanes) {
    sums[0] = multiply_add(Pairs{}, sums[0], load_words(from + c, count - c), ones);
  }
  return sum(sums[0] + sums[1]);
}

TK_INLINE Spread spread_row(const BFloat16* from, int64_t count, float mean) {
  Floats rests[2] = {}, squares[2] = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
    const Floats words = load_words(from + c);
    const Floats even = even_halves(words) - mean, odd = odd_halves(words) - mean;
    rests[0] += even;
    rests[1] += odd;
    squares[0] += even * even;
    squares[1] += odd * odd;
  }
  if (c < count) {
    const Floats words = load_words(from + c, count - c);
    const auto left = splat_int(static_cast<int32_t>(count - c));
    const Floats even = select(iota() * 2 < left, even_halves(words) - mean, splat(0.0f)),
                 odd = select(iota() * 2 + 1 < left, odd_halves(words) - mean, splat(0.0f));
    rests[0] += even;
    rests[1] += odd;
    squares[0] += even * even;
    squares[1] += odd * odd;
  }
  return {sum(rests[0] + rests[1]), sum(squares[0] + squares[1])};
}
#endif

template <class T>
TK_INLINE const T* token(const SlimTokens& p, int64_t image, int64_t n) {
  return static_cast<const T*>(p.x) + image * p.x_batch + n * p.x_token;
}

// `rows` tokens from `first` on to zero mean and unit variance, times weight, plus bias. Some rows
// together, step by step, so that their sums do not wait for one another.
template <class T>
void layer_norm(const SlimTokens& p, const Weights& w, int64_t image, int64_t first, int64_t rows,
                Operand<T>* to, Moments* moments) {
  constexpr int64_t kTogether = 8;
  const auto channels = static_cast<float>(p.channels);
  for (int64_t begin = 0; begin < rows; begin += kTogether) {
    const int64_t end = smaller(rows, begin + kTogether);
    float means[kTogether];
    Spread spreads[kTogether];
    for (int64_t i = begin; i < end; ++i)
      means[i - begin] = sum_row(token<T>(p, image, first + i), p.channels) / channels;
    for (int64_t i = begin; i < end; ++i) {
      spreads[i - begin] = spread_row(token<T>(p, image, first + i), p.channels, means[i - begin]);
    }
    for (int64_t i = begin; i < end; ++i) {
      const float rest = spreads[i - begin].rests / channels;
      const float variance = spreads[i - begin].squares / channels - rest * rest;
      const float rstd = 1.0f / __builtin_sqrtf(variance + p.eps);
      moments[i] = {means[i - begin], rest * rstd, rstd};
    }
    for (int64_t i = begin; i < end; ++i) {
      const T* from = token<T>(p, image, first + i);
      const Moments row = moments[i];
      for_operands(to + i * p.channels, p.channels, [&](int64_t c, int count) {
        return row.standard(load_some(from + c, count)) * load_some(w.norm_weight + c, count) +
               load_some(w.norm_bias + c, count);
      });
    }
  }
}

// projected (rows, H) = normal (rows, C) · w1ᵀ + b1
template <class T>
void project(const SlimTokens& p, const Weights& w, const Operand<T>* normal, int64_t rows,
             float* projected, float* stage) {
  Product<Operand<T>>::multiply_rows(normal, p.channels, w.w1, rows, p.hidden, p.channels,
                                     projected, p.hidden, false, stage);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = projected + i * p.hidden;
    for_vectors(p.hidden, [&](int64_t j, int count) {
      store_some(row + j, load_some(row + j, count) + load_some(w.b1 + j, count), count);
    });
  }
}

// logits (rows, M) = scale · GELU(projected) · w2ᵀ. The scale is stored with them: whoever reads a
// logit reads the same bits.
template <class T>
void score_slots(const SlimTokens& p, const Weights& w, const float* projected, int64_t rows,
                 Operand<T>* hidden, float* logits, float* stage) {
  for_operands(hidden, rows * p.hidden, [&](int64_t i, int lanes) {
    return gelu(load_some(projected + i, lanes), Operand<T>{});
  });
  const int64_t slots = slot_stride(p);
  Product<Operand<T>>::multiply_rows(hidden, p.hidden, w.w2, rows, p.slots, p.hidden, logits, slots,
                                     false, stage);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = logits + i * slots;
    for_vectors(p.slots, [&](int64_t m, int lanes) {
      store_some(row + m, load_some(row + m, lanes) * p.scale, lanes);
    });
  }
}

// Where part i of `parts` begins in [0, count).
TK_INLINE int64_t part(int64_t count, int64_t i, int64_t parts) { return count * i / parts; }

}  // namespace
}  // namespace tk::TK_ISA
