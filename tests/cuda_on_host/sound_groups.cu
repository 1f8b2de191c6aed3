// Kernels without fault: products of groups, from images filled by threads, by async copies and by
// bulk copies.
#include <cstring>
#include <vector>

#include "cuda/product.cuh"
#include "cuda_on_host/planted.h"

namespace tk::cuda::tried {
namespace {

constexpr int kRows = 64, kLong = 192, kStep = 64;

// How the operands lie, and where the left one is.
enum Way { kBothAlong, kRightAcross, kBothAcross, kLeftInRegisters };

// (rows, columns) of `from` at (row, column), `stride` apart, into an image.
template <class T>
__device__ void fetch_image(T* image, int rows, int columns, const T* from, int stride) {
  constexpr int each = 16 / sizeof(T);
  for (int i = thread(); i < rows * columns / each; i += threads()) {
    const int row = i * each / columns, column = i * each % columns;
    copy_async<16>(image + image_at<T>(rows, row, column), from + row * stride + column);
  }
}

// The left operand's registers of `term`, as PTX lays them out.
template <class T>
__device__ void load_left(uint32_t (&to)[4], const T* from, int term) {
  constexpr int per = 4 / sizeof(T);
  for (int v = 0; v < 4; ++v) {
    T words[per];
    const int row = thread() % kGroup / kWarp * 16 + lane() / 4 + v % 2 * 8;
    for (int i = 0; i < per; ++i)
      words[i] = from[row * kLong + term + lane() % 4 * per + v / 2 * 4 * per + i];
    memcpy(&to[v], words, 4);
  }
}

// (64, kLong) · (N, kLong)ᵀ; two images of kStep terms are fetched while two are multiplied.
template <class T, int N, Way way>
__global__ void groups_kernel(const T* left, const T* right, float* to) {
  if constexpr (kGroupProducts) {
    constexpr bool across = way == kBothAcross, transposed = across || way == kRightAcross;
    constexpr int step = 32 / sizeof(T), left_size = image_size<T>(kRows, kStep);
    constexpr int right_size = image_size<T>(N, kStep);
    Arena arena;
    T* a = arena.shared<T>(2 * left_size, kImageAlignment);
    T* b = arena.shared<T>(2 * right_size, kImageAlignment);
    const auto fetch = [&](int at) {
      if (at < kLong) {
        T* image = a + at / kStep % 2 * left_size;
        if (across)
          fetch_image(image, kStep, kRows, left + at * kRows, kRows);
        else
          fetch_image(image, kRows, kStep, left + at, kLong);
        image = b + at / kStep % 2 * right_size;
        if (transposed)
          fetch_image(image, kStep, N, right + at * N, N);
        else
          fetch_image(image, N, kStep, right + at, kLong);
      }
      commit_copies();
    };
    fetch(0);
    float sums[N / 8][4];
    uint32_t words[kStep / step][4];
    for (int at = 0; at < kLong; at += kStep) {
      fetch(at + kStep);
      wait_copies<1>();
      fence_bulk();
      sync();
      if constexpr (way == kLeftInRegisters) {
        for (int k = 0; k < kStep; k += step) load_left(words[k / step], left, at + k);
      }
      fence_products(sums, words);
      const T* image_a = a + at / kStep % 2 * left_size;
      const T* image_b = b + at / kStep % 2 * right_size;
#pragma unroll
      for (int k = 0; k < kStep; k += step) {
        const uint64_t of_right = transposed ? describe<T, transposed>(image_b, kStep, k, 0)
                                             : describe<T>(image_b, N, 0, k);
        const uint64_t of_left =
            across ? describe<T, across>(image_a, kStep, k, 0) : describe<T>(image_a, kRows, 0, k);
        if constexpr (way == kLeftInRegisters)
          multiply_add_group<T, N>(sums, words[k / step], of_right, at + k > 0);
        else
          multiply_add_group<T, N, transposed, across>(sums, of_left, of_right, at + k > 0);
      }
      commit_products();
      wait_products<0>(sums, words);
      sync();
    }
    for (int j = 0; j < N / 8; ++j) {
      for (int v = 0; v < 4; ++v) {
        const int row = warp() * 16 + lane() / 4 + v / 2 * 8;
        to[row * N + j * 8 + lane() % 4 * 2 + v % 2] = sums[j][v];
      }
    }
  }
}

template <class T>
T small_number(int i) {
  return from_float<T>(static_cast<float>(i * 37 % 17 - 8));
}

template <class T, int N, Way way>
const char* run_groups() {
  constexpr bool across = way == kBothAcross, transposed = across || way == kRightAcross;
  Aligned<T> left(kRows * kLong), right(N * kLong);
  std::vector<float> to(kRows * N);
  for (int i = 0; i < kRows * kLong; ++i) left.data[i] = small_number<T>(i);
  for (int i = 0; i < N * kLong; ++i) right.data[i] = small_number<T>(5 * i + 1);
  constexpr int64_t shared = shared_bytes<T>(2 * image_size<T>(kRows, kStep), kImageAlignment) +
                             shared_bytes<T>(2 * image_size<T>(N, kStep), kImageAlignment);
  const char* error = launch<groups_kernel<T, N, way>>(
      {.blocks = 1, .threads = kGroup, .shared = shared}, left.data, right.data, to.data());
  if (error != nullptr) return error;
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < N; ++c) {
      float want = 0;  // of whole numbers below 2²⁴: exact in any order
      for (int k = 0; k < kLong; ++k)
        want += to_float(left.data[across ? k * kRows + r : r * kLong + k]) *
                to_float(right.data[transposed ? k * N + c : c * kLong + k]);
      if (to[r * N + c] != want) return "a product";
    }
  }
  return nullptr;
}

constexpr int kTiles = 5, kStages = 2, kWide = 128, kDeep = 64;

// One warp fetches images that lie ready in global memory, two groups multiply them: each its own
// 64 rows with all tiles, the product of one under way while the next is waited for.
__global__ void fetching_kernel(const BFloat16* left, const BFloat16* images, float* to) {
  if constexpr (kGroupProducts) {
    constexpr int size = image_size<BFloat16>(kWide, kDeep);
    constexpr int rows = 2 * kRows;
    Arena arena;
    auto* a = arena.shared<BFloat16>(image_size<BFloat16>(rows, kDeep), kImageAlignment);
    auto* tiles = arena.shared<BFloat16>(kStages * size, kImageAlignment);
    auto* full = arena.shared<Gate>(kStages);
    auto* empty = arena.shared<Gate>(kStages);
    if (thread() == 0) {
      for (int s = 0; s < kStages; ++s) {
        init_gate(full + s, 1);
        init_gate(empty + s, 2 * kGroup / kWarp);
      }
    }
    if (group() < 2) {
      for (int i = thread(); i < rows * kDeep; i += 2 * kGroup)
        a[image_at<BFloat16>(rows, i / kDeep, i % kDeep)] = left[i];
      fence_bulk();
    }
    sync();
    if (group() == 2) {
      for (uint32_t tile = 0; tile < kTiles; ++tile) {
        const uint32_t stage = tile % kStages;
        if (tile >= kStages) wait_gate(empty + stage, tile / kStages - 1);
        if (warp() % 4 == 0)
          copy_bulk(tiles + stage * size, images + tile * size, size * 2, full + stage);
      }
      return;
    }
    float sums[kWide / 8][4] = {};
    for (uint32_t tile = 0; tile < kTiles; ++tile) {
      const uint32_t stage = tile % kStages;
      wait_gate(full + stage, tile / kStages);
      fence_products(sums);
#pragma unroll
      for (int k = 0; k < kDeep; k += 16)
        multiply_add_group<BFloat16, kWide>(sums, describe(a, rows, group() * kRows, k),
                                            describe(tiles + stage * size, kWide, 0, k));
      commit_products();
      wait_products<1>(sums);
      if (tile > 0 && lane() == 0) arrive(empty + (tile - 1) % kStages);
    }
    wait_products<0>(sums);
    for (int j = 0; j < kWide / 8; ++j) {
      for (int v = 0; v < 4; ++v) {
        const int row = warp() * 16 + lane() / 4 + v / 2 * 8;
        to[row * kWide + j * 8 + lane() % 4 * 2 + v % 2] = sums[j][v];
      }
    }
  }
}

const char* run_fetching() {
  constexpr int size = image_size<BFloat16>(kWide, kDeep), rows = 2 * kRows;
  Aligned<BFloat16> left(rows * kDeep), images(kTiles * size);
  std::vector<float> to(rows * kWide), total(kWide * kDeep);
  for (int i = 0; i < rows * kDeep; ++i) left.data[i] = small_number<BFloat16>(i);
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int i = 0; i < kWide * kDeep; ++i) {
      const BFloat16 value = small_number<BFloat16>(7 * i + tile);
      images.data[tile * size + image_at<BFloat16>(kWide, i / kDeep, i % kDeep)] = value;
      total[i] += to_float(value);
    }
  }
  constexpr int64_t shared =
      shared_bytes<BFloat16>(image_size<BFloat16>(rows, kDeep), kImageAlignment) +
      shared_bytes<BFloat16>(kStages * size, kImageAlignment) + 2 * shared_bytes<Gate>(kStages);
  const char* error = launch<fetching_kernel>(
      {.blocks = 1, .threads = 3 * kGroup, .shared = shared}, left.data, images.data, to.data());
  if (error != nullptr) return error;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < kWide; ++c) {
      float want = 0;
      for (int k = 0; k < kDeep; ++k)
        want += to_float(left.data[r * kDeep + k]) * total[c * kDeep + k];
      if (to[r * kWide + c] != want) return "a sum of products";
    }
  }
  return nullptr;
}

}  // namespace

const Sound kSoundGroups[] = {
    {"64 columns of bfloat16", &run_groups<BFloat16, 64, kBothAlong>},
    {"128 columns of bfloat16, values", &run_groups<BFloat16, 128, kRightAcross>},
    {"128 columns of bfloat16, across", &run_groups<BFloat16, 128, kBothAcross>},
    {"192 columns of float16, from registers", &run_groups<Half, 192, kLeftInRegisters>},
    {"256 columns of float16", &run_groups<Half, 256, kBothAlong>},
    {"256 columns of float16, values", &run_groups<Half, 256, kRightAcross>},
    {"64 columns of tf32", &run_groups<float, 64, kBothAlong>},
    {"128 columns of tf32, from registers", &run_groups<float, 128, kLeftInRegisters>},
    {"images fetched by a warp", &run_fetching},
};
const int kSoundGroupsCount = sizeof kSoundGroups / sizeof *kSoundGroups;

}  // namespace tk::cuda::tried
