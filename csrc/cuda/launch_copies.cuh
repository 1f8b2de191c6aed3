// What launch.cuh means on a GPU, third part: copies that run beside the threads, and clusters of
// blocks that see each other's shared memory. Before Hopper, bulk copies are made by the lanes
// themselves and a cluster is one block.
#pragma once

#include "cuda/launch_memory.cuh"

namespace tk::cuda {
namespace detail {

__device__ inline uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

}  // namespace detail

// Copies of one thread.

template <int bytes>
__device__ void copy_async(void* to, const void* from, bool take = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const int taken = take ? bytes : 0;
  const size_t source = __cvta_generic_to_global(from);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(to)),
                 "l"(source), "r"(taken)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(detail::shared_address(to)),
                 "l"(source), "n"(bytes), "r"(taken)
                 : "memory");
  }
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int left>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Gates.

__device__ inline void init_gate(Gate* gate, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(detail::shared_address(gate)),
               "r"(arrivals)
               : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void arrive(Gate* gate) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(
                   detail::shared_address(gate))
               : "memory");
}

__device__ inline void wait_gate(Gate* gate, uint32_t phase) {
  uint32_t open = 0;
  while (open == 0) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p;}"
        : "=r"(open)
        : "r"(detail::shared_address(gate)), "r"(phase & 1)
        : "memory");
#else
    asm volatile(
        "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p;}"
        : "=r"(open)
        : "r"(detail::shared_address(gate)), "r"(phase & 1)
        : "memory");
#endif
  }
}

// Copies of one warp.

namespace detail {

__device__ inline void copy_by_lanes(void* to, const void* from, int64_t bytes) {
  for (int64_t at = lane() * 16; at < bytes; at += kWarp * 16) {
    store(static_cast<char*>(to) + at,
          load<Vector<uint32_t, 4>>(static_cast<const char*>(from) + at));
  }
}

}  // namespace detail

__device__ inline void copy_bulk(void* to, const void* from, int64_t bytes, Gate* gate) {
#if __CUDA_ARCH__ >= 900
  if (lane() == 0) {
    asm volatile(
        "{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(
            detail::shared_address(gate)),
        "r"(static_cast<uint32_t>(bytes))
        : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(detail::shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(static_cast<uint32_t>(bytes)),
        "r"(detail::shared_address(gate))
        : "memory");
  }
#else
  detail::copy_by_lanes(to, from, bytes);
  __syncwarp();
  if (lane() == 0) arrive(gate);
#endif
}

__device__ inline void store_bulk(void* to, const void* from, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (lane() == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(to)),
                 "r"(detail::shared_address(from)), "r"(static_cast<uint32_t>(bytes))
                 : "memory");
  }
#else
  detail::copy_by_lanes(to, from, bytes);
#endif
}

__device__ inline void commit_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

template <int left>
__device__ void wait_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(left) : "memory");
#endif
  __syncwarp();
}

__device__ inline void fence_bulk() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Clusters.

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

__device__ inline int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  uint32_t count;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return static_cast<int>(count);
#else
  return 1;
#endif
}

__device__ inline void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

template <class T>
__device__ T* shared_of(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(theirs);
#else
  return mine;
#endif
}

}  // namespace tk::cuda
