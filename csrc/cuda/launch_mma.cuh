// What launch.cuh means on a GPU, fourth part: products of small matrices on the tensor cores, one
// warp at a time.
#pragma once

#include "tokenkernels.h"

namespace tk::cuda {

template <int count, bool transposed>
__device__ void load_matrices(uint32_t (&to)[count], const void* row) {
  static_assert(count == 1 || count == 2 || count == 4);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (count == 1 && !transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (count == 2 && !transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}

// One instruction for each kind of numbers; the registers are the same.
#define TK_PRODUCT(kind)                                                                          \
  asm("mma.sync.aligned." kind " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
__device__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void multiply_add<BFloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  TK_PRODUCT("m16n8k16.row.col.f32.bf16.bf16.f32");
}

template <>
__device__ inline void multiply_add<Half>(float (&sum)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  TK_PRODUCT("m16n8k16.row.col.f32.f16.f16.f32");
}

template <>
__device__ inline void multiply_add<float>(float (&sum)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2]) {
  TK_PRODUCT("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef TK_PRODUCT

__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace tk::cuda
