// Small matrix products for one core: C[rows, cols] (+)= A[rows, depth] · B[depth, cols], by
// register tiles over packed panels of B.
//
// Operands are 32-bit words along the depth. `Singles`: a word is a float32; halves are widened.
// `Pairs`: a word is two bfloat16 neighbours along the depth, for processors that multiply those; C
// is float32 in both. A is read in place (one of its two strides is 1); B is packed once by `pack`,
// which also widens and transposes. Every element of C is one chain of multiply-adds in ascending
// depth, whatever tile it falls into, so splitting rows or columns between tasks changes no bit.
#pragma once

#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

constexpr int kTileVectors = 2;
constexpr int kTileCols = kTileVectors * kLanes;
constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // accumulators: 24 of 32 registers, or 12 of 16
constexpr int64_t kPanelGroup = 4;                // panels that are packed together
constexpr int64_t kDepthBlock =
    256;  // words; one panel block of B: 32 KiB with the widest vectors, the first-level cache

struct Singles {
  static constexpr int64_t kPerWord = 1;
  static constexpr int64_t words(int64_t depth) { return depth; }
};

struct Pairs {
  static constexpr int64_t kPerWord = 2;
  static constexpr int64_t words(int64_t depth) { return (depth + 1) / 2; }
};

TK_INLINE Floats multiply_add(Singles, Floats sum, Floats left, Floats right) {
  return sum + left * right;
}

#if defined(__AVX512BF16__)
TK_INLINE Floats multiply_add(Pairs, Floats sum, Floats left, Floats right) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
}
#endif

// Word (i, k) of A: data[i * row_stride + k * depth_stride]; one of the strides is 1.
struct Left {
  const float* data;
  int64_t row_stride;
  int64_t depth_stride;
};

// Words that `pack` writes for B[depth, cols], its depth counted in words: whole panels, one behind
// the other.
TK_INLINE int64_t packed_size(int64_t depth, int64_t cols) {
  return ceil_div(cols, kTileCols) * kTileCols * depth;
}

// One panel, B's rows contiguous: from[k * depth_stride + n], cols < kTileCols; zeros beyond cols.
template <class T>
void pack_panel(const T* from, int64_t depth_stride, int64_t depth, int64_t cols, float* to) {
  const int first_cols = static_cast<int>(smaller<int64_t>(cols, kLanes));
  const int second_cols = static_cast<int>(cols) - first_cols;
  for (int64_t k = 0; k < depth; ++k) {
    store(to + k * kTileCols, load(from + k * depth_stride, first_cols));
    store(to + k * kTileCols + kLanes,
          second_cols > 0 ? load(from + k * depth_stride + kLanes, second_cols) : splat(0.0f));
  }
}

// Turns a square of kLanes vectors around its diagonal: log2(kLanes) rounds of pairwise exchange.
TK_INLINE void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2) {
    Ints low{}, high{};
    for (int i = 0; i < kLanes; ++i) {
      const bool upper = (i & width) != 0;
      low[i] = upper ? kLanes + (i ^ width) : i;
      high[i] = upper ? kLanes + i : i ^ width;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & width) == 0) {
        const Floats a = rows[i], b = rows[i + width];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + width] = __builtin_shuffle(a, b, high);
      }
    }
  }
}

// One panel, B's columns contiguous: from[n * col_stride + k], cols ≤ kTileCols; zeros beyond cols.
template <class T>
void pack_panel_transposed(const T* from, int64_t col_stride, int64_t depth, int64_t cols,
                           float* to) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int count = static_cast<int>(smaller<int64_t>(depth - k, kLanes));
    for (int part = 0; part < kTileVectors; ++part) {
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t n = part * kLanes + i;
        const T* row = from + n * col_stride + k;
        square[i] = n >= cols ? splat(0.0f) : count == kLanes ? load(row) : load(row, count);
      }
      transpose(square);
      float* out = to + k * kTileCols + part * kLanes;
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + i * kTileCols, square[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if (i < count) store(out + i * kTileCols, square[i]);
        }
      }
    }
  }
}

// Whole panels side by side, kPanelGroup at a time: their rows are read in long runs, which the
// prefetchers follow.
template <class T>
void pack_whole_panels(const T* from, int64_t depth_stride, int64_t depth, int64_t panels,
                       float* to) {
  for (int64_t first = 0; first < panels; first += kPanelGroup) {
    const int64_t last = smaller(panels, first + kPanelGroup);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t panel = first; panel < last; ++panel) {
        const T* row = from + k * depth_stride + panel * kTileCols;
        float* out = to + (panel * depth + k) * kTileCols;
        store(out, load(row));
        store(out + kLanes, load(row + kLanes));
      }
    }
  }
}

// Packs B[depth, cols]: element (k, n) at from[k * depth_stride + n * col_stride], where one of the
// strides is 1.
template <class T>
void pack(const T* from, int64_t depth_stride, int64_t col_stride, int64_t depth, int64_t cols,
          float* to) {
  if (col_stride == 1) {
    const int64_t whole = cols / kTileCols, done = whole * kTileCols;
    pack_whole_panels(from, depth_stride, depth, whole, to);
    if (done < cols) pack_panel(from + done, depth_stride, depth, cols - done, to + done * depth);
    return;
  }
  for (int64_t n = 0; n < cols; n += kTileCols, to += depth * kTileCols) {
    pack_panel_transposed(from + n * col_stride, col_stride, depth,
                          smaller<int64_t>(cols - n, kTileCols), to);
  }
}

// Widens rows of halves to float32, so that they can stand on the left of a product.
template <class T>
void widen_rows(const T* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = from + i * from_stride;
    float* out = to + i * to_stride;
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) store(out + c, load(row + c));
    if (c < cols) {
      const int count = static_cast<int>(cols - c);
      store(out + c, load(row + c, count), count);
    }
  }
}

// Rows × Vectors vectors of C. `Contiguous` says that A's rows are (depth stride 1); otherwise its
// columns are (row stride 1).
template <class Kind, int Rows, int Vectors, bool Contiguous>
void tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
          int64_t c_stride, int64_t cols, bool accumulate) {
  Floats sums[Rows][Vectors];
  const int tail = static_cast<int>(cols) - (Vectors - 1) * kLanes;
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      if (!accumulate) {
        sums[i][v] = splat(0.0f);
      } else if (v + 1 == Vectors && tail < kLanes) {
        sums[i][v] = load(c + i * c_stride + v * kLanes, tail);
      } else {
        sums[i][v] = load(c + i * c_stride + v * kLanes);
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) right[v] = load(b + k * kTileCols + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const Floats left = splat(Contiguous ? a[i * a_stride + k] : a[k * a_stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v)
        sums[i][v] = multiply_add(Kind{}, sums[i][v], left, right[v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      if (v + 1 == Vectors && tail < kLanes) {
        store(c + i * c_stride + v * kLanes, sums[i][v], tail);
      } else {
        store(c + i * c_stride + v * kLanes, sums[i][v]);
      }
    }
  }
}

using Tile = void (*)(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                      int64_t c_stride, int64_t cols, bool accumulate);

// rows ≤ Rows.
template <class Kind, int Vectors, bool Contiguous, int Rows = kTileRows>
TK_INLINE Tile tile_of(int64_t rows) {
  if constexpr (Rows == 1) {
    return tile<Kind, 1, Vectors, Contiguous>;
  } else {
    return rows == Rows ? tile<Kind, Rows, Vectors, Contiguous>
                        : tile_of<Kind, Vectors, Contiguous, Rows - 1>(rows);
  }
}

template <class Kind>
TK_INLINE Tile tile_of(int64_t rows, int64_t cols, bool contiguous) {
  if (cols <= kLanes)
    return contiguous ? tile_of<Kind, 1, true>(rows) : tile_of<Kind, 1, false>(rows);
  return contiguous ? tile_of<Kind, 2, true>(rows) : tile_of<Kind, 2, false>(rows);
}

// One panel of C: cols ≤ kTileCols, `packed` points at this panel and depth block.
template <class Kind = Singles>
void multiply_panel(const Left& a, const float* packed, int64_t rows, int64_t cols, int64_t depth,
                    float* c, int64_t c_stride, bool accumulate) {
  const bool contiguous = a.depth_stride == 1;
  const int64_t a_stride = contiguous ? a.row_stride : a.depth_stride;
  const int64_t tiles = ceil_div(rows, kTileRows);
  const int64_t height = tiles > 0 ? ceil_div(rows, tiles) : 1;
  const Tile whole = tile_of<Kind>(height, cols, contiguous);
  int64_t i = 0;
  for (; i + height <= rows; i += height) {
    whole(a.data + i * a.row_stride, a_stride, packed, depth, c + i * c_stride, c_stride, cols,
          accumulate);
  }
  if (i < rows) {
    tile_of<Kind>(rows - i, cols, contiguous)(a.data + i * a.row_stride, a_stride, packed, depth,
                                              c + i * c_stride, c_stride, cols, accumulate);
  }
}

// C[rows, cols] (+)= A · B, `packed` being all of B as `pack` leaves it.
template <class Kind = Singles>
void multiply(const Left& a, const float* packed, int64_t rows, int64_t cols, int64_t depth,
              float* c, int64_t c_stride, bool accumulate) {
  for (int64_t k = 0; k == 0 || k < depth; k += kDepthBlock) {
    const int64_t block = smaller(depth - k, kDepthBlock);
    const Left part = {a.data + k * a.depth_stride, a.row_stride, a.depth_stride};
    for (int64_t n = 0; n < cols; n += kTileCols) {
      multiply_panel<Kind>(part, packed + n * depth + k * kTileCols, rows,
                           smaller<int64_t>(cols - n, kTileCols), block, c + n, c_stride,
                           accumulate || k > 0);
    }
  }
}

// The same for one number type T: how its rows become operands, and which kind of product it takes.
template <class T>
struct Product {
  using Kind = Singles;

  static void pack(const T* from, int64_t depth_stride, int64_t col_stride, int64_t depth,
                   int64_t cols, float* to) {
    ::tk::TK_ISA::pack(from, depth_stride, col_stride, depth, cols, to);
  }

  // Words of scratch that `multiply_rows` needs.
  static constexpr int64_t stage(int64_t rows) { return sizeof(T) == 4 ? 0 : rows * kDepthBlock; }

  // C (+)= A · B with T's own rows on the left, contiguous along the depth, which counts elements.
  static void multiply_rows(const T* from, int64_t from_stride, const float* packed, int64_t rows,
                            int64_t cols, int64_t depth, float* c, int64_t c_stride,
                            bool accumulate, float* stage) {
    if constexpr (sizeof(T) == 4) {
      return multiply({from, from_stride, 1}, packed, rows, cols, depth, c, c_stride, accumulate);
    }
    for (int64_t k = 0; k == 0 || k < depth; k += kDepthBlock) {
      const int64_t block = smaller(depth - k, kDepthBlock);
      widen_rows(from + k, from_stride, rows, block, stage, kDepthBlock);
      for (int64_t n = 0; n < cols; n += kTileCols) {
        multiply_panel({stage, kDepthBlock, 1}, packed + n * depth + k * kTileCols, rows,
                       smaller<int64_t>(cols - n, kTileCols), block, c + n, c_stride,
                       accumulate || k > 0);
      }
    }
  }

  // Rows of a packed panel that count as zero, whatever was packed.
  static void clear(float* panel, int64_t k) {
    for (int v = 0; v < kTileVectors; ++v) store(panel + k * kTileCols + v * kLanes, splat(0.0f));
  }

  // A float32 block [depth, rows] as a left side read by columns, and a block [rows, depth] as one
  // read by rows. An operand that needs another form is written to `to`, which may be the block
  // itself where the strides agree.
  static Left columns(const float* block, int64_t stride, int64_t, int64_t, float*, int64_t) {
    return {block, 1, stride};
  }
  static Left rows(const float* block, int64_t stride, int64_t, int64_t, float*, int64_t) {
    return {block, stride, 1};
  }
};

}  // namespace
}  // namespace tk::TK_ISA

#if defined(__AVX512BF16__)
#include "cpu/gemm_pairs.h"
#endif
