// Kernels without fault: products of tiles, in every dtype and however the tiles lie.
#include <cmath>
#include <vector>

#include "cuda/product.cuh"
#include "cuda_on_host/planted.h"

namespace tk::cuda::tried {
namespace {

// (32, depth) · (depth, 24), depth 80; then that, summed, times itself: (32, 24) · (24, 24).
constexpr int kRows = 32, kColumns = 24, kLong = 80, kSecond = 48;

template <class T, Lies left_lies, Lies right_lies>
__global__ void tiles_kernel(const T* left, const T* right, const T* second, float* to) {
  constexpr int left_columns = left_lies == kAlong ? kLong : kRows;
  constexpr int right_columns = right_lies == kAlong ? kLong : kColumns;
  constexpr int left_stride = tile_stride<T>(left_columns);
  constexpr int right_stride = tile_stride<T>(right_columns);
  constexpr int second_stride = tile_stride<T>(kColumns);
  Arena arena;
  T* a = arena.shared<T>(left_stride * (left_lies == kAlong ? kRows : kLong));
  T* b = arena.shared<T>(right_stride * (right_lies == kAlong ? kColumns : kLong));
  T* c = arena.shared<T>(second_stride * kSecond);
  fetch_tile(a, left_stride, left_lies == kAlong ? kRows : kLong, left_columns, left, left_columns,
             left_lies == kAlong ? kRows : kLong, left_columns, true);
  fetch_tile(b, right_stride, right_lies == kAlong ? kColumns : kLong, right_columns, right,
             right_columns, right_lies == kAlong ? kColumns : kLong, right_columns, false);
  fetch_tile(c, second_stride, kSecond, kColumns, second, kColumns, kSecond - 1, kColumns - 8,
             true);
  commit_copies();
  wait_copies<0>();
  sync();
  float sums[2][6][4] = {};  // 24 columns and 24 of zeros: terms in pairs of 16
  float three[2][3][4] = {};
  add_product<T, left_lies, right_lies>(three, a, left_stride, b, right_stride, kLong);
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j)
      for (int v = 0; v < 4; ++v) sums[i][j][v] = three[i][j][v];
  float again[2][3][4] = {};
  add_product_of_sums<T, kAcross>(again, sums, c, second_stride);
  for_sums(three, [&](float sum, int row, int column) { to[row * kColumns + column] = sum; });
  to += kRows * kColumns;
  for_sums(again, [&](float sum, int row, int column) { to[row * kColumns + column] = sum; });
}

template <class T, Lies left_lies, Lies right_lies>
const char* run_tiles() {
  alignas(16) static T left[kRows * kLong], right[kColumns * kLong], second[kSecond * kColumns];
  std::vector<float> to(2 * kRows * kColumns);
  const auto value = [](int i) {
    return from_float<T>(static_cast<float>(i * 37 % 101 - 50) / 64.f);
  };
  for (int i = 0; i < kRows * kLong; ++i) left[i] = value(i);
  for (int i = 0; i < kColumns * kLong; ++i) right[i] = value(3 * i + 1);
  for (int i = 0; i < kSecond * kColumns; ++i) second[i] = value(7 * i + 2);
  constexpr int64_t most = shared_bytes<T>(tile_stride<T>(kLong) * kLong);
  launch<tiles_kernel<T, left_lies, right_lies>>({.blocks = 1, .threads = 32, .shared = 3 * most},
                                                 left, right, second, to.data());
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      double want = 0, size = 0, next = 0, next_size = 0;
      for (int k = 0; k < kLong; ++k) {
        const double a = to_float(left_lies == kAlong ? left[r * kLong + k] : left[k * kRows + r]);
        const double b =
            to_float(right_lies == kAlong ? right[c * kLong + k] : right[k * kColumns + c]);
        want += a * b;
        size += std::fabs(a * b);
      }
      if (std::fabs(to[r * kColumns + c] - want) > kLong * 0x1p-24 * size) return "a product";
      for (int k = 0; k < kColumns; ++k) {
        const double b = c < kColumns - 8 ? to_float(second[k * kColumns + c]) : 0;
        const double a = to_float(from_float<T>(to[r * kColumns + k]));
        next += a * b;
        next_size += std::fabs(a * b);
      }
      if (std::fabs(to[kRows * kColumns + r * kColumns + c] - next) >
          kColumns * 0x1p-24 * next_size)
        return "a product of sums";
    }
  }
  return nullptr;
}

}  // namespace

const Sound kSoundProducts[] = {
    {"bfloat16 rows", &run_tiles<BFloat16, kAlong, kAlong>},
    {"bfloat16 columns", &run_tiles<BFloat16, kAcross, kAcross>},
    {"float16 mixed", &run_tiles<Half, kAcross, kAlong>},
    {"float32 rows", &run_tiles<float, kAlong, kAlong>},
    {"float32 columns", &run_tiles<float, kAcross, kAcross>},
};
const int kSoundProductsCount = sizeof kSoundProducts / sizeof *kSoundProducts;

}  // namespace tk::cuda::tried
