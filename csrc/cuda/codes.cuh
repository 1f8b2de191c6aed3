// Tokens and codes as the kernels of vector quantisation read them, in any dtype and any layout,
// and the exact score of a token and a code.
//
// An exact score is −‖x−e‖² (l2), ⟨x, e⟩ (dot), or ⟨x, e⟩ / ‖e‖ (cosine) from the values as they
// came, in runs of kRun terms that are added up one after the other. A thread alone and a team of
// lanes get the same bits, so which of them found a code does not matter.
#pragma once

#include "cuda/token_rows.cuh"

namespace tk::cuda {

using Metric = AssignNearest::Metric;

constexpr int kTeam = 8;  // lanes that share a vector
constexpr int kRun = 32;
constexpr int kMostDim = 512;
constexpr float kNever = -1e38f;  // the bias of a code that must not win: no other score is as low
constexpr float kNothing = -3e38f;
constexpr float kInfinity = __builtin_inff();

// One vector of numbers, wherever they lie.
struct Numbers {
  const void* data;
  DType dtype;
  int64_t stride;
  bool wide;  // starts at a multiple of 16 bytes, and lies in one piece

  __device__ float one(int64_t d) const {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[d * stride];
    const uint16_t bits = static_cast<const uint16_t*>(data)[d * stride];
    return dtype == DType::kFloat16 ? widen(Half{bits}) : widen(BFloat16{bits});
  }

  // Elements d … d+7 of `dim`, zeros behind them; d is a multiple of 8.
  __device__ void eight(int d, int dim, float (&to)[8]) const {
    if (!wide || d + 8 > dim) {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = d + i < dim ? one(d + i) : 0.0f;
    } else if (dtype == DType::kFloat32) {
      const float* from = static_cast<const float*>(data) + d;
      const auto low = load<Vector<float, 4>>(from), high = load<Vector<float, 4>>(from + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = i < 4 ? low.at[i] : high.at[i - 4];
    } else {
      const auto part = load<Vector<uint16_t, 8>>(static_cast<const uint16_t*>(data) + d);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        to[i] = dtype == DType::kFloat16 ? widen(Half{part.at[i]}) : widen(BFloat16{part.at[i]});
      }
    }
  }
};

__device__ inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__device__ inline const void* moved(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * bytes_of(dtype);
}

__device__ inline Numbers token_at(const TokenRows& x, bool wide, int64_t row, int64_t group) {
  return {moved(x.data, x.dtype, offset_of(x, row, group)), x.dtype, x.stride, wide};
}

__device__ inline Numbers code_at(const Codebooks& book, bool wide, int64_t group, int64_t code) {
  const int64_t offset = group * book.group_stride + code * book.code_stride;
  return {moved(book.data, book.dtype, offset), book.dtype, book.stride, wide};
}

// Whether every vector lies in one piece that begins at a multiple of 16 bytes.
inline bool lies_wide(const void* data, DType dtype, int64_t stride, int64_t places) {
  const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  return stride == 1 && ((places * size_of(dtype)) | at) % 16 == 0;
}

inline bool lies_wide(const TokenRows& x) {
  int64_t places = x.group_stride;
  for (int d = 0; d < x.dims; ++d) places |= x.strides[d];
  return lies_wide(x.data, x.dtype, x.stride, places);
}

inline bool lies_wide(const Codebooks& book) {
  return lies_wide(book.data, book.dtype, book.stride, book.group_stride | book.code_stride);
}

__device__ inline float fused(float a, float b, float sum) { return fmaf(a, b, sum); }

// Of a number and NaN, the number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline float smaller(float a, float b) { return fminf(a, b); }

__device__ inline bool is_finite(float x) { return x - x == 0.0f; }

__device__ inline float with_term(bool differences, float sum, float x, float e) {
  const float apart = x - e;
  return differences ? fused(apart, apart, sum) : fused(x, e, sum);
}

// Terms [begin, begin + kRun) of ‖x−e‖² or ⟨x, e⟩.
__device__ inline float run_of(const Numbers& x, const Numbers& e, int begin, int dim,
                               bool differences) {
  float sum = 0;
#pragma unroll 1
  for (int d = begin; d < begin + kRun && d < dim; d += 8) {
    float a[8], b[8];
    x.eight(d, dim, a);
    e.eight(d, dim, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = with_term(differences, sum, a[i], b[i]);
  }
  return sum;
}

// ‖x−e‖² or ⟨x, e⟩ by one thread.
__device__ inline float total_of(const Numbers& x, const Numbers& e, int dim, bool differences) {
  float total = 0;
#pragma unroll 1
  for (int d = 0; d < dim; d += kRun) total += run_of(x, e, d, dim, differences);
  return total;
}

// The same by every team of a warp for vectors of its own; a team that does not `need` it takes
// part all the same.
__device__ inline float team_total(const Numbers& x, const Numbers& e, int dim, bool differences,
                                   bool need) {
  const int mine = lane() % kTeam;
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int begin = (i * kTeam + mine) * kRun;
    if (need && begin < dim) sums[i] = run_of(x, e, begin, dim, differences);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll 1
    for (int run = 0; run < kTeam && (i * kTeam + run) * kRun < dim; ++run)
      total += shuffle(sums[i], lane() - mine + run);
  }
  return total;
}

// What a total means: higher is nearer, and no number is −∞. −0 is 0.
__device__ inline float score_of(float total, Metric metric, float factor) {
  const float score = metric == Metric::kL2 ? -total : total * factor;
  return score == score ? score + 0.0f : -kInfinity;
}

// 1 − cosine of a team's vectors. Between vectors of length 1, ½‖x−e‖² loses no digits near 0.
__device__ inline float team_cosine_distance(const Numbers& x, const Numbers& e, int dim,
                                             bool need) {
  const float x_length = sqrtf(team_total(x, x, dim, false, need));
  const float e_length = sqrtf(team_total(e, e, dim, false, need));
  const float x_norm = x_length < 1e-12f ? 1e-12f : x_length;  // NaN stays NaN
  const float e_norm = e_length < 1e-12f ? 1e-12f : e_length;
  const bool differ = x_length > 1e-12f && e_length > 1e-12f;
  float sum = 0;
  for (int d = lane() % kTeam * 8; need && d < dim; d += kTeam * 8) {
    float a[8], b[8];
    x.eight(d, dim, a);
    e.eight(d, dim, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = with_term(differ, sum, a[i] / x_norm, b[i] / e_norm);
  }
  for (int step = kTeam / 2; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  return differ ? 0.5f * sum : 1.0f - sum;
}

// A score and its code as one word: the largest is the highest score, of equal ones the first code.
__device__ inline uint64_t key_of(float score, int64_t code) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return uint64_t{bits} << 32 | (0xffffffffu - static_cast<uint32_t>(code));
}

// The code of a key; 0 of the key 0, which stands for none.
__device__ inline int64_t code_of(uint64_t key) {
  return key == 0 ? 0 : int64_t{0xffffffffu - static_cast<uint32_t>(key)};
}

}  // namespace tk::cuda
