// More kernels without fault: copies beside the threads, gates, clusters, tensor cores.
#include <cmath>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda_on_host/planted.h"

namespace tk::cuda::tried {
namespace {

constexpr int kTile = 256, kTiles = 7, kStages = 2, kValues = kTile * kTiles;

// Two tiles under way while one is used.
__global__ void async_kernel(const uint32_t* from, uint32_t* to, int64_t count) {
  Arena arena;
  auto* tiles = arena.shared<uint32_t>(3 * 4 * threads());
  const auto ask = [&](int tile) {
    const int64_t at = (int64_t{tile} * threads() + thread()) * 4;
    copy_async<16>(tiles + (tile % 3 * threads() + thread()) * 4, from + (at < count ? at : 0),
                   at < count);
    commit_copies();
  };
  ask(0);
  ask(1);
  for (int tile = 0; tile * 4 * threads() < count; ++tile) {
    ask(tile + 2);
    wait_copies<2>();
    sync();
    const int64_t at = int64_t{tile} * 4 * threads() + thread();
    for (int i = 0; i < 4; ++i) {
      if (at + i * threads() < count)
        to[at + i * threads()] = tiles[tile % 3 * 4 * threads() + i * threads() + thread()] + 1;
    }
    sync();
  }
  wait_copies<0>();
}

const char* run_async() {
  constexpr int kCountHere = 1000;
  Aligned<uint32_t> from(kCountHere);
  std::vector<uint32_t> to(kCountHere);
  for (int i = 0; i < kCountHere; ++i) from.data[i] = static_cast<uint32_t>(i);
  launch<async_kernel>({.blocks = 1, .threads = 32, .shared = shared_bytes<uint32_t>(3 * 4 * 32)},
                       from.data, to.data(), int64_t{kCountHere});
  for (int i = 0; i < kCountHere; ++i)
    if (to[i] != static_cast<uint32_t>(i) + 1) return "a copied value";
  return nullptr;
}

// One warp fetches, three compute, gates tell each other what is full and what is empty.
__global__ void pipeline_kernel(const float* from, float* to) {
  Arena arena;
  auto* tiles = arena.shared<float>(kStages * kTile, 128);
  auto* full = arena.shared<Gate>(kStages);
  auto* empty = arena.shared<Gate>(kStages);
  auto* out = arena.shared<float>(kTile, 128);
  const int workers = threads() - kWarp;
  if (thread() == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_gate(full + s, 1);
      init_gate(empty + s, workers);
    }
  }
  sync();
  if (warp() == 0) {
    for (uint32_t tile = 0; tile < kTiles; ++tile) {
      const uint32_t stage = tile % kStages, round = tile / kStages;
      if (round > 0) wait_gate(empty + stage, (round - 1) % 2);
      copy_bulk(tiles + stage * kTile, from + tile * kTile, kTile * 4, full + stage);
    }
  } else {
    float sums[kTile / kWarp] = {};
    for (uint32_t tile = 0; tile < kTiles; ++tile) {
      const uint32_t stage = tile % kStages, round = tile / kStages;
      wait_gate(full + stage, round % 2);
      if (warp() == 1) {
        for (int i = 0; i < kTile / kWarp; ++i)
          sums[i] += tiles[stage * kTile + i * kWarp + lane()];
      }
      arrive(empty + stage);
    }
    if (warp() == 1) {
      for (int i = 0; i < kTile / kWarp; ++i) out[i * kWarp + lane()] = sums[i];
    }
  }
  fence_bulk();
  sync();
  if (warp() == 0) {
    store_bulk(to, out, kTile * 4);
    commit_stores();
    wait_stores<0>();
  }
}

const char* run_pipeline() {
  Aligned<float> from(kValues), to(kTile);
  for (int i = 0; i < kValues; ++i) from.data[i] = static_cast<float>(i % 37);
  const int64_t shared = shared_bytes<float>(kStages * kTile, 128) +
                         2 * shared_bytes<Gate>(kStages) + shared_bytes<float>(kTile, 128);
  launch<pipeline_kernel>({.blocks = 1, .threads = 4 * kWarp, .shared = shared}, from.data,
                          to.data);
  for (int i = 0; i < kTile; ++i) {
    float want = 0;
    for (int t = 0; t < kTiles; ++t) want += from.data[t * kTile + i];
    if (to.data[i] != want) return "a sum";
  }
  return nullptr;
}

// Every block adds what all blocks of its cluster hold.
__global__ void cluster_kernel(int* to) {
  Arena arena;
  auto* mine = arena.shared<int>(threads());
  mine[thread()] = static_cast<int>(block()) * 1000 + thread();
  sync_cluster();
  int total = 0;
  for (int rank = 0; rank < cluster_blocks(); ++rank) total += shared_of(mine, rank)[thread()];
  sync_cluster();
  to[block() * threads() + thread()] = total;
}

const char* run_cluster() {
  constexpr int kBlocksHere = 12, kCluster = 4, kThreadsHere = 64;
  std::vector<int> to(kBlocksHere * kThreadsHere);
  launch<cluster_kernel>({.blocks = kBlocksHere,
                          .threads = kThreadsHere,
                          .shared = shared_bytes<int>(kThreadsHere),
                          .cluster = kCluster},
                         to.data());
  for (int b = 0; b < kBlocksHere; ++b) {
    for (int t = 0; t < kThreadsHere; ++t) {
      const int first = b / kCluster * kCluster;
      if (to[b * kThreadsHere + t] != (4 * first + 6) * 1000 + 4 * t) return "a sum of the cluster";
    }
  }
  return nullptr;
}

// c (16, 8) = a (16, K) · bᵀ, b (8, K), fragments loaded as matrices where the type has 2 bytes.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* c) {
  constexpr int K = sizeof(T) == 4 ? 8 : 16;
  Arena arena;
  auto* rows = arena.shared<T>(16 * K);
  auto* columns = arena.shared<T>(8 * K);
  for (int i = thread(); i < 16 * K; i += threads()) rows[i] = a[i];
  for (int i = thread(); i < 8 * K; i += threads()) columns[i] = b[i];
  sync();
  uint32_t left[4], right[2];
  if constexpr (sizeof(T) == 2) {
    load_matrices<4, false>(left, rows + lane() % 16 * K + lane() / 16 * 8);
    load_matrices<2, false>(right, columns + lane() % 8 * K + lane() / 8 % 2 * 8);
  } else {
    for (int i = 0; i < 4; ++i)
      left[i] = to_tf32(rows[(lane() / 4 + i % 2 * 8) * K + lane() % 4 + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) right[i] = to_tf32(columns[lane() / 4 * K + lane() % 4 + i * 4]);
  }
  float sum[4] = {};
  multiply_add<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = sum[i];
}

template <class T>
const char* run_product() {
  constexpr int K = sizeof(T) == 4 ? 8 : 16;
  std::vector<T> a(16 * K), b(8 * K);
  std::vector<float> c(16 * 8);
  for (int i = 0; i < 16 * K; ++i) a[i] = from_float<T>(static_cast<float>(i * 7 % 13 - 6));
  for (int i = 0; i < 8 * K; ++i) b[i] = from_float<T>(static_cast<float>(i * 5 % 11 - 5));
  launch<product_kernel<T>>(
      {.blocks = 1, .threads = 32, .shared = shared_bytes<T>(16 * K) + shared_bytes<T>(8 * K)},
      a.data(), b.data(), c.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float want = 0;
      for (int k = 0; k < K; ++k) want += to_float(a[i * K + k]) * to_float(b[j * K + k]);
      if (c[i * 8 + j] != want) return "a product";
    }
  }
  return nullptr;
}

// ldmatrix.trans gives the columns of what lies in rows.
__global__ void transpose_kernel(uint16_t* to) {
  Arena arena;
  auto* matrix = arena.shared<uint16_t>(64);
  for (int i = lane(); i < 64; i += kWarp) matrix[i] = static_cast<uint16_t>(i);
  warp_sync();
  uint32_t pair[1];
  load_matrices<1, true>(pair, matrix + lane() % 8 * 8);
  to[lane() * 2] = static_cast<uint16_t>(pair[0]);
  to[lane() * 2 + 1] = static_cast<uint16_t>(pair[0] >> 16);
}

const char* run_transpose() {
  std::vector<uint16_t> to(64);
  launch<transpose_kernel>({.blocks = 1, .threads = 32, .shared = shared_bytes<uint16_t>(64)},
                           to.data());
  for (int i = 0; i < 64; ++i)
    if (to[i] != i % 8 * 8 + i / 8) return "a transposed matrix";
  return nullptr;
}

}  // namespace

const Sound kSoundCopies[] = {
    {"async copies", &run_async},          {"a pipeline of bulk copies", &run_pipeline},
    {"a cluster", &run_cluster},           {"bfloat16", &run_product<BFloat16>},
    {"float16", &run_product<Half>},       {"tf32", &run_product<float>},
    {"a transposed load", &run_transpose},
};
const int kSoundCopiesCount = sizeof kSoundCopies / sizeof *kSoundCopies;

}  // namespace tk::cuda::tried
