// Kernels that are wrong on purpose, one fault each, on the line that says so: tests want every one
// caught, with its kernel, block, thread and line.
#include "cuda/launch.cuh"
#include "cuda_on_host/planted.h"

namespace tk::cuda::tried {
namespace {

__global__ void barrier_divergence(uint32_t*) {
  if (thread() < 40) sync();  // planted: barrier_divergence
}

__global__ void two_barriers(uint32_t*) {
  if (thread() < 40) {
    sync();
  } else {
    sync();  // planted: two_barriers
  }
}

__global__ void inactive_lanes(uint32_t* to) {
  if (lane() >= 16) return;
  to[thread()] = shuffle(thread(), 3);  // planted: inactive_lanes
}

__global__ void lane_outside_mask(uint32_t* to) {
  if (lane() >= 16) return;
  to[thread()] = shuffle_down(thread(), 8, first_lanes(16));  // planted: lane_outside_mask
}

__global__ void lanes_apart(uint32_t* to) {
  if (lane() % 2 == 0) {
    to[thread()] = ballot(true);  // planted: lanes_apart
  } else {
    to[thread()] = ballot(false);
  }
}

__global__ void race(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  values[thread()] = 0;
  sync();
  values[thread()] = thread();
  if (thread() == 0) to[0] = values[threads() - 1];  // planted: race
}

__global__ void race_of_writers(uint32_t*) {
  Arena arena;
  auto* value = arena.shared<uint32_t>(1);
  *value = thread();  // planted: race_of_writers
}

__global__ void race_after_reading(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  values[thread()] = thread();
  sync();
  if (thread() >= 32) to[thread()] = values[thread() - 32];
  values[thread()] = 0;  // planted: race_after_reading
}

__global__ void race_within_a_warp(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  values[thread()] = thread();
  any(true);                             // a vote orders nothing
  to[thread()] = values[thread() ^ 31];  // planted: race_within_a_warp
}

__global__ void race_with_an_atomic(uint32_t* to) {
  Arena arena;
  auto* value = arena.shared<uint32_t>(1);
  if (thread() == 0) *value = 0;
  sync();
  atomic_add(value, 1u);
  to[thread()] = *value;  // planted: race_with_an_atomic
}

__global__ void outside_global(uint32_t* to) {
  to[thread() + kCount - threads() + 1] = 1;  // planted: outside_global
}

__global__ void vector_outside_global(uint32_t* to) {
  const auto four = load<Vector<uint32_t, 4>>(to + kCount);  // planted: vector_outside_global
  to[thread()] = four.at[0];
}

__global__ void far_outside_global(uint32_t* to) {
  const auto nowhere = reinterpret_cast<uintptr_t>(to) ^ uintptr_t { 1 } << 46;
  to[0] = *reinterpret_cast<const uint32_t*>(nowhere);  // planted: far_outside_global
}

__global__ void behind_an_array(uint32_t*) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  auto* more = arena.shared<uint32_t>(threads());
  more[thread()] = 0;
  values[thread() + 1] = thread();  // planted: behind_an_array
}

__global__ void outside_shared(uint32_t*) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  values[thread() - 1000] = thread();  // planted: outside_shared
}

__global__ void more_shared_than_launched(uint32_t*) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(10000);  // planted: more_shared_than_launched
  values[thread()] = 0;
}

__global__ void uninitialised(uint32_t* to) {
  Arena arena;
  auto* values = arena.shared<uint32_t>(threads());
  if (thread() != 7) values[thread()] = thread();
  sync();
  to[thread()] = values[thread()];  // planted: uninitialised
}

__global__ void misaligned_vector(uint32_t* to) {
  const auto four = load<Vector<uint32_t, 4>>(to + 1);  // planted: misaligned_vector
  to[thread()] = four.at[0];
}

__global__ void misaligned_pointer(uint32_t* to) {
  auto* bytes = reinterpret_cast<char*>(to);
  *reinterpret_cast<uint32_t*>(bytes + 2) = 1;  // planted: misaligned_pointer
}

__global__ void local_of_another(uint32_t* to) {
  Arena arena;
  auto** place = arena.shared<uint32_t*>(1);
  uint32_t mine = static_cast<uint32_t>(thread());
  if (thread() == 0) *place = &mine;
  sync();
  to[thread()] = **place;  // planted: local_of_another
}

// Blocks wait for the block before them; nobody says that it starts first.
__global__ void look_back(uint32_t* to) {
  if (thread() == 0 && block() > 0)
    wait_until([&] { return load_acquire(to + block() - 1) != 0; });  // planted: look_back
  if (thread() == 0) store_release(to + block(), 1u);
}

__global__ void never(uint32_t* to) {
  wait_until([&] { return load_acquire(to + kCount - 1) == 99; });  // planted: never
}

template <auto kernel>
const char* go(uint32_t* memory) {
  return launch<kernel>({.blocks = 5, .threads = 64, .shared = 4096}, memory);
}

}  // namespace

#define TK_PLANTED(name) {#name, &go<name>}

const Planted kPlanted[] = {
    TK_PLANTED(barrier_divergence), TK_PLANTED(two_barriers),
    TK_PLANTED(inactive_lanes),     TK_PLANTED(lane_outside_mask),
    TK_PLANTED(lanes_apart),        TK_PLANTED(race),
    TK_PLANTED(race_of_writers),    TK_PLANTED(race_after_reading),
    TK_PLANTED(race_within_a_warp), TK_PLANTED(race_with_an_atomic),
    TK_PLANTED(outside_global),     TK_PLANTED(vector_outside_global),
    TK_PLANTED(far_outside_global), TK_PLANTED(behind_an_array),
    TK_PLANTED(outside_shared),     TK_PLANTED(more_shared_than_launched),
    TK_PLANTED(uninitialised),      TK_PLANTED(misaligned_vector),
    TK_PLANTED(misaligned_pointer), TK_PLANTED(local_of_another),
    TK_PLANTED(look_back),          TK_PLANTED(never),
};
const int kPlantedCount = sizeof kPlanted / sizeof *kPlanted;

}  // namespace tk::cuda::tried
