// What launch.cuh means on a GPU: its primitives in CUDA, compiled by nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "tokenkernels.h"

namespace tk::cuda {

// Launches.

constexpr int kDevices = 64;

// The shared memory that a block of this GPU may have.
inline int64_t most_shared() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess)
    return 48 * 1024;
  return bytes;
}

// A fact about a kernel on the current GPU, asked once: where two threads ask at a time, both get
// the same answer.
template <class Ask>
int known_of_device(int (&known)[kDevices], const Ask& ask) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return ask();
  int answer = __atomic_load_n(&known[device], __ATOMIC_RELAXED);
  if (answer == 0) {
    answer = ask();
    cudaGetLastError();  // a refusal is an answer, and no fault of the next call
    __atomic_store_n(&known[device], answer, __ATOMIC_RELAXED);
  }
  return answer;
}

// Blocks that may borrow more than 48 KB have to say so, once per kernel and device: then all there
// is.
template <auto kernel>
bool allow_shared(int64_t bytes) {
  static int allowed[kDevices] = {};
  if (bytes <= 48 * 1024) return true;
  return known_of_device(allowed, [] {
           return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(most_shared())) == cudaSuccess
                      ? 1
                      : -1;
         }) > 0;
}

template <auto kernel, class... Args>
const char* launch(const Launch& how, Args&&... args) {
  if (how.blocks == 0 || how.blocks_y == 0 || how.blocks_z == 0) return nullptr;
  if (how.blocks > INT32_MAX || how.blocks_y > UINT16_MAX || how.blocks_z > UINT16_MAX)
    return "more blocks than a grid can have";
  if (!allow_shared<kernel>(how.shared)) return "blocks get no more than 48 KB of shared memory";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks), static_cast<unsigned>(how.blocks_y),
                        static_cast<unsigned>(how.blocks_z));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared);
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(how.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
  if (error != cudaSuccess) cudaGetLastError();  // reported here: the next call is not to blame
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The most blocks of a cluster of this kernel: one where it was compiled for a GPU without
// clusters.
template <auto kernel>
int most_cluster() {
  static int most[kDevices] = {};
  return known_of_device(most, [] {
    cudaFuncAttributes found{};
    return cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.ptxVersion >= 90 ? 8 : 1;
  });
}

// Bytes set to zero in the order of the stream.
inline const char* zero(void* to, int64_t bytes, void* stream) {
  if (bytes == 0) return nullptr;
  const cudaError_t error =
      cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// How many blocks of a persistent grid find a place of their own: the multiprocessors of this GPU.
inline int64_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

// Coordinates and barriers.

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int threads() { return static_cast<int>(blockDim.x); }
__device__ inline int lane() { return thread() % kWarp; }
__device__ inline int64_t block() { return blockIdx.x; }
__device__ inline int64_t block_y() { return blockIdx.y; }
__device__ inline int64_t block_z() { return blockIdx.z; }
__device__ inline int64_t blocks() { return gridDim.x; }

__device__ inline void sync() { __syncthreads(); }
__device__ inline int sync_count(bool condition) { return __syncthreads_count(condition); }
__device__ inline bool sync_any(bool condition) { return __syncthreads_or(condition) != 0; }
__device__ inline bool sync_all(bool condition) { return __syncthreads_and(condition) != 0; }

namespace detail {

constexpr int64_t kGap = 0;

__device__ inline void* shared_array(int64_t at, int64_t) {
  extern __shared__ __align__(1024) unsigned char arena[];
  return arena + at;
}

// A value as 32-bit words, for what moves words only.
template <class T>
struct Words {
  static constexpr int kCount = (sizeof(T) + 3) / 4;
  uint32_t at[kCount] = {};
  __device__ explicit Words(const T& value) { memcpy(at, &value, sizeof value); }
  __device__ T value() const {
    T result;
    memcpy(&result, at, sizeof result);
    return result;
  }
};

template <class T, class Move>
__device__ T by_words(const T& value, const Move& move) {
  Words<T> words(value);
#pragma unroll
  for (int i = 0; i < Words<T>::kCount; ++i) words.at[i] = move(words.at[i]);
  return words.value();
}

}  // namespace detail

// Warps.

__device__ inline void warp_sync(Lanes mask = kAllLanes) { __syncwarp(mask); }

template <class T>
__device__ T shuffle(const T& value, int from, Lanes mask = kAllLanes) {
  return detail::by_words(value, [=](uint32_t w) { return __shfl_sync(mask, w, from); });
}

template <class T>
__device__ T shuffle_up(const T& value, int by, Lanes mask = kAllLanes) {
  return detail::by_words(
      value, [=](uint32_t w) { return __shfl_up_sync(mask, w, static_cast<unsigned>(by)); });
}

template <class T>
__device__ T shuffle_down(const T& value, int by, Lanes mask = kAllLanes) {
  return detail::by_words(
      value, [=](uint32_t w) { return __shfl_down_sync(mask, w, static_cast<unsigned>(by)); });
}

template <class T>
__device__ T shuffle_xor(const T& value, int with, Lanes mask = kAllLanes) {
  return detail::by_words(value, [=](uint32_t w) { return __shfl_xor_sync(mask, w, with); });
}

__device__ inline Lanes ballot(bool condition, Lanes mask = kAllLanes) {
  return __ballot_sync(mask, condition);
}

template <class T>
__device__ Lanes match(T value, Lanes mask = kAllLanes) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) return __match_any_sync(mask, static_cast<uint32_t>(value));
  return __match_any_sync(mask, static_cast<unsigned long long>(value));
}

// Of int32_t or uint32_t.
template <class T>
__device__ T reduce_add(T value, Lanes mask = kAllLanes) {
  return __reduce_add_sync(mask, value);
}
template <class T>
__device__ T reduce_min(T value, Lanes mask = kAllLanes) {
  return __reduce_min_sync(mask, value);
}
template <class T>
__device__ T reduce_max(T value, Lanes mask = kAllLanes) {
  return __reduce_max_sync(mask, value);
}
__device__ inline uint32_t reduce_and(uint32_t value, Lanes mask = kAllLanes) {
  return __reduce_and_sync(mask, value);
}
__device__ inline uint32_t reduce_or(uint32_t value, Lanes mask = kAllLanes) {
  return __reduce_or_sync(mask, value);
}

// Bits of a word.
__device__ inline int count_bits(uint32_t word) { return __popc(word); }
__device__ inline int lowest_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }
__device__ inline int highest_bit(uint32_t word) { return 31 - __clz(static_cast<int>(word)); }

// Numbers.

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(uint32_t{value.bits} << 16);
}
__device__ inline float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
__device__ T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline Half narrow<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// A product that is rounded before anything is added to it.
__device__ inline float rounded_product(float left, float right) { return __fmul_rn(left, right); }

// 2^value to two units in the last place; 0 where that is below 2^-126.
__device__ inline float exp2_flushed(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

}  // namespace tk::cuda
