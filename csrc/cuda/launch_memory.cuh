// What launch.cuh means on a GPU, second part: vector loads and stores, atomics, waiting.
#pragma once

#include "cuda/launch_gpu.cuh"

namespace tk::cuda {
namespace detail {

template <int bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using Type = unsigned char;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

__device__ inline uint4 load_past_l1(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return v;
}

__device__ inline uint2 load_past_l1(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return v;
}

__device__ inline unsigned load_past_l1(const unsigned* from) {
  unsigned v;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];"
               : "=r"(v)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return v;
}

template <class Word>
__device__ Word load_past_l1(const Word* from) {
  return *from;
}

template <class T>
__device__ auto* wide(T* to) {  // the type of CUDA's own 64-bit atomics
  if constexpr (sizeof(T) == 8)
    return reinterpret_cast<unsigned long long*>(to);
  else
    return to;
}

}  // namespace detail

template <class V, Hint hint = kKeep>
__device__ V load(const void* from) {
  using Word = typename detail::WordOf<sizeof(V)>::Type;
  const auto* source = static_cast<const Word*>(from);
  Word word;
  if constexpr (hint == kStream) {
    word = __ldcs(source);
  } else if constexpr (hint == kReadOnly) {
    word = __ldg(source);
  } else if constexpr (hint == kNoAllocate) {
    word = detail::load_past_l1(source);
  } else {
    word = *source;
  }
  V result;
  memcpy(&result, &word, sizeof result);
  return result;
}

template <Hint hint = kKeep, class V>
__device__ void store(void* to, const V& value) {
  using Word = typename detail::WordOf<sizeof(V)>::Type;
  Word word;
  memcpy(&word, &value, sizeof word);
  if constexpr (hint == kStream) {
    __stcs(static_cast<Word*>(to), word);
  } else {
    *static_cast<Word*>(to) = word;
  }
}

// Atomics, relaxed, on the whole device: they give what was there before. T: int32_t, uint32_t,
// int64_t, uint64_t.
template <class T>
__device__ T atomic_add(T* to, T value) {
  auto* place = detail::wide(to);
  return static_cast<T>(atomicAdd(place, static_cast<decltype(*place + 0)>(value)));
}

template <class T>
__device__ T atomic_min(T* to, T value) {
  if constexpr (sizeof(T) == 8 && T(-1) < T(0))
    return static_cast<T>(atomicMin(reinterpret_cast<long long*>(to), (long long)value));
  else
    return static_cast<T>(atomicMin(detail::wide(to), value));
}

template <class T>
__device__ T atomic_max(T* to, T value) {
  if constexpr (sizeof(T) == 8 && T(-1) < T(0))
    return static_cast<T>(atomicMax(reinterpret_cast<long long*>(to), (long long)value));
  else
    return static_cast<T>(atomicMax(detail::wide(to), value));
}

template <class T>
__device__ T atomic_or(T* to, T value) {
  return static_cast<T>(atomicOr(detail::wide(to), value));
}

template <class T>
__device__ T atomic_exchange(T* to, T value) {
  return static_cast<T>(atomicExch(detail::wide(to), value));
}

template <class T>
__device__ T atomic_compare_exchange(T* to, T expected, T value) {
  return static_cast<T>(atomicCAS(detail::wide(to), expected, value));
}

// Words that one block writes and another reads, of 4 or 8 bytes. What was written before a
// store_release is there after the load_acquire that sees it.
template <class T>
__device__ T load_acquire(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.acquire.gpu.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  else
    asm volatile("ld.acquire.gpu.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

template <class T>
__device__ T load_relaxed(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.relaxed.gpu.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  else
    asm volatile("ld.relaxed.gpu.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

template <class T>
__device__ void store_release(T* to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4)
    asm volatile("st.release.gpu.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
  else
    asm volatile("st.release.gpu.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

template <class T>
__device__ void store_relaxed(T* to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4)
    asm volatile("st.relaxed.gpu.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
  else
    asm volatile("st.relaxed.gpu.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

// Everything written before is seen by whoever sees what is written after.
__device__ inline void fence() { __threadfence(); }

// Spins until condition() holds; it reads with load_acquire what a block with a lower ticket
// writes.
template <class Condition>
__device__ void wait_until(const Condition& condition) {
  while (!condition()) {
  }
}

}  // namespace tk::cuda
