// Products of a block of query rows with a tile of keys: s[r][j] = ⟨q_r, k_j⟩. Many rows: keys are
// transposed once into a panel, keys across lanes, a block of rows by a few vectors in registers.
// Few rows: each key is read once, the head dimension across lanes.
#pragma once

#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

constexpr int kTile = 256;    // keys of one tile
constexpr int kRowBlock = 6;  // rows in registers at once
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int kPanel = kPanelVectors * kLanes;  // keys of one packed panel
constexpr int kDepth = 128;                     // dimensions of one packed panel
template <bool Pairs>
constexpr int kWords = Pairs ? kDepth / 2 : kDepth;  // the same in words: pairs or single ones
constexpr int kFewRows = 4;

// Lane 2i from a, 2i+1 from b: the lower or the upper halves of both.
TK_INLINE Floats zip(Floats a, Floats b, bool upper) {
  Ints lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i / 2 + (i % 2) * kLanes + (upper ? kLanes / 2 : 0);
  return __builtin_shuffle(a, b, lanes);
}

#if defined(__AVX512F__)
// First 4 × 4 inside quarters of a register, then the quarters: one cheap shuffle each.
TK_INLINE void transpose(Floats (&x)[kLanes]) {
  Floats quads[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    const __m512d low0 = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1])),
                  high0 = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    const __m512d low1 = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3])),
                  high1 = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
    quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
    quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
    quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
    quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
  }
  for (int i = 0; i < 4; ++i) {
    const Floats even0 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88),
                 even1 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const Floats odd0 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd),
                 odd1 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    x[i] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    x[i + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}
#else
TK_INLINE void transpose(Floats (&x)[kLanes]) {
  for (int step = 1; step < kLanes; step *= 2) {
    Floats y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = zip(x[i], x[i + kLanes / 2], false);
      y[2 * i + 1] = zip(x[i], x[i + kLanes / 2], true);
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}
#endif

// Lane i holds the sum of the lanes of x[i].
TK_INLINE Floats sum_lanes(Floats (&x)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i)
      x[i] = zip(x[i], x[i + half], false) + zip(x[i], x[i + half], true);
  }
  return x[0];
}

// bfloat16 in pairs: where the processor multiplies them so, two neighbouring dimensions stay one
// 32-bit word, from memory to product.
#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

// sum + a · b; with Pairs every lane of a and b holds two bfloat16, and two products are added.
template <bool Pairs>
TK_INLINE Floats multiply_add(Floats sum, Floats a, Floats b) {
#if defined(__AVX512BF16__)
  if constexpr (Pairs) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
#endif
  return sum + a * b;
}

// A row of keys as words: pairs of its elements, or the elements themselves.
template <bool Pairs, class T>
TK_INLINE auto words_of(const T* row) {
  if constexpr (Pairs) {
    return reinterpret_cast<const float*>(row);
  } else {
    return row;
  }
}

// kLanes keys (the first `keys` of them exist) by kLanes words (the first `words`), transposed into
// a panel.
template <bool Pairs, class T>
TK_INLINE void pack_block(const T* key, int64_t stride, int keys, int word, int words,
                          float* panel) {
  Floats x[kLanes];
  if (keys >= kLanes && words >= kLanes) {
    for (int i = 0; i < kLanes; ++i) x[i] = load(words_of<Pairs>(key + i * stride) + word);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      x[i] = i < keys ? load(words_of<Pairs>(key + i * stride) + word, smaller(words, kLanes))
                      : Floats{};
    }
  }
  transpose(x);
  for (int i = 0; i < smaller(words, kLanes); ++i) store(panel + i * kPanel, x[i]);
}

// panel[word][j] = key[j][word]
template <bool Pairs, class T>
void pack_panel(const T* key, int64_t stride, int keys, int words, float* panel) {
  for (int j = 0; j < keys; j += kLanes) {
    for (int w = 0; w < words; w += kLanes) {
      pack_block<Pairs>(key + j * stride, stride, keys - j, w, words - w, panel + w * kPanel + j);
    }
  }
}

// Walks once over the rows of the next panel and asks for them, line by line, while this one is
// multiplied.
struct Ahead {
  const char *line, *row_end, *end;
  int64_t row_bytes, stride_bytes;

  TK_INLINE void step() {
    if (line >= end) return;
    __builtin_prefetch(line, 0, 2);
    line += 64;
    if (line >= row_end) {
      row_end += stride_bytes;
      line = row_end - row_bytes;
    }
  }
};

// A block of scores: rows are `width` apart; `first` starts them, else they are added to.
struct Scores {
  float* at;
  int64_t width;
  bool first;
};

// Rows × Vectors products in registers. query[row][word], panel[word][key].
template <bool Pairs, int Rows, int Vectors>
void multiply(const float* query, const float* panel, int words, const Scores& scores,
              Ahead& next) {
  Ahead ahead = next;
  Floats sums[Rows][Vectors] = {};
  for (int w = 0; w < words; ++w) {
    ahead.step();
    Floats keys[Vectors];
    for (int v = 0; v < Vectors; ++v) keys[v] = load(panel + w * kPanel + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const uint32_t word = bits_of(query[r * kWords<Pairs> + w]);
      const auto q = reinterpret_cast<Floats>(splat_int(static_cast<int32_t>(word)));
      for (int v = 0; v < Vectors; ++v) sums[r][v] = multiply_add<Pairs>(sums[r][v], q, keys[v]);
    }
  }
  next = ahead;
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* to = scores.at + r * scores.width + v * kLanes;
      store(to, scores.first ? sums[r][v] : sums[r][v] + load(to));
    }
  }
}

template <bool Pairs, int Vectors>
TK_INLINE void multiply_rows(int rows, const float* query, const float* panel, int words,
                             const Scores& scores, Ahead& next) {
  switch (rows) {
    case 1:
      return multiply<Pairs, 1, Vectors>(query, panel, words, scores, next);
    case 2:
      return multiply<Pairs, 2, Vectors>(query, panel, words, scores, next);
    case 3:
      return multiply<Pairs, 3, Vectors>(query, panel, words, scores, next);
    case 4:
      return multiply<Pairs, 4, Vectors>(query, panel, words, scores, next);
    case 5:
      return multiply<Pairs, 5, Vectors>(query, panel, words, scores, next);
    default:
      return multiply<Pairs, 6, Vectors>(query, panel, words, scores, next);
  }
}

// query[words in steps of kWords][row][word]
template <bool Pairs, class T>
void multiply_many(const float* query, int rows, int64_t dim, const T* key, int64_t stride,
                   int keys, float* scores, int64_t width) {
  alignas(64) float panel[kPanel * kDepth];
  for (int j = 0; j < keys; j += kPanel) {
    const int count = smaller(kPanel, keys - j);
    for (int64_t d = 0; d < dim; d += kDepth) {
      const auto depth = static_cast<int>(smaller<int64_t>(kDepth, dim - d));
      const int words = Pairs ? depth / 2 : depth;
      const T* from = key + j * stride + d;
      pack_panel<Pairs>(from, stride, count, words, panel);
      const int64_t row_bytes = depth * static_cast<int64_t>(sizeof(T)),
                    stride_bytes = stride * static_cast<int64_t>(sizeof(T));
      const char* line = reinterpret_cast<const char*>(from) + kPanel * stride_bytes;
      Ahead next{line, line + row_bytes, line + kPanel * stride_bytes, row_bytes, stride_bytes};
      for (int r = 0; r < rows; r += kRowBlock) {
        const int block = smaller(kRowBlock, rows - r);
        const float* q = query + (d / kDepth * rows + r) * kWords<Pairs>;
        const Scores to{scores + r * width + j, width, d == 0};
        if (count > kPanel - kLanes) {
          multiply_rows<Pairs, kPanelVectors>(block, q, panel, words, to, next);
        } else {
          for (int v = 0; v < count; v += kLanes) {
            multiply_rows<Pairs, 1>(block, q, panel + v, words, {to.at + v, width, to.first}, next);
          }
        }
      }
    }
  }
}

// kLanes / Rows keys at a time, read one after the other, as memory likes it; keys that lie apart
// are asked for ahead. query[row][word], words padded with zeros to whole vectors; Rows ≥ rows.
template <bool Pairs, int Rows, class T>
void multiply_few(const float* query, int rows, int64_t dim, const T* key, int64_t stride, int keys,
                  float* scores, int64_t width) {
  constexpr int kKeys = kLanes / Rows, kKeysAhead = 6, kLine = 64 / sizeof(T);
  const int64_t apart = stride == dim ? 0 : dim, words = Pairs ? dim / 2 : dim;
  const int64_t whole = words / kLanes * kLanes, padded = ceil_div(words, kLanes) * kLanes;
  const float* q[Rows];
  for (int r = 0; r < Rows; ++r) q[r] = query + smaller(r, rows - 1) * padded;
  for (int j = 0; j < keys; j += kKeys) {
    Floats sums[kLanes];
    for (int i = 0; i < kKeys; ++i) {
      const T* row = key + smaller(j + i, keys - 1) * stride;
      for (int64_t d = 0; d < apart; d += kLine) __builtin_prefetch(row + kKeysAhead * stride + d);
      const auto* k = words_of<Pairs>(row);
      Floats products[Rows] = {};
      for (int64_t w = 0; w < whole; w += kLanes) {
        for (int r = 0; r < Rows; ++r) {
          products[r] = multiply_add<Pairs>(products[r], load(q[r] + w), load(k + w));
        }
      }
      if (whole < words) {
        const Floats rest = load(k + whole, static_cast<int>(words - whole));
        for (int r = 0; r < Rows; ++r) {
          products[r] = multiply_add<Pairs>(products[r], load(q[r] + whole), rest);
        }
      }
      for (int r = 0; r < Rows; ++r) sums[r * kKeys + i] = products[r];
    }
    float lanes[kLanes];
    store(lanes, sum_lanes(sums));
    for (int r = 0; r < rows; ++r) {
      std::memcpy(scores + r * width + j, lanes + r * kKeys, sizeof(float) * kKeys);
    }
  }
}

// How the products of a block of rows are made.
struct Way {
  bool few, pairs;
};

Way way_of(DType dtype, int64_t rows, int64_t dim) {
  return {rows <= kFewRows, dtype == DType::kBFloat16 && dim % 2 == 0 && kMultipliesPairs};
}

// Floats that the packed queries take, at most.
int64_t packed_floats(int64_t rows, int64_t dim) { return rows * ceil_div(dim, kDepth) * kDepth; }

// scores[r][j] for `keys` ≤ kTile keys, the scores of one row `width` apart (`width` ≥ keys rounded
// up to kLanes).
template <bool Pairs, class T>
TK_INLINE void multiply_tile(Way way, const float* query, int rows, int64_t dim, const T* key,
                             int64_t stride, int keys, float* scores, int64_t width) {
  auto* function = multiply_many<Pairs, T>;
  if (way.few) function = multiply_few<Pairs, 4, T>;
  if (way.few && rows == 2) function = multiply_few<Pairs, 2, T>;
  if (way.few && rows == 1) function = multiply_few<Pairs, 1, T>;
  function(query, rows, dim, key, stride, keys, scores, width);
}

template <class T>
void multiply_tile(Way way, const float* query, int rows, int64_t dim, const T* key, int64_t stride,
                   int keys, float* scores, int64_t width) {
  if constexpr (kMultipliesPairs && sizeof(T) == 2) {
    if (way.pairs) {
      return multiply_tile<true>(way, query, rows, dim, key, stride, keys, scores, width);
    }
  }
  multiply_tile<false>(way, query, rows, dim, key, stride, keys, scores, width);
}

// One row of queries as multiply_tile wants it: row r of `rows`.
template <class T>
void pack_query(Way way, const T* from, int r, int rows, int64_t dim, float* to) {
  const int64_t words = way.pairs ? dim / 2 : dim;
  int64_t step = way.pairs ? kWords<true> : kWords<false>;
  if (way.few) step = ceil_div(words, kLanes) * kLanes;
  for (int64_t begin = 0; begin < words; begin += step) {
    float* at = to + begin * rows + r * step;
    for (int64_t w = begin; w < smaller(words, begin + step); w += kLanes, at += kLanes) {
      const int count = static_cast<int>(smaller<int64_t>(kLanes, words - w));
      if constexpr (sizeof(T) == 2) {
        if (way.pairs) {
          store(at, load(words_of<true>(from) + w, count));
          continue;
        }
      }
      store(at, load(from + w, count));
    }
  }
}

}  // namespace
}  // namespace tk::TK_ISA
