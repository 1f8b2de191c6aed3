// Rows added up by one warp, in an order that follows from their number alone.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

constexpr int kRowsInFlight = 4;  // that a lane has asked for before it uses the first

// Adds up rows begin … end − 1, of which row(i) gives the first of `columns` columns, and calls
// land(column, sum). Teams of `span` lanes take row after row, 16 bytes of it each, then the teams
// are added up: the same lanes in the same order, whatever the alignment.
template <class T, bool kVectors, Hint hint, class Row, class Land>
__device__ void sum_rows(int64_t begin, int64_t end, int64_t columns, int64_t stride,
                         const Row& row, const Land& land) {
  constexpr int kWide = 16 / sizeof(T);
  using V = Vector<T, kWide>;
  int span = 1;
  while (span < kWarp && int64_t{span} * kWide < columns) span *= 2;
  const int teams = kWarp / span, team = lane() / span;
  const int64_t mine = int64_t{lane() % span} * kWide;
  float sums[kWide] = {};
  for (int64_t i = begin + team; i < end; i += int64_t{kRowsInFlight} * teams) {
    V values[kRowsInFlight] = {};
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t number = i + int64_t{j} * teams;
      if (number >= end || mine >= columns) continue;
      const T* from = row(number) + mine * stride;
      if constexpr (kVectors) {
        values[j] = load<V, hint>(from);
      } else {
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
          if (mine + w < columns) values[j].at[w] = load<T, hint>(from + w * stride);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
#pragma unroll
      for (int w = 0; w < kWide; ++w) sums[w] += widen(values[j].at[w]);
    }
  }
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
    for (int with = span; with < kWarp; with *= 2) sums[w] += shuffle_xor(sums[w], with);
    if (team == 0 && mine + w < columns) land(mine + w, sums[w]);
  }
}

}  // namespace tk::cuda
