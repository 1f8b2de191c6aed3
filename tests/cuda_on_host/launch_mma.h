// What launch.cuh means on the CPU, third part: the tensor cores of a warp.
#pragma once

#include "cuda_on_host/launch_host.h"

namespace tk::cuda {

namespace host {

void load_matrices(uint32_t* to, int count, bool transposed, const void* row, Site site);
void settle_product_bf16(Exchanges lanes, uint32_t mask);
void settle_product_fp16(Exchanges lanes, uint32_t mask);
void settle_product_tf32(Exchanges lanes, uint32_t mask);

}  // namespace host

template <int count, bool transposed>
TK_INLINE void load_matrices(uint32_t (&to)[count], const void* row, TK_SITE) {
  static_assert(count == 1 || count == 2 || count == 4);
  host::load_matrices(to, count, transposed, row, site);
}

template <class T>
TK_INLINE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            TK_SITE) {
  host::Exchange give{};
  give.operands[0] = a;
  give.operands[1] = b;
  give.operands[2] = sum;
  const host::Settle settle = sizeof(T) == 4                ? host::settle_product_tf32
                              : std::is_same_v<T, BFloat16> ? host::settle_product_bf16
                                                            : host::settle_product_fp16;
  host::exchange("multiply_add", settle, kAllLanes, site, give);
}

// To the nearest of 10 bits, ties away from zero.
TK_INLINE uint32_t to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits & ~0x1fffu;
}

}  // namespace tk::cuda
