// bfloat16 products by pairs: for processors with AVX512_BF16, operands stay halves and every
// multiply-add takes two of them.
#pragma once

#include "cpu/gemm.h"

namespace tk::TK_ISA {
namespace {

TK_INLINE __mmask32 first_halves(int64_t count) {
  return static_cast<__mmask32>((uint64_t{1} << count) - 1u);
}

// Words of two vectors of halves: `even` below, `odd` above.
TK_INLINE __m512i join(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// The same of 32 columns: words of the first 16, and of the others.
TK_INLINE void store_joined(float* to, __m512i even, __m512i odd) {
  const __m512i words = _mm512_add_epi32(
      _mm512_set1_epi32(0x200000),
      _mm512_mullo_epi32(reinterpret_cast<__m512i>(iota()), _mm512_set1_epi32(0x10001)));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, words, odd));
  _mm512_storeu_si512(
      to + kLanes,
      _mm512_permutex2var_epi16(even, _mm512_add_epi32(words, _mm512_set1_epi32(0x100010)), odd));
}

// Two vectors of halves, one behind the other.
TK_INLINE Floats round_words(Floats low, Floats high) {
  return reinterpret_cast<Floats>(_mm512_cvtne2ps_pbh(high, low));
}

TK_INLINE Floats load_words(const BFloat16* from) {
  return reinterpret_cast<Floats>(_mm512_loadu_si512(from));
}

// The first `count` halves; zeros behind them.
TK_INLINE Floats load_words(const BFloat16* from, int64_t count) {
  const int64_t halves = smaller<int64_t>(count, 2 * kLanes);
  return reinterpret_cast<Floats>(_mm512_maskz_loadu_epi16(first_halves(halves), from));
}

TK_INLINE void store_words(BFloat16* to, Floats words) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(words));
}

TK_INLINE Floats even_halves(Floats words) {
  return reinterpret_cast<Floats>(_mm512_slli_epi32(reinterpret_cast<__m512i>(words), 16));
}

TK_INLINE Floats odd_halves(Floats words) {
  return reinterpret_cast<Floats>(_mm512_and_si512(
      reinterpret_cast<__m512i>(words), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// B's rows contiguous: from[k * depth_stride + n], `depth` elements; zeros beyond depth and cols.
inline void pack_panels_pairs(const BFloat16* from, int64_t depth_stride, int64_t depth,
                              int64_t cols, float* to) {
  const int64_t words = Pairs::words(depth);
  for (int64_t first_col = 0; first_col < cols; first_col += kPanelGroup * kTileCols) {
    const int64_t last_col = smaller(cols, first_col + kPanelGroup * kTileCols);
    for (int64_t k = 0; k < depth; k += 2) {
      for (int64_t n = first_col; n < last_col; n += kTileCols) {
        const __mmask32 mask = first_halves(smaller<int64_t>(cols - n, kTileCols));
        const BFloat16* row = from + k * depth_stride + n;
        const __m512i even = _mm512_maskz_loadu_epi16(mask, row);
        const __m512i odd = _mm512_maskz_loadu_epi16(k + 1 < depth ? mask : 0, row + depth_stride);
        store_joined(to + n * words + k / 2 * kTileCols, even, odd);
      }
    }
  }
}

// One panel, B's columns contiguous: from[n * col_stride + k], `depth` elements, cols ≤ kTileCols;
// zeros beyond both.
inline void pack_panel_pairs_transposed(const BFloat16* from, int64_t col_stride, int64_t depth,
                                        int64_t cols, float* to) {
  for (int64_t k = 0; k < depth; k += 2 * kLanes, to += kLanes * kTileCols) {
    const __mmask32 mask = first_halves(smaller<int64_t>(depth - k, 2 * kLanes));
    const int64_t words = Pairs::words(smaller<int64_t>(depth - k, 2 * kLanes));
    for (int part = 0; part < kTileVectors; ++part) {
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t n = part * kLanes + i;
        square[i] = reinterpret_cast<Floats>(
            _mm512_maskz_loadu_epi16(n < cols ? mask : 0, from + n * col_stride + k));
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < words) store(to + i * kTileCols + part * kLanes, square[i]);
      }
    }
  }
}

template <>
struct Product<BFloat16> {
  using Kind = Pairs;

  static void pack(const BFloat16* from, int64_t depth_stride, int64_t col_stride, int64_t depth,
                   int64_t cols, float* to) {
    if (col_stride == 1) return pack_panels_pairs(from, depth_stride, depth, cols, to);
    for (int64_t n = 0; n < cols; n += kTileCols, to += Kind::words(depth) * kTileCols) {
      pack_panel_pairs_transposed(from + n * col_stride, col_stride, depth,
                                  smaller<int64_t>(cols - n, kTileCols), to);
    }
  }

  static constexpr int64_t stage(int64_t rows) { return rows * kDepthBlock; }

  static void multiply_rows(const BFloat16* from, int64_t from_stride, const float* packed,
                            int64_t rows, int64_t cols, int64_t depth, float* c, int64_t c_stride,
                            bool accumulate, float* stage) {
    const int64_t words = Kind::words(depth);
    const bool in_place =
        depth % 2 == 0 && from_stride % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0;
    for (int64_t k = 0; k == 0 || k < words; k += kDepthBlock) {
      const int64_t block = smaller(words - k, kDepthBlock);
      Left left = {reinterpret_cast<const float*>(from + 2 * k), from_stride / 2, 1};
      if (!in_place) {
        copy_rows(from + 2 * k, from_stride, rows, smaller(depth - 2 * k, 2 * kDepthBlock), stage);
        left = {stage, kDepthBlock, 1};
      }
      for (int64_t n = 0; n < cols; n += kTileCols) {
        multiply_panel<Kind>(left, packed + n * words + k * kTileCols, rows,
                             smaller<int64_t>(cols - n, kTileCols), block, c + n, c_stride,
                             accumulate || k > 0);
      }
    }
  }

  // Element row k of a panel of words.
  static void clear(float* panel, int64_t k) {
    const __m512i other =
        _mm512_set1_epi32(k % 2 == 0 ? static_cast<int>(0xffff0000u) : 0x0000ffff);
    for (int v = 0; v < kTileVectors; ++v) {
      float* words = panel + k / 2 * kTileCols + v * kLanes;
      _mm512_storeu_si512(words, _mm512_and_si512(_mm512_loadu_si512(words), other));
    }
  }

  static Left columns(const float* block, int64_t stride, int64_t depth, int64_t rows, float* to,
                      int64_t to_stride) {
    for (int64_t k = 0; k < depth; k += 2) {
      const float* even = block + k * stride;
      float* out = to + k / 2 * to_stride;
      for (int64_t i = 0; i < rows; i += kLanes) {
        const int count = static_cast<int>(smaller<int64_t>(rows - i, kLanes));
        const Floats above = k + 1 < depth ? load(even + stride + i, count) : splat(0.0f);
        _mm512_mask_storeu_epi32(
            out + i, first(count),
            join(narrow(load(even + i, count), BFloat16{}), narrow(above, BFloat16{})));
      }
    }
    return {to, 1, to_stride};
  }

  static Left rows(const float* block, int64_t stride, int64_t rows, int64_t depth, float* to,
                   int64_t to_stride) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < depth; k += kLanes) {
        const int count = static_cast<int>(smaller<int64_t>(depth - k, kLanes));
        const __m256i halves = narrow(load(block + i * stride + k, count), BFloat16{});
        const __mmask16 mask = first(static_cast<int>(smaller<int64_t>(count + 1, kLanes)));
        _mm256_mask_storeu_epi16(reinterpret_cast<uint16_t*>(to + i * to_stride) + k, mask, halves);
      }
    }
    return {to, to_stride, 1};
  }

 private:
  static void copy_rows(const BFloat16* from, int64_t from_stride, int64_t rows, int64_t depth,
                        float* stage) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < depth; k += 2 * kLanes) {
        const __mmask32 mask = first_halves(smaller<int64_t>(depth - k, 2 * kLanes));
        _mm512_storeu_si512(stage + i * kDepthBlock + k / 2,
                            _mm512_maskz_loadu_epi16(mask, from + i * from_stride + k));
      }
    }
  }
};

}  // namespace
}  // namespace tk::TK_ISA
