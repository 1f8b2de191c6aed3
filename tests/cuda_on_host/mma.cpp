// The tensor cores: fragments gathered from the lanes of a warp as PTX lays them out, multiplied in
// the order of k, handed back.
#include <cstring>

#include "cuda/launch.cuh"

namespace tk::cuda::host {
namespace {

float element(const uint32_t* registers, int at, BFloat16) {
  return to_float(BFloat16{static_cast<uint16_t>(registers[at / 2] >> (16 * (at % 2)))});
}

float element(const uint32_t* registers, int at, Half) {
  return to_float(Half{static_cast<uint16_t>(registers[at / 2] >> (16 * (at % 2)))});
}

// What is below the 10 bits of a tf32 the cores do not see.
float element(const uint32_t* registers, int at, float) {
  return float_of(registers[at] & ~0x1fffu);
}

// A lane holds `per` neighbours along k in each register, of rows lane / 4 (+ 8) and of k = lane %
// 4 · per (+ 4 · per).
template <class T>
void multiply(Exchanges lanes) {
  constexpr int per = sizeof(T) == 4 ? 1 : 2, depth = 8 * per;
  float a[16][depth], b[depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* from_a = static_cast<const uint32_t*>(lanes[lane].operands[0]);
    const auto* from_b = static_cast<const uint32_t*>(lanes[lane].operands[1]);
    const int row = lane / 4, k = lane % 4 * per;
    for (int i = 0; i < 4 * per; ++i) {
      const int reg = i / per;
      a[row + reg % 2 * 8][k + reg / 2 * 4 * per + i % per] = element(from_a, i, T{});
    }
    for (int i = 0; i < 2 * per; ++i)
      b[k + i / per * 4 * per + i % per][row] = element(from_b, i, T{});
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* sum = static_cast<float*>(const_cast<void*>(lanes[lane].operands[2]));
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < depth; ++k) sum[i] += a[row][k] * b[k][column];
    }
  }
}

// Lane 8m + r names row r of matrix m, 16 bytes; a lane gets two neighbours of row lane / 4, or,
// transposed, of column lane / 4.
void settle_matrices(Exchanges lanes, uint32_t) {
  const int count = lanes[0].lane_wanted;
  const bool transposed = lanes[0].value[0] != 0;
  for (int lane = 0; lane < 32; ++lane) {
    auto* to = static_cast<uint32_t*>(const_cast<void*>(lanes[lane].operands[1]));
    for (int m = 0; m < count; ++m) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = transposed ? lane % 4 * 2 + i : lane / 4;
        const int column = transposed ? lane / 4 : lane % 4 * 2 + i;
        const auto* from = static_cast<const char*>(lanes[m * 8 + row].operands[0]);
        std::memcpy(&pair[i], from + column * 2, 2);
      }
      to[m] = uint32_t{pair[0]} | uint32_t{pair[1]} << 16;
    }
  }
}

}  // namespace

void load_matrices(uint32_t* to, int count, bool transposed, const void* row, Site site) {
  if (lane() < count * 8) touch(row, 16, Use::kRead, true, TK_CALLER);
  Exchange give{};
  give.operands[0] = row;
  give.operands[1] = to;
  give.lane_wanted = count;
  give.value[0] = transposed;
  exchange("load_matrices", settle_matrices, kAllLanes, site, give);
}

void settle_product_bf16(Exchanges lanes, uint32_t) { multiply<BFloat16>(lanes); }
void settle_product_fp16(Exchanges lanes, uint32_t) { multiply<Half>(lanes); }
void settle_product_tf32(Exchanges lanes, uint32_t) { multiply<float>(lanes); }

}  // namespace tk::cuda::host
