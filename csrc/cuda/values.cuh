// Values of rows in any dtype: vectors of 16 bytes, or one by one where a row does not allow them,
// which puts the same values into the same lanes.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

template <class T>
constexpr int kPerVector = 16 / sizeof(T);

// Values column … column + kPerVector − 1 of a row: at once, or those that are there one by one.
template <class T, bool wide>
__device__ Vector<T, kPerVector<T>> load_part(const T* row, int64_t column, int64_t channels) {
  using V = Vector<T, kPerVector<T>>;
  if constexpr (wide) return load<V, kReadOnly>(row + column);
  V part = {};
#pragma unroll
  for (int v = 0; v < V::kCount; ++v) {
    if (column + v < channels) part.at[v] = load<T, kReadOnly>(row + column + v);
  }
  return part;
}

// Element `at` of scores.
__device__ inline float score_of(const void* scores, DType dtype, int64_t at) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(scores)[at];
  const uint16_t bits = static_cast<const uint16_t*>(scores)[at];
  return dtype == DType::kFloat16 ? widen(Half{bits}) : widen(BFloat16{bits});
}

}  // namespace tk::cuda
