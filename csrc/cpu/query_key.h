// Products of a block of query rows with a tile of keys: s[r][j] = ⟨q_r, k_j⟩. Many rows: keys are transposed once into a panel, keys
// across lanes, a block of rows by a few vectors in registers. Few rows: each key is read once, the head dimension across lanes.
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
constexpr int kFewRows = 4;

// Lane 2i from a, 2i+1 from b: the lower or the upper halves of both.
TK_INLINE Floats zip(Floats a, Floats b, bool upper) {
  Ints lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i / 2 + (i % 2) * kLanes + (upper ? kLanes / 2 : 0);
  return __builtin_shuffle(a, b, lanes);
}

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

// Lane i holds the sum of the lanes of x[i].
TK_INLINE Floats sum_lanes(Floats (&x)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = zip(x[i], x[i + half], false) + zip(x[i], x[i + half], true);
  }
  return x[0];
}

// kLanes keys (the first `keys` of them exist) by kLanes dimensions (the first `depth`), transposed into a panel.
template <class T>
TK_INLINE void pack_block(const T* key, int64_t stride, int keys, int depth, float* panel) {
  Floats x[kLanes];
  if (keys >= kLanes && depth >= kLanes) {
    for (int i = 0; i < kLanes; ++i) x[i] = load(key + i * stride);
  } else {
    for (int i = 0; i < kLanes; ++i) x[i] = i < keys ? load(key + i * stride, smaller(depth, kLanes)) : Floats{};
  }
  transpose(x);
  for (int i = 0; i < smaller(depth, kLanes); ++i) store(panel + i * kPanel, x[i]);
}

// panel[d][j] = key[j][d]
template <class T>
void pack_panel(const T* key, int64_t stride, int keys, int depth, float* panel) {
  for (int j = 0; j < keys; j += kLanes) {
    for (int d = 0; d < depth; d += kLanes) {
      pack_block(key + j * stride + d, stride, keys - j, depth - d, panel + d * kPanel + j);
    }
  }
}

// Rows × Vectors products in registers. query[d][row], panel[d][key]; scores of one row are `width` apart.
template <int Rows, int Vectors>
void multiply(const float* query, const float* panel, int depth, bool first, float* scores, int64_t width) {
  Floats sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = first ? Floats{} : load(scores + r * width + v * kLanes);
  }
  for (int d = 0; d < depth; ++d) {
    Floats keys[Vectors];
    for (int v = 0; v < Vectors; ++v) keys[v] = load(panel + d * kPanel + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Floats q = splat(query[d * Rows + r]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] += q * keys[v];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store(scores + r * width + v * kLanes, sums[r][v]);
  }
}

template <int Vectors>
TK_INLINE void multiply_rows(int rows, const float* query, const float* panel, int depth, bool first, float* scores,
                             int64_t width) {
  switch (rows) {
    case 1: return multiply<1, Vectors>(query, panel, depth, first, scores, width);
    case 2: return multiply<2, Vectors>(query, panel, depth, first, scores, width);
    case 3: return multiply<3, Vectors>(query, panel, depth, first, scores, width);
    case 4: return multiply<4, Vectors>(query, panel, depth, first, scores, width);
    case 5: return multiply<5, Vectors>(query, panel, depth, first, scores, width);
    default: return multiply<6, Vectors>(query, panel, depth, first, scores, width);
  }
}

// Rows in blocks of kRowBlock, each stored dimension by dimension: query[block][d][row of the block].
template <class T>
void multiply_many(const float* query, int rows, int64_t dim, const T* key, int64_t stride, int keys, float* scores,
                   int64_t width) {
  alignas(64) float panel[kPanel * kDepth];
  for (int j = 0; j < keys; j += kPanel) {
    const int count = smaller(kPanel, keys - j);
    for (int64_t d = 0; d < dim; d += kDepth) {
      const int depth = static_cast<int>(smaller<int64_t>(kDepth, dim - d));
      pack_panel(key + j * stride + d, stride, count, depth, panel);
      for (int r = 0; r < rows; r += kRowBlock) {
        const int block = smaller(kRowBlock, rows - r);
        const float* q = query + r * dim + d * block;
        float* to = scores + r * width + j;
        if (count > kPanel - kLanes) {
          multiply_rows<kPanelVectors>(block, q, panel, depth, d == 0, to, width);
        } else {
          for (int v = 0; v < count; v += kLanes) multiply_rows<1>(block, q, panel + v, depth, d == 0, to + v, width);
        }
      }
    }
  }
}

// Rows · Keys = kLanes products at once. query[row][d], rows and dimensions padded with zeros; `padded` dimensions a row.
template <int Rows, class T>
void multiply_few(const float* query, int rows, int64_t dim, int64_t padded, const T* key, int64_t stride, int keys,
                  float* scores, int64_t width) {
  constexpr int kKeys = kLanes / Rows;
  for (int j = 0; j < keys; j += kKeys) {
    const T* k[kKeys];
    for (int i = 0; i < kKeys; ++i) k[i] = key + smaller(j + i, keys - 1) * stride;
    Floats sums[kLanes] = {};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      for (int r = 0; r < Rows; ++r) {
        const Floats q = load(query + r * padded + d);
        for (int i = 0; i < kKeys; ++i) sums[r * kKeys + i] += q * load(k[i] + d);
      }
    }
    if (d < dim) {
      for (int r = 0; r < Rows; ++r) {
        const Floats q = load(query + r * padded + d);
        for (int i = 0; i < kKeys; ++i) sums[r * kKeys + i] += q * load(k[i] + d, static_cast<int>(dim - d));
      }
    }
    float lanes[kLanes];
    store(lanes, sum_lanes(sums));
    for (int r = 0; r < rows; ++r) std::memcpy(scores + r * width + j, lanes + r * kKeys, sizeof(float) * kKeys);
  }
}

// scores[r][j] for `keys` ≤ kTile keys, the scores of one row `width` apart (`width` ≥ keys rounded up to kLanes).
template <class T>
void multiply_tile(const float* query, int rows, int64_t dim, bool few, const T* key, int64_t stride, int keys, float* scores,
                   int64_t width) {
  const int64_t padded = ceil_div(dim, kLanes) * kLanes;
  if (!few) return multiply_many(query, rows, dim, key, stride, keys, scores, width);
  if (rows == 1) return multiply_few<1>(query, rows, dim, padded, key, stride, keys, scores, width);
  if (rows == 2) return multiply_few<2>(query, rows, dim, padded, key, stride, keys, scores, width);
  return multiply_few<4>(query, rows, dim, padded, key, stride, keys, scores, width);
}

// One row of queries as multiply_tile wants it: row r of `rows`.
template <class T>
void pack_query(const T* from, int r, int rows, int64_t dim, bool few, float* to) {
  const int64_t padded = ceil_div(dim, kLanes) * kLanes;
  const int first = r / kRowBlock * kRowBlock, block = smaller(kRowBlock, rows - first);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int count = static_cast<int>(smaller<int64_t>(kLanes, dim - d));
    const Floats value = load(from + d, count);
    if (few) {
      store(to + r * padded + d, value);
    } else {
      float lanes[kLanes];
      store(lanes, value);
      for (int i = 0; i < count; ++i) to[first * dim + (d + i) * block + r - first] = lanes[i];
    }
  }
}

}  // namespace
}  // namespace tk::TK_ISA
