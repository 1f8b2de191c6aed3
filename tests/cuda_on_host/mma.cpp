// The tensor cores: fragments gathered from the lanes of a warp as PTX lays them out, multiplied in
// the order of k, handed back.
#include <cstring>

#include "cuda/launch.cuh"

// All that takes or gives eight numbers at once is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace tk::cuda::host {
namespace {

// Eight numbers side by side, and the registers that hold them.
using Floats [[gnu::vector_size(32), gnu::may_alias]] = float;
using Registers [[gnu::vector_size(32), gnu::may_alias]] = uint32_t;

TK_INLINE Floats floats_of(Registers bits) {
  Floats values;
  std::memcpy(&values, &bits, sizeof values);
  return values;
}

// Number `at` of those that a register holds.
TK_INLINE Floats part(Registers registers, int at, BFloat16) {
  return floats_of(at == 0 ? registers << 16 : registers & 0xffff0000u);
}

TK_INLINE Floats part(Registers registers, int at, Half) {
  const Registers bits = registers >> (16 * at), size = (bits & 0x7fffu) << 13;
  Floats scaled = floats_of(size) * 0x1p112f;
  Registers wide;
  std::memcpy(&wide, &scaled, sizeof wide);
  const Registers endless = (size >= (0x7c00u << 13)) & 0x7f800000u;
  return floats_of(wide | endless | (bits & 0x8000u) << 16);
}

// What is below the 10 bits of a tf32 the cores do not see.
TK_INLINE Floats part(Registers registers, int, float) { return floats_of(registers & ~0x1fffu); }

// A lane holds `per` neighbours along k in each register, of rows lane / 4 (+ 8) and of k = lane %
// 4 · per (+ 4 · per).
template <class T>
[[gnu::target_clones("avx2", "default")]] void multiply(const uint32_t* const* a_of,
                                                        const uint32_t* const* b_of,
                                                        float* const* sum_of) {
  constexpr int per = sizeof(T) == 4 ? 1 : 2, depth = 8 * per;
  alignas(32) uint32_t a[16][8], b[8][8];
  alignas(32) float sum[16][8], factors[per][8];
#pragma GCC unroll 4
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, at = lane % 4;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][at + i / 2 * 4] = a_of[lane][i];
    for (int i = 0; i < 2; ++i) b[at + i * 4][row] = b_of[lane][i];
    for (int i = 0; i < 2; ++i) std::memcpy(&sum[row + i * 8][at * 2], sum_of[lane] + i * 2, 8);
  }
  Floats columns[depth];
  for (int k = 0; k < depth; ++k)
    columns[k] = part(*reinterpret_cast<const Registers*>(b[k / per]), k % per, T{});
  for (int row = 0; row < 16; ++row) {
    for (int i = 0; i < per; ++i) {
      const Floats some = part(*reinterpret_cast<const Registers*>(a[row]), i, T{});
      std::memcpy(factors[i], &some, sizeof some);
    }
    Floats total;
    std::memcpy(&total, sum[row], sizeof total);
#pragma GCC unroll 16
    for (int k = 0; k < depth; ++k) total += factors[k % per][k / per] * columns[k];
    std::memcpy(sum[row], &total, sizeof total);
  }
#pragma GCC unroll 4
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, at = lane % 4;
    for (int i = 0; i < 2; ++i) std::memcpy(sum_of[lane] + i * 2, &sum[row + i * 8][at * 2], 8);
  }
}

template <class T>
void settle_product(Exchanges lanes, uint32_t) {
  const uint32_t *a[32], *b[32];
  float* sum[32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = lanes[lane].operands;
    a[lane] = static_cast<const uint32_t*>(operands[0]);
    b[lane] = static_cast<const uint32_t*>(operands[1]);
    sum[lane] = static_cast<float*>(const_cast<void*>(operands[2]));
  }
  multiply<T>(a, b, sum);
}

// Lane 8m + r names row r of matrix m, 16 bytes; a lane gets two neighbours of row lane / 4, or,
// transposed, of column lane / 4.
void settle_matrices(Exchanges lanes, uint32_t) {
  const int count = lanes[0].asked.lane_wanted;
  const bool transposed = lanes[0].value.at[0] != 0;
  const uint16_t* rows[32];
  for (int lane = 0; lane < 32; ++lane)
    rows[lane] = static_cast<const uint16_t*>(lanes[lane].operands[0]);
  for (int lane = 0; lane < 32; ++lane) {
    auto* to = static_cast<uint32_t*>(const_cast<void*>(lanes[lane].operands[1]));
    for (int m = 0; m < count; ++m) {
      uint16_t pair[2];
      if (transposed) {
        for (int i = 0; i < 2; ++i) pair[i] = rows[m * 8 + lane % 4 * 2 + i][lane / 4];
      } else {
        for (int i = 0; i < 2; ++i) pair[i] = rows[m * 8 + lane / 4][lane % 4 * 2 + i];
      }
      to[m] = uint32_t{pair[0]} | uint32_t{pair[1]} << 16;
    }
  }
}

constexpr Meeting kLoad = {"load_matrices", settle_matrices};
constexpr Meeting kProducts[] = {{"multiply_add", settle_product<float>},
                                 {"multiply_add", settle_product<Half>},
                                 {"multiply_add", settle_product<BFloat16>}};

}  // namespace

void load_matrices(uint32_t* to, int count, bool transposed, const void* row, Site site) {
  if (now.thread % 32 < count * 8) touch(row, 16, Use::kRead, true, TK_CALLER);
  const void** operands = now.fiber->exchange.operands;
  operands[0] = row;
  operands[1] = to;
  exchange(kLoad, {kAllLanes, count}, site, {transposed, 0});
}

void multiply_add(float* sum, const uint32_t* a, const uint32_t* b, DType kind, Site site) {
  const void** operands = now.fiber->exchange.operands;
  operands[0] = a;
  operands[1] = b;
  operands[2] = sum;
  const int number = kind == DType::kFloat32 ? 0 : kind == DType::kFloat16 ? 1 : 2;
  exchange(kProducts[number], {kAllLanes}, site, {});
}

}  // namespace tk::cuda::host
