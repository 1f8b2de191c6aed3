// The one door to the GPU: launches, threads, barriers, shuffles, atomics and assembly are named
// here and in the launch_*.cuh files that it includes, nowhere else.
//
// A kernel is written against these functions only, so that the same file also runs on the CPU,
// thread by thread, where every fault is caught: with TK_CUDA_ON_HOST they mean what
// tests/cuda_on_host gives them. To write one:
//
//   coordinates   block(), blocks(), block_y(), block_z(); thread(), threads(); lane(), warp(),
//                 warps(). Blocks have one dimension; for_each(count, body) strides the grid.
//   block         sync(); sync_count / sync_any / sync_all(condition). All threads of the block
//                 reach the same one; none has ended before.
//   warp          shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, any, all, match,
//                 reduce_add / min / max / and / or: every lane of the mask calls, nobody else.
//                 Lanes do not run in step: warp_sync() before reading what another lane wrote.
//   shared        Arena arena; float* sums = arena.shared<float>(n): arrays of the dynamic arena,
//                 the same calls in all threads; Launch.shared is the sum of shared_bytes<T>(n).
//   memory        load<Vector<T, N>>(from), store(to, vector): 1, 2, 4, 8 or 16 bytes at an address
//                 that is a multiple of it; <V, kStream> for what is touched once, <V, kReadOnly>
//                 for what nobody writes while the kernel runs. Plain pointers for the rest.
//   atomics       atomic_add, _min, _max, _or, _exchange, _compare_exchange on 32 and 64 bits,
//                 relaxed; load_acquire, store_release, load_relaxed, store_relaxed; fence().
//   copies        copy_async<16>(shared, global) of one thread, commit_copies(), then
//                 wait_copies<left>() and, for the others, sync(). copy_bulk(shared, global, bytes,
//                 gate) of a whole warp, multiples of 16 bytes, is one arrival at a Gate:
//                 init_gate(gate, arrivals) by one thread, sync(); arrive(gate) by one thread;
//                 wait_gate(gate, phase), the phases being 0, 1, 0, … store_bulk(global, shared,
//                 bytes) of a whole warp: fence_bulk() by all that wrote, sync(), store_bulk,
//                 commit_stores(), wait_stores<left>() before the shared bytes change or the block
//                 ends.
//   clusters      Launch.cluster blocks side by side: cluster_rank(), cluster_blocks(),
//                 sync_cluster(), shared_of(pointer, rank); none ends while another reads it.
//   products      load_matrices<count, transposed>(registers, row) of shared memory,
//                 multiply_add<T>(sum, a, b): 16×8 += 16×16 · 16×8 of BFloat16 or Half, 16×8 · 8×8
//                 of float rounded by to_tf32; registers as PTX lays out m16n8k16 and m16n8k8.
//   groups        products of 64 rows by the four warps of a group() as one, on a Hopper: inside
//                 if constexpr (kGroupProducts), in kernels launched as group_products() says.
//                 Tiles lie in images (launch_image.cuh), which fence_bulk() by all that wrote and
//                 sync() make ready. fence_products(sums, words) names the registers that were
//                 touched; multiply_add_group<T, N>(sums, left, right) adds 64×d · (N×d)ᵀ, d of 32
//                 bytes, operands by describe(image, rows, row, column), the left one also in
//                 registers as PTX lays out m64k16 and m64k8; commit_products() ends a batch of
//                 them. Registers are not touched, operands not overwritten, before
//                 wait_products<left>(sums, words), for operands by all four warps.
//   order         ticket(counter, slot) numbers the blocks as they start; wait_until(condition) is
//                 the only spin, and only on blocks with a lower ticket. block() says nothing about
//                 who starts first.
//   launch        launch<kernel<T>>({.blocks, .threads, .shared, .stream}, arguments…) from host
//                 code: nullptr, or what went wrong in words. No blocks: nothing to do.
//                 zero(memory, bytes, stream); multiprocessors(), most_shared() of this GPU,
//                 most_cluster<kernel>().
//   numbers       widen(value) to float, narrow<T>(float) to nearest even; exp2_flushed(float);
//                 rounded_product(a, b), which no sum takes into a fused multiply-add.
#pragma once

#include "tokenkernels.h"

namespace tk::cuda {

using Lanes = uint32_t;  // one bit per lane of a warp
constexpr Lanes kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kGroup = 128;  // threads of the four warps that multiply as one on a Hopper

// What a kernel is started with.
struct Launch {
  int64_t blocks;  // 0: nothing is launched
  int threads;     // a multiple of 32, at most 1024
  int64_t shared = 0;
  void* stream = nullptr;
  int64_t blocks_y = 1, blocks_z = 1;  // at most 65535
  int cluster = 1;                     // blocks of a cluster, which divides `blocks`: at most 8
};

// N values that move as one: 1, 2, 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (sizeof(T) * N & (sizeof(T) * N - 1)) == 0);
  static constexpr int kCount = N;
  T at[N];
};

// Where a cache is to keep what is loaded or stored.
enum Hint {
  kKeep,
  kStream,      // touched once: first to go
  kNoAllocate,  // not in the first-level cache
  kReadOnly     // loads only: nobody writes it while the kernel runs
};

// Where threads and bulk copies meet, in shared memory: opens when all that it waits for has come,
// then waits for as many again.
struct Gate {
  uint64_t state;
};

// Where launchers take kernels whose groups of warps multiply; wherever they can is for tests.
enum class GroupProducts { kNowhere, kWhereFaster, kWherever };

}  // namespace tk::cuda

#ifdef TK_CUDA_ON_HOST
#include "cuda_on_host/launch_copies.h"
#include "cuda_on_host/launch_host.h"
#include "cuda_on_host/launch_mma.h"
#include "cuda_on_host/launch_wgmma.h"
#else
#include "cuda/launch_copies.cuh"
#include "cuda/launch_gpu.cuh"
#include "cuda/launch_memory.cuh"
#include "cuda/launch_mma.cuh"
#include "cuda/launch_wgmma.cuh"
#endif
#include "cuda/launch_image.cuh"

namespace tk::cuda {

// Shared memory, array behind array from the start of the block's arena.
class Arena {
 public:
  template <class T>
  __device__ T* shared(int64_t count, int64_t alignment = 16) {
    at_ = (at_ + alignment - 1) / alignment * alignment;
    T* array = static_cast<T*>(detail::shared_array(at_, count * int64_t{sizeof(T)}));
    at_ += (count * int64_t{sizeof(T)} + 15) / 16 * 16 + detail::kGap;
    return array;
  }

 private:
  int64_t at_ = 0;
};

// What one array of an Arena takes of Launch.shared.
template <class T>
constexpr int64_t shared_bytes(int64_t count, int64_t alignment = 16) {
  return (count * int64_t{sizeof(T)} + 15) / 16 * 16 + detail::kGap + alignment - 16;
}

__device__ inline Lanes lanes_below() { return (Lanes{1} << lane()) - 1; }

__device__ inline Lanes first_lanes(int count) {
  return count >= kWarp ? kAllLanes : (Lanes{1} << count) - 1;
}

__device__ inline int warp() { return thread() / kWarp; }
__device__ inline int warps() { return threads() / kWarp; }

__device__ inline bool any(bool condition, Lanes mask = kAllLanes) {
  return ballot(condition, mask) != 0;
}

__device__ inline bool all(bool condition, Lanes mask = kAllLanes) {
  return ballot(condition, mask) == mask;
}

// Sums and maxima of a warp in all its lanes, always added in the same order.
template <class T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += shuffle_xor(value, step);
  return value;
}

template <class T>
__device__ T warp_max(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = shuffle_xor(value, step);
    value = other > value ? other : value;
  }
  return value;
}

// The sum of the values of all lower lanes and this one.
template <class T>
__device__ T warp_scan(T value) {
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = shuffle_up(value, step);
    if (lane() >= step) value += other;
  }
  return value;
}

// The number of blocks that called before this one, the same in all its threads: `counter` is 0
// before the launch, `slot` one word of shared memory.
__device__ inline uint32_t ticket(uint32_t* counter, uint32_t* slot) {
  if (thread() == 0) *slot = atomic_add(counter, 1u);
  sync();
  const uint32_t number = *slot;
  sync();
  return number;
}

constexpr int kThreads = 256;

// Runs body(i) for every i in [0, count), each thread taking every (number of threads)-th.
template <class Body>
__device__ void for_each(int64_t count, const Body& body) {
  const int64_t step = blocks() * threads();
  for (int64_t i = block() * threads() + thread(); i < count; i += step) body(i);
}

// Blocks of `each` that cover `count`, no more than `most`.
constexpr int64_t blocks_for(int64_t count, int64_t each, int64_t most = 65536) {
  const int64_t blocks = (count + each - 1) / each;
  return blocks < most ? blocks : most;
}

}  // namespace tk::cuda
