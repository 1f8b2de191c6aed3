// What launch.cuh means on the CPU, third part: the tensor cores of a warp.
#pragma once

#include "cuda_on_host/launch_host.h"

namespace tk::cuda {

namespace host {

void load_matrices(uint32_t* to, int count, bool transposed, const void* row, Site site);
void multiply_add(float* sum, const uint32_t* a, const uint32_t* b, DType kind, Site site);

}  // namespace host

template <int count, bool transposed>
TK_INLINE void load_matrices(uint32_t (&to)[count], const void* row, TK_SITE) {
  static_assert(count == 1 || count == 2 || count == 4);
  host::load_matrices(to, count, transposed, row, site);
}

template <class T>
TK_INLINE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            TK_SITE) {
  constexpr DType kind = sizeof(T) == 4                ? DType::kFloat32
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                       : DType::kFloat16;
  host::multiply_add(sum, a, b, kind, site);
}

// To the nearest of 10 bits, ties away from zero.
TK_INLINE uint32_t to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits & ~0x1fffu;
}

}  // namespace tk::cuda
