// Rows added up by one warp, in an order that follows from their number alone.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

constexpr int kRowsInFlight = 4;  // that a lane has asked for before it uses the first

// Sixteen bytes as they come: halves are told apart only when they are added, so that they share
// registers until then.
using Packed = Vector<uint32_t, 4>;

template <class T>
__device__ float element(const Packed& packed, int at) {
  T value;
  if constexpr (sizeof(T) == 4) {
    memcpy(&value, &packed.at[at], sizeof value);
  } else {
    value.bits = static_cast<uint16_t>(packed.at[at / 2] >> (at % 2 * 16));
  }
  return widen(value);
}

template <class T>
__device__ void set_element(Packed& packed, int at, T value) {
  if constexpr (sizeof(T) == 4) {
    memcpy(&packed.at[at], &value, sizeof value);
  } else {
    packed.at[at / 2] |= uint32_t{value.bits} << (at % 2 * 16);
  }
}

// Adds up rows begin … end − 1, of which row(i) gives the first of `columns` columns, and calls
// land(column, sum). Teams of `span` lanes take row after row, 16 bytes of it each, then the teams
// are added up: the same lanes in the same order, whatever the alignment.
template <class T, bool kVectors, Hint hint, class Row, class Land>
__device__ void sum_rows(int begin, int end, int64_t columns, int64_t stride, const Row& row,
                         const Land& land) {
  constexpr int kWide = 16 / sizeof(T);
  int span = 1;
  while (span < kWarp && int64_t{span} * kWide < columns) span *= 2;
  const int teams = kWarp / span, team = lane() / span;
  const int64_t mine = int64_t{lane() % span} * kWide;
  float sums[kWide] = {};
  for (int i = begin + team; i < end; i += kRowsInFlight * teams) {
    Packed values[kRowsInFlight] = {};
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int number = i + j * teams;
      if (number >= end || mine >= columns) continue;
      const T* from = row(number) + mine * stride;
      if constexpr (kVectors) {
        values[j] = load<Packed, hint>(from);
      } else {
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
          if (mine + w < columns) set_element(values[j], w, load<T, hint>(from + w * stride));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
#pragma unroll
      for (int w = 0; w < kWide; ++w) sums[w] += element<T>(values[j], w);
    }
  }
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
    for (int with = span; with < kWarp; with *= 2) sums[w] += shuffle_xor(sums[w], with);
    if (team == 0 && mine + w < columns) land(mine + w, sums[w]);
  }
}

}  // namespace tk::cuda
