// Products of tiles in shared memory on the tensor cores, one warp at a time, in any dtype.
//
// A tile has rows of `stride` elements (tile_stride: eight neighbouring rows lie in different
// banks). Operands of 16 bits are multiplied as they are. float32 is split into two parts of
// 11 bits, hi and lo, and three products are taken, hi·hi + hi·lo + lo·hi, summed over at most 64
// terms on the tensor core and then added in float32: what is left out, lo·lo and the rounding of
// lo, is 2⁻²² of a product, no more than float32 itself loses.
//
//   float sums[I][J][4] = {};                          // 16·I rows × 8·J columns of this warp
//   add_product<T>(sums, left, stride, right, stride, depth);
//
// adds left (16·I, depth) · right (8·J, depth)ᵀ; kAcross says that an operand lies the other way
// round, (depth, 16·I) or (depth, 8·J). Sums are laid out as PTX lays out m16n8: for_sums gives row
// and column of each. As the left operand of a second product they go through `parts_of_sums`.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

template <class T>
constexpr int kDepth = 32 / sizeof(T);  // terms that one multiply_add sums

// Elements between the rows of a tile of `columns`: an odd number of 16 bytes.
template <class T>
__host__ __device__ constexpr int tile_stride(int columns) {
  constexpr int each = 16 / sizeof(T);
  return ((columns + each - 1) / each | 1) * each;
}

// How a tile lies in shared memory: with its depth along the rows, or across them.
enum Lies { kAlong, kAcross };

// The registers of an operand; of float32 both its parts.
template <class T, int count>
struct Parts {
  uint32_t high[count];
};
template <int count>
struct Parts<float, count> {
  uint32_t high[count], low[count];
};

__device__ inline float float_of_word(uint32_t word) {
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

// Two numbers in one register, the first in the low half.
template <class T>
__device__ uint32_t pair_of(float first, float second) {
  return uint32_t{narrow<T>(first).bits} | uint32_t{narrow<T>(second).bits} << 16;
}

template <int count>
__device__ void split(Parts<float, count>& parts, int at, float value) {
  parts.high[at] = to_tf32(value);
  const float high = float_of_word(parts.high[at]);
  // What is not finite is the second part alone: beside it, zeros of the other operand's would make
  // NaN of it.
  const uint32_t low = to_tf32(value - high);
  const bool finite = high - high == 0.0f;
  parts.low[at] = finite ? low : parts.high[at];
  parts.high[at] = finite ? parts.high[at] : 0;
}

// 16 rows of the left operand from `row`, kDepth terms from `term`.
template <class T, Lies lies>
__device__ void load_left(Parts<T, 4>& to, const T* tile, int stride, int row, int term) {
  const int in_row = lane() % 8 + lane() / 8 % 2 * 8, half = lane() / 16;
  if constexpr (lies == kAlong) {
    uint32_t words[4];
    load_matrices<4, false>(words, tile + (row + in_row) * stride + term + half * (16 / sizeof(T)));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4)
        split(to, i, float_of_word(words[i]));
      else
        to.high[i] = words[i];
    }
  } else if constexpr (sizeof(T) == 2) {
    const int along = lane() % 8 + half * 8;
    load_matrices<4, true>(to.high, tile + (term + along) * stride + row + lane() / 8 % 2 * 8);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      split(to, i, tile[(term + lane() % 4 + i / 2 * 4) * stride + row + lane() / 4 + i % 2 * 8]);
  }
}

// In which order float32 terms meet: as they lie, or as sums of a product hold them (term 2i in
// place of i, 2i + 1 in place of i + 4).
enum Terms { kInOrder, kAsSums };

// 8 columns of the right operand from `column`, kDepth terms from `term`.
template <class T, Lies lies, Terms terms = kInOrder>
__device__ void load_right(Parts<T, 2>& to, const T* tile, int stride, int column, int term) {
  if constexpr (sizeof(T) == 2) {
    const int eighth = lane() % 8, half = lane() / 8 % 2 * 8;
    if constexpr (lies == kAlong)
      load_matrices<2, false>(to.high, tile + (column + eighth) * stride + term + half);
    else
      load_matrices<2, true>(to.high, tile + (term + eighth + half) * stride + column);
  } else if constexpr (lies == kAlong && terms == kInOrder) {
    uint32_t words[2];
    load_matrices<2, false>(words,
                            tile + (column + lane() % 8) * stride + term + lane() / 8 % 2 * 4);
    split(to, 0, float_of_word(words[0]));
    split(to, 1, float_of_word(words[1]));
  } else {
    const int along = column + lane() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = term + (terms == kAsSums ? lane() % 4 * 2 + i : lane() % 4 + i * 4);
      split(to, i, lies == kAlong ? tile[along * stride + k] : tile[k * stride + along]);
    }
  }
}

template <class T>
__device__ void multiply(float (&sum)[4], const Parts<T, 4>& left, const Parts<T, 2>& right) {
  if constexpr (sizeof(T) == 4) {
    multiply_add<T>(sum, left.low, right.high);
    multiply_add<T>(sum, left.high, right.low);
  }
  multiply_add<T>(sum, left.high, right.high);
}

// Terms of float32 whose sum the tensor core may keep: it truncates where float32 rounds.
constexpr int kKept = 64;

// sums += left · rightᵀ; load(parts, i, term) gives 16 rows of the left operand.
template <class T, Lies right_lies, Terms terms, int I, int J, class Load>
__device__ void add_loaded(float (&sums)[I][J][4], const Load& load_rows, const T* right,
                           int right_stride, int depth) {
  const auto add = [&](float (&to)[I][J][4], int begin, int end) {
#pragma unroll
    for (int term = begin; term < end; term += kDepth<T>) {
      Parts<T, 4> left[I];
#pragma unroll
      for (int i = 0; i < I; ++i) load_rows(left[i], i, term);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        Parts<T, 2> column;
        load_right<T, right_lies, terms>(column, right, right_stride, 8 * j, term);
#pragma unroll
        for (int i = 0; i < I; ++i) multiply<T>(to[i][j], left[i], column);
      }
    }
  };
  if constexpr (sizeof(T) == 2) {
    add(sums, 0, depth);
  } else {
    for (int begin = 0; begin < depth; begin += kKept) {
      float some[I][J][4] = {};
      add(some, begin, begin + kKept < depth ? begin + kKept : depth);
#pragma unroll
      for (int i = 0; i < I; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
          for (int v = 0; v < 4; ++v) sums[i][j][v] += some[i][j][v];
    }
  }
}

// sums += left · rightᵀ of tiles; `depth` is a multiple of kDepth, rows are multiples of 16 bytes.
template <class T, Lies left_lies = kAlong, Lies right_lies = kAlong, int I, int J>
__device__ void add_product(float (&sums)[I][J][4], const T* left, int left_stride, const T* right,
                            int right_stride, int depth) {
  add_loaded<T, right_lies, kInOrder>(
      sums,
      [&](Parts<T, 4>& to, int i, int term) {
        load_left<T, left_lies>(to, left, left_stride, 16 * i, term);
      },
      right, right_stride, depth);
}

// Sums as 16 rows of a left operand: column `term` and the next of them are its terms.
template <class T, int J>
__device__ void parts_of_sums(Parts<T, 4>& to, const float (&sums)[J][4], int term) {
  if constexpr (sizeof(T) == 2) {
    const auto &first = sums[term / 8], &second = sums[term / 8 + 1];
    to.high[0] = pair_of<T>(first[0], first[1]);
    to.high[1] = pair_of<T>(first[2], first[3]);
    to.high[2] = pair_of<T>(second[0], second[1]);
    to.high[3] = pair_of<T>(second[2], second[3]);
  } else {
    const auto& some = sums[term / 8];
    split(to, 0, some[0]);
    split(to, 1, some[2]);
    split(to, 2, some[1]);
    split(to, 3, some[3]);
  }
}

// sums += given · rightᵀ, where `given` are sums of an earlier product, rounded to T.
template <class T, Lies right_lies = kAlong, int I, int J, int K>
__device__ void add_product_of_sums(float (&sums)[I][J][4], const float (&given)[I][K][4],
                                    const T* right, int right_stride) {
  static_assert(K * 8 % kDepth<T> == 0);
  add_loaded<T, right_lies, kAsSums>(
      sums, [&](Parts<T, 4>& to, int i, int term) { parts_of_sums<T>(to, given[i], term); }, right,
      right_stride, 8 * K);
}

// body(sum, row, column) for each of this lane's sums of a warp's tile.
template <int I, int J, class Body>
__device__ void for_sums(float (&sums)[I][J][4], const Body& body) {
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v)
        body(sums[i][j][v], 16 * i + lane() / 4 + v / 2 * 8, 8 * j + lane() % 4 * 2 + v % 2);
}

// Whether rows of a matrix can be fetched 16 bytes at a time.
template <class T>
__host__ __device__ bool fetches_wide(const void* from, int64_t row_stride, int64_t columns) {
  const auto place = static_cast<int64_t>(reinterpret_cast<intptr_t>(from));
  return ((place | (row_stride | columns) * int64_t{sizeof(T)}) & 15) == 0;
}

// Asks for a tile of `tile_rows` × `tile_columns` (whole 16 bytes), zeros beyond the `rows` ×
// `columns` that are there; row(r) gives the address of row r. All threads of the block call, then
// commit_copies(), wait_copies and sync().
template <class T, class Row>
__device__ void fetch_rows(T* tile, int stride, int tile_rows, int tile_columns, int64_t rows,
                           int64_t columns, bool wide, const Row& row) {
  constexpr int each = 16 / sizeof(T);
  if (wide) {
    const int across = tile_columns / each;
    for (int at = thread(); at < tile_rows * across; at += threads()) {
      const int r = at / across, c = at % across * each;
      const bool there = r < rows && c < columns;
      copy_async<16>(tile + r * stride + c, row(there ? r : 0) + (there ? c : 0), there);
    }
    return;
  }
  for (int at = thread(); at < tile_rows * tile_columns; at += threads()) {
    const int r = at / tile_columns, c = at % tile_columns;
    const bool there = r < rows && c < columns;
    if constexpr (sizeof(T) == 4)
      copy_async<4>(tile + r * stride + c, row(there ? r : 0) + (there ? c : 0), there);
    else
      tile[r * stride + c] = there ? row(r)[c] : T{};
  }
}

// The same of a matrix whose rows lie `row_stride` apart.
template <class T>
__device__ void fetch_tile(T* tile, int stride, int tile_rows, int tile_columns, const T* from,
                           int64_t row_stride, int64_t rows, int64_t columns, bool wide) {
  fetch_rows(tile, stride, tile_rows, tile_columns, rows, columns, wide,
             [=](int r) { return from + r * row_stride; });
}

}  // namespace tk::cuda
