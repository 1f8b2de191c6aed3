// Kernels without fault that use what launch.cuh has, and what they must give, so that the executor
// is known to compute right and to accuse nobody.
#include <numeric>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda_on_host/planted.h"

namespace tk::cuda::tried {
namespace {

constexpr int kBlockSize = 128;

__global__ void warps_kernel(int* to) {
  const int t = thread(), all_below = warp_scan(1);
  int good = all_below == lane() + 1;
  good &= warp_sum(lane()) == 496 && warp_max(lane()) == 31;
  good &= shuffle(t, 5) == warp() * 32 + 5 && shuffle_xor(t, 3) == (t ^ 3);
  good &= shuffle_up(lane(), 2) == (lane() < 2 ? lane() : lane() - 2);
  good &= shuffle_down(int64_t{lane()}, 2) == (lane() > 29 ? lane() : lane() + 2);
  good &= ballot(lane() % 2 == 0) == 0x55555555u && any(lane() == 9) && !all(lane() == 9);
  good &= match(lane() / 8) == 0xffu << lane() / 8 * 8;
  good &= reduce_add(-lane()) == -496 && reduce_min(-lane()) == -31 && reduce_max(lane()) == 31;
  good &= reduce_or(1u << lane()) == kAllLanes && reduce_and(~(1u << lane())) == 0;
  const Lanes half = lane() < 16 ? 0xffffu : 0xffff0000u;
  good &= reduce_add(1, half) == 16 && count_bits(lanes_below()) == lane();
  good &= lowest_bit(half) == lane() / 16 * 16 && highest_bit(half) == lane() / 16 * 16 + 15;
  good &= sync_count(t < 7) == 7 && sync_any(t == 7) && !sync_all(t == 7);
  to[block() * threads() + t] = good;
}

const char* run_warps() {
  std::vector<int> good(5 * kBlockSize);
  launch<warps_kernel>({.blocks = 5, .threads = kBlockSize}, good.data());
  return std::accumulate(good.begin(), good.end(), 0) == 5 * kBlockSize ? nullptr : "warps";
}

// A sum of the whole block by every rule of shared memory: own lanes after warp_sync, others after
// sync.
__device__ int block_sum(int value, int* sums, int* own) {
  own[thread()] = value;
  warp_sync();
  const int pair = own[thread()] + own[thread() ^ 1];
  const int total = warp_sum(pair) / 2;
  if (lane() == 0) sums[warp()] = total;
  sync();
  int result = 0;
  for (int w = 0; w < warps(); ++w) result += sums[w];
  sync();
  return result;
}

// Prefix sums over blocks in one launch: a ticket gives the order, every block publishes what it
// has and adds up what the blocks before it had.
__global__ void scan_kernel(const int* from, int* to, uint32_t* counter, uint64_t* state) {
  Arena arena;
  auto* slot = arena.shared<uint32_t>(1);
  auto* sums = arena.shared<int>(kWarp);
  auto* own = arena.shared<int>(threads());
  auto* before = arena.shared<int>(1);
  const uint32_t number = ticket(counter, slot);
  const int value = from[number * kBlockSize + thread()];
  const int total = block_sum(value, sums, own);
  if (thread() == 0) {
    constexpr uint64_t kThere = uint64_t{1} << 32;
    uint64_t previous = 0;
    if (number > 0)
      wait_until([&] { return (previous = load_acquire(state + number - 1)) >= kThere; });
    *before = static_cast<int>(static_cast<uint32_t>(previous));
    store_release(state + number, kThere | static_cast<uint32_t>(*before + total));
  }
  const int inside = warp_scan(value);
  if (lane() == kWarp - 1) sums[warp()] = inside;
  sync();
  int result = *before + inside;
  for (int w = 0; w < warp(); ++w) result += sums[w];
  to[number * kBlockSize + thread()] = result;
}

const char* run_scan() {
  constexpr int kBlocksHere = 13, kValues = kBlocksHere * kBlockSize;
  std::vector<int> from(kValues), to(kValues), want(kValues);
  for (int i = 0; i < kValues; ++i) from[i] = i * 7 % 11;
  std::partial_sum(from.begin(), from.end(), want.begin());
  uint32_t counter = 0;
  std::vector<uint64_t> state(kBlocksHere);
  const int64_t shared = shared_bytes<uint32_t>(1) + shared_bytes<int>(kWarp) +
                         shared_bytes<int>(kBlockSize) + shared_bytes<int>(1);
  launch<scan_kernel>({.blocks = kBlocksHere, .threads = kBlockSize, .shared = shared}, from.data(),
                      to.data(), &counter, state.data());
  return to == want ? nullptr : "scan";
}

__global__ void atomics_kernel(uint32_t* counts, int64_t* extremes, uint32_t* bits) {
  Arena arena;
  auto* bins = arena.shared<uint32_t>(8);
  if (thread() < 8) bins[thread()] = 0;
  sync();
  atomic_add(bins + thread() % 8, 1u);
  sync();
  if (thread() < 8) atomic_add(counts + thread(), bins[thread()]);
  atomic_min(extremes, -block() * 1000 - thread());
  atomic_max(extremes + 1, block() * 1000 + thread());
  atomic_or(bits, 1u << block());
  atomic_compare_exchange(bits + 1, 0u, 7u);
  if (thread() == 0 && block() == 0) atomic_exchange(bits + 2, 5u);
}

const char* run_atomics() {
  std::vector<uint32_t> counts(8), bits(3);
  std::vector<int64_t> extremes(2);
  launch<atomics_kernel>({.blocks = 4, .threads = kBlockSize, .shared = shared_bytes<uint32_t>(8)},
                         counts.data(), extremes.data(), bits.data());
  const bool good = counts == std::vector<uint32_t>(8, 4 * kBlockSize / 8) &&
                    extremes[0] == -3000 - kBlockSize + 1 && extremes[1] == 3000 + kBlockSize - 1 &&
                    bits[0] == 15 && bits[1] == 7 && bits[2] == 5;
  return good ? nullptr : "atomics";
}

template <int N>
__global__ void vectors_kernel(const Half* from, Half* to, int64_t count) {
  for_each(count / N, [=](int64_t i) {
    auto vector = load<Vector<Half, N>, kStream>(from + i * N);
    for (int j = 0; j < N; ++j) vector.at[j] = narrow<Half>(widen(vector.at[j]) * 2);
    store<kStream>(to + i * N, vector);
  });
}

template <int N>
const char* run_vectors() {
  constexpr int kValues = 4096;
  auto* from = static_cast<Half*>(aligned_alloc(16, kValues * sizeof(Half)));
  auto* to = static_cast<Half*>(aligned_alloc(16, kValues * sizeof(Half)));
  for (int i = 0; i < kValues; ++i) from[i] = from_float<Half>(static_cast<float>(i % 100));
  launch<vectors_kernel<N>>({.blocks = 3, .threads = 64}, from, to, int64_t{kValues});
  bool good = true;
  for (int i = 0; i < kValues; ++i) good &= to_float(to[i]) == static_cast<float>(i % 100 * 2);
  free(from);
  free(to);
  return good ? nullptr : "vectors";
}

}  // namespace

const Sound kSound[] = {
    {"warps", &run_warps},
    {"scan", &run_scan},
    {"atomics", &run_atomics},
    {"vectors of 2 bytes", &run_vectors<1>},
    {"of 4 bytes", &run_vectors<2>},
    {"of 8 bytes", &run_vectors<4>},
    {"of 16 bytes", &run_vectors<8>},
};
const int kSoundCount = sizeof kSound / sizeof *kSound;

}  // namespace tk::cuda::tried
