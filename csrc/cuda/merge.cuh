// What both merges do with token rows on a GPU: a warp takes 16 bytes per lane, several rows at a
// time; lanes keep their channels whatever the alignment.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

constexpr int kRowsInFlight = 4;  // loads that a lane has asked for before it uses the first
constexpr float kSmallestNorm = 1e-8f;

template <class T>
constexpr int kWide = 16 / sizeof(T);
template <class T>
using Piece = Vector<T, kWide<T>>;

// What a warp takes of a row at a time.
template <class T>
constexpr int64_t kStep = int64_t{kWarp} * kWide<T>;

// Channels c … of a row; zeros behind the last one.
template <class T, bool kVectors>
__device__ Piece<T> load_piece(const T* row, int64_t c, int64_t channels) {
  Piece<T> piece = {};
  if constexpr (kVectors) {
    if (c < channels) piece = load<Piece<T>, kReadOnly>(row + c);
  } else {
#pragma unroll
    for (int w = 0; w < kWide<T>; ++w) {
      if (c + w < channels) piece.at[w] = load<T, kReadOnly>(row + c + w);
    }
  }
  return piece;
}

template <class T, bool kVectors>
__device__ void store_piece(T* row, int64_t c, int64_t channels, const Piece<T>& piece) {
  if constexpr (kVectors) {
    if (c < channels) store<kStream>(row + c, piece);
  } else {
#pragma unroll
    for (int w = 0; w < kWide<T>; ++w) {
      if (c + w < channels) row[c + w] = piece.at[w];
    }
  }
}

// One row as it is, or zeros where `from` is null; by a warp.
template <class T, bool kVectors>
__device__ void copy_row(T* to, const T* from, int64_t channels) {
  const int64_t mine = lane() * kWide<T>;
  for (int64_t c = 0; c < channels; c += kRowsInFlight * kStep<T>) {
    Piece<T> pieces[kRowsInFlight] = {};
    if (from != nullptr) {
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i)
        pieces[i] = load_piece<T, kVectors>(from, c + mine + i * kStep<T>, channels);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i)
      store_piece<T, kVectors>(to, c + mine + i * kStep<T>, channels, pieces[i]);
  }
}

// The mean Σ weight · row / total of the `count` rows that a walk gives from `start` on; by a warp.
template <class T, bool kVectors, class Walk>
__device__ void mean_row(T* to, float total, int64_t channels, int64_t count, const Walk& start) {
  for (int64_t c = lane() * kWide<T>; c < channels; c += kStep<T>) {
    float sums[kWide<T>] = {};
    Walk at = start;
    for (int64_t first = 0; first < count; first += kRowsInFlight) {
      Piece<T> pieces[kRowsInFlight] = {};
      float weights[kRowsInFlight] = {};
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (first + i < count) {
          pieces[i] = load_piece<T, kVectors>(at.row(), c, channels);
          weights[i] = at.weight();
          at.next();
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
#pragma unroll
        for (int w = 0; w < kWide<T>; ++w) sums[w] += widen(pieces[i].at[w]) * weights[i];
      }
    }
    Piece<T> mean;
#pragma unroll
    for (int w = 0; w < kWide<T>; ++w) mean.at[w] = narrow<T>(sums[w] / total);
    store_piece<T, kVectors>(to, c, channels, mean);
  }
}

// The sizes of any merge.
template <class Params>
__device__ float size_of_token(const Params& p, int64_t image, int64_t position) {
  return p.size == nullptr ? 1.0f
                           : p.size[image * p.size_batch_stride + position * p.size_token_stride];
}

template <class T, class Params>
__device__ const T* row_of_token(const Params& p, int64_t image, int64_t position) {
  return static_cast<const T*>(p.x) + image * p.batch_stride + position * p.token_stride;
}

__device__ inline float norm_of(float square) {
  const float norm = sqrtf(square);
  return norm > kSmallestNorm ? norm : kSmallestNorm;
}

// Whether all rows, read and written, begin where 16 bytes move at once, and end there.
template <class Params>
bool moves_pieces(const Params& p) {
  const auto from = reinterpret_cast<uintptr_t>(p.x), to = reinterpret_cast<uintptr_t>(p.tokens);
  const int64_t places = (p.channels | p.batch_stride | p.token_stride) * size_of(p.dtype);
  return (places | static_cast<int64_t>(from | to)) % 16 == 0;
}

}  // namespace tk::cuda
