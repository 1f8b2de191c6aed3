// More kernels that are wrong on purpose: products of groups whose operands, registers or warps are
// not ready.
#include "cuda/launch.cuh"
#include "cuda_on_host/planted.h"

namespace tk::cuda::tried {
namespace {

constexpr int kSide = 64;
constexpr int kSize = image_size<BFloat16>(kSide, kSide);
using Sums = float[kSide / 8][4];

__device__ BFloat16* image_of_ones(Arena& arena, int64_t alignment = kImageAlignment) {
  auto* image = arena.shared<BFloat16>(kSize, alignment);
  for (int i = thread(); i < kSize; i += threads()) image[i] = narrow<BFloat16>(1.0f);
  fence_bulk();
  sync();
  return image;
}

__device__ uint64_t all_of(const BFloat16* image) { return describe(image, kSide, 0, 0); }

__device__ void ask(Sums& sums, uint64_t left, uint64_t right) {
  fence_products(sums);
  multiply_add_group<BFloat16, kSide>(sums, left, right, false);
  commit_products();
}

__global__ void sums_not_fenced(uint32_t*) {
  Arena arena;
  const uint64_t ones = all_of(image_of_ones(arena));
  Sums sums;
  fence_products(sums);
  sums[0][0] = 1;
  multiply_add_group<BFloat16, kSide>(sums, ones, ones);  // planted: sums_not_fenced
  commit_products();
  wait_products<0>(sums);
}

__global__ void left_not_fenced(uint32_t*) {
  Arena arena;
  const uint64_t ones = all_of(image_of_ones(arena));
  Sums sums;
  uint32_t left[4] = {};
  fence_products(sums);
  multiply_add_group<BFloat16, kSide>(sums, left, ones, false);  // planted: left_not_fenced
  commit_products();
  wait_products<0>(sums);
}

__global__ void sums_without_wait(uint32_t* to) {
  Arena arena;
  const uint64_t ones = all_of(image_of_ones(arena));
  Sums sums;
  ask(sums, ones, ones);
  if (sums[0][0] > 1) to[thread()] = 1;  // planted: sums_without_wait
  wait_products<0>(sums);
}

__global__ void sums_of_a_later_group(uint32_t* to) {
  Arena arena;
  const uint64_t ones = all_of(image_of_ones(arena));
  Sums sums, others;
  ask(sums, ones, ones);
  ask(others, ones, ones);
  wait_products<1>(sums);
  if (sums[0][0] > 1) to[thread()] = 1;
  if (others[0][0] > 1) to[thread()] = 2;  // planted: sums_of_a_later_group
  wait_products<0>(others);
}

__global__ void product_never_waited(uint32_t*) {
  Arena arena;
  const uint64_t ones = all_of(image_of_ones(arena));
  Sums sums;
  fence_products(sums);
  multiply_add_group<BFloat16, kSide>(sums, ones, ones, false);  // planted: product_never_waited
  commit_products();
}

__global__ void overwritten_under_way(uint32_t*) {
  Arena arena;
  BFloat16* image = image_of_ones(arena);
  Sums sums;
  ask(sums, all_of(image), all_of(image));
  image[8 * thread()] = BFloat16{};  // planted: overwritten_under_way
  wait_products<0>(sums);
}

__global__ void overwritten_without_barrier(uint32_t*) {
  Arena arena;
  BFloat16* image = image_of_ones(arena);
  Sums sums;
  ask(sums, all_of(image), all_of(image));
  wait_products<0>(sums);
  image[8 * thread()] = BFloat16{};  // planted: overwritten_without_barrier
}

__global__ void operand_not_fenced(uint32_t*) {
  Arena arena;
  BFloat16* image = image_of_ones(arena);
  image[8 * thread()] = BFloat16{};
  sync();
  Sums sums;
  fence_products(sums);
  const uint64_t all = all_of(image);
  multiply_add_group<BFloat16, kSide>(sums, all, all);  // planted: operand_not_fenced
  commit_products();
  wait_products<0>(sums);
}

__global__ void operand_still_coming(uint32_t* from) {
  Arena arena;
  BFloat16* image = image_of_ones(arena);
  copy_async<4>(image + 2 * thread(), from + thread());
  commit_copies();
  fence_bulk();
  sync();
  Sums sums;
  fence_products(sums);
  const uint64_t all = all_of(image);
  multiply_add_group<BFloat16, kSide>(sums, all, all);  // planted: operand_still_coming
  commit_products();
  wait_products<0>(sums);
  wait_copies<0>();
}

__global__ void misaligned_image(uint32_t*) {
  Arena arena;
  arena.shared<uint32_t>(32);
  const BFloat16* image = image_of_ones(arena, 128);
  Sums sums;
  fence_products(sums);
  const uint64_t all = all_of(image);
  multiply_add_group<BFloat16, kSide>(sums, all, all);  // planted: misaligned_image
  commit_products();
  wait_products<0>(sums);
}

// A tile with gaps between its rows is no image.
__global__ void tile_with_gaps(uint32_t*) {
  Arena arena;
  constexpr int stride = kSide + 8;
  auto* tile = arena.shared<BFloat16>(kSide * stride, kImageAlignment);
  for (int i = thread(); i < kSide * kSide; i += threads())
    tile[i / kSide * stride + i % kSide] = BFloat16{};
  fence_bulk();
  sync();
  Sums sums;
  fence_products(sums);
  const uint64_t all = all_of(tile);
  multiply_add_group<BFloat16, kSide>(sums, all, all);  // planted: tile_with_gaps
  commit_products();
  wait_products<0>(sums);
}

__global__ void wrong_descriptor(uint32_t*) {
  Arena arena;
  const uint64_t ones = all_of(image_of_ones(arena));
  const uint64_t in_64_bytes = ones ^ uint64_t{3} << 62;
  Sums sums;
  fence_products(sums);
  multiply_add_group<BFloat16, kSide>(sums, ones, in_64_bytes);  // planted: wrong_descriptor
  commit_products();
  wait_products<0>(sums);
}

__global__ void missing_warp(uint32_t*) {
  Arena arena;
  const uint64_t ones = all_of(image_of_ones(arena));
  Sums sums;
  if (warp() == 3) return;
  fence_products(sums);
  multiply_add_group<BFloat16, kSide>(sums, ones, ones);  // planted: missing_warp
  commit_products();
  wait_products<0>(sums);
}

__global__ void warps_apart(uint32_t*) {
  Arena arena;
  const BFloat16* image = image_of_ones(arena);
  const uint64_t mine = describe(image, kSide, 0, warp() / 2 * 16);
  Sums sums;
  fence_products(sums);
  multiply_add_group<BFloat16, kSide>(sums, mine, mine);  // planted: warps_apart
  commit_products();
  wait_products<0>(sums);
}

template <auto kernel>
const char* go(uint32_t* memory) {
  return launch<kernel>({.blocks = 2, .threads = kGroup, .shared = 32768}, memory);
}

}  // namespace

#define TK_PLANTED(name) {#name, &go<name>}

const Planted kPlantedGroups[] = {
    TK_PLANTED(sums_not_fenced),
    TK_PLANTED(left_not_fenced),
    TK_PLANTED(sums_without_wait),
    TK_PLANTED(sums_of_a_later_group),
    TK_PLANTED(product_never_waited),
    TK_PLANTED(overwritten_under_way),
    TK_PLANTED(overwritten_without_barrier),
    TK_PLANTED(operand_not_fenced),
    TK_PLANTED(operand_still_coming),
    TK_PLANTED(misaligned_image),
    TK_PLANTED(tile_with_gaps),
    TK_PLANTED(wrong_descriptor),
    TK_PLANTED(missing_warp),
    TK_PLANTED(warps_apart),
};
const int kPlantedGroupsCount = sizeof kPlantedGroups / sizeof *kPlantedGroups;

}  // namespace tk::cuda::tried
