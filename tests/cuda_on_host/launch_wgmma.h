// What launch.cuh means on the CPU, fourth part: the tensor cores of a group of four warps.
#pragma once

#include "cuda_on_host/launch_copies.h"

namespace tk::cuda {

namespace host {

GroupProducts group_products_here();
uint32_t shared_address(const void* place);
void fence_registers(const void* from, size_t bytes);
void multiply_add_group(const Factors& factors, float* sums, const uint32_t* left, Site site);
void commit_products();
void wait_products(int left);

template <class T>
constexpr Number number_of() {
  return sizeof(T) == 4 ? Number::kTf32 : std::is_same_v<T, Half> ? Number::kFp16 : Number::kBf16;
}

}  // namespace host

namespace detail {

TK_INLINE uint32_t shared_address(const void* place) { return host::shared_address(place); }

}  // namespace detail

constexpr bool kGroupProducts = true;
inline GroupProducts group_products() { return host::group_products_here(); }

TK_INLINE int group() { return thread() / kGroup; }

template <class... Registers>
TK_INLINE void fence_products(Registers&... registers) {
  (host::fence_registers(&registers, sizeof registers), ...);
}

template <class T, int N, bool transposed = false, bool across = false>
TK_INLINE void multiply_add_group(float (&sums)[N / 8][4], uint64_t left, uint64_t right,
                                  bool add = true, TK_SITE) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
  static_assert(sizeof(T) == 2 || !(transposed || across));
  host::multiply_add_group({host::number_of<T>(), N, transposed, across, add, false, left, right},
                           sums[0], nullptr, site);
}

template <class T, int N, bool transposed = false>
TK_INLINE void multiply_add_group(float (&sums)[N / 8][4], const uint32_t (&left)[4],
                                  uint64_t right, bool add = true, TK_SITE) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256);
  static_assert(sizeof(T) == 2 || !transposed);
  host::multiply_add_group({host::number_of<T>(), N, transposed, false, add, true, 0, right},
                           sums[0], left, site);
}

TK_INLINE void commit_products() { host::commit_products(); }

template <int left, class... Registers>
TK_INLINE void wait_products(Registers&...) {
  host::wait_products(left);
}

}  // namespace tk::cuda
