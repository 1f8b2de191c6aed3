// More kernels that are wrong on purpose: copies that nobody waits for, clusters out of step.
#include "cuda/launch.cuh"
#include "cuda_on_host/planted.h"

namespace tk::cuda::tried {
namespace {

__global__ void copy_without_wait(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  copy_async<4>(values + thread(), to + thread());
  commit_copies();
  to[thread()] = values[thread()];  // planted: copy_without_wait
  wait_copies<0>();
}

__global__ void copy_without_barrier(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  copy_async<4>(values + thread(), to + thread());
  commit_copies();
  wait_copies<0>();
  if (thread() == 40) to[0] = values[7];  // planted: copy_without_barrier
}

__global__ void copy_never_committed(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  copy_async<4>(values + thread(), to + thread());
  wait_copies<0>();
  to[thread()] = values[thread()];  // planted: copy_never_committed
}

__global__ void misaligned_copy(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(8 * threads());
  copy_async<16>(values + 4 * thread(), to + 2 * thread());  // planted: misaligned_copy
  commit_copies();
  wait_copies<0>();
}

__device__ uint32_t* bulk(uint32_t* from, Gate* gate, Arena& arena) {
  auto* values = arena.shared<uint32_t>(64);
  if (thread() == 0) init_gate(gate, 1);
  sync();
  if (warp() == 0) copy_bulk(values, from, 256, gate);
  return values;
}

__global__ void bulk_without_wait(uint32_t* to) {
  Arena arena;
  auto* gate = arena.shared<Gate>(1);
  const uint32_t* values = bulk(to, gate, arena);
  to[64 + thread()] = values[thread()];  // planted: bulk_without_wait
}

__global__ void bulk_without_barrier(uint32_t* to) {
  Arena arena;
  auto* gate = arena.shared<Gate>(1);
  uint32_t* values = bulk(to, gate, arena);
  wait_gate(gate, 0);
  if (thread() == 3) to[64] = values[40];
  if (warp() == 1) copy_bulk(values, to, 256, gate);  // planted: bulk_without_barrier
  wait_gate(gate, 1);
}

__global__ void wrong_phase(uint32_t* to) {
  Arena arena;
  auto* gate = arena.shared<Gate>(1);
  const uint32_t* values = bulk(to, gate, arena);
  wait_gate(gate, 1);
  to[64 + thread()] = values[thread()];  // planted: wrong_phase
}

__global__ void gate_never_opens(uint32_t*) {
  Arena arena;
  auto* gate = arena.shared<Gate>(1);
  if (thread() == 0) init_gate(gate, 2);
  sync();
  if (thread() == 0) arrive(gate);
  wait_gate(gate, 0);  // planted: gate_never_opens
}

__global__ void odd_bulk(uint32_t* to) {
  Arena arena;
  auto* gate = arena.shared<Gate>(1);
  auto* values = arena.shared<uint32_t>(64);
  if (thread() == 0) init_gate(gate, 1);
  sync();
  if (warp() == 0) copy_bulk(values, to, 100, gate);  // planted: odd_bulk
}

__global__ void store_without_wait(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  values[thread()] = 1;
  fence_bulk();
  sync();
  if (warp() == 0) store_bulk(to, values, 128);  // planted: store_without_wait
  commit_stores();
}

__global__ void store_without_fence(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  values[thread()] = 1;
  sync();
  if (warp() == 0) {
    store_bulk(to, values, 128);  // planted: store_without_fence
    commit_stores();
    wait_stores<0>();
  }
}

__global__ void cluster_out_of_step(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  values[thread()] = thread();
  sync();
  to[thread()] = shared_of(values, 1 - cluster_rank())[thread()];  // planted: cluster_out_of_step
  sync_cluster();
}

__global__ void cluster_that_left(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  values[thread()] = thread();
  sync_cluster();
  if (cluster_rank() == 0) to[thread()] = *shared_of(values, 1);  // planted: cluster_that_left
}

template <auto kernel, int cluster = 1>
const char* go(uint32_t* memory) {
  auto* aligned = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(memory) + 15) & ~15ull);
  return launch<kernel>({.blocks = 4, .threads = 64, .shared = 4096, .cluster = cluster}, aligned);
}

}  // namespace

#define TK_PLANTED(name, ...) {#name, &go<name __VA_OPT__(, ) __VA_ARGS__>}

const Planted kPlantedCopies[] = {
    TK_PLANTED(copy_without_wait),
    TK_PLANTED(copy_without_barrier),
    TK_PLANTED(copy_never_committed),
    TK_PLANTED(misaligned_copy),
    TK_PLANTED(bulk_without_wait),
    TK_PLANTED(bulk_without_barrier),
    TK_PLANTED(wrong_phase),
    TK_PLANTED(gate_never_opens),
    TK_PLANTED(odd_bulk),
    TK_PLANTED(store_without_wait),
    TK_PLANTED(store_without_fence),
    TK_PLANTED(cluster_out_of_step, 2),
    TK_PLANTED(cluster_that_left, 2),
};
const int kPlantedCopiesCount = sizeof kPlantedCopies / sizeof *kPlantedCopies;

}  // namespace tk::cuda::tried
