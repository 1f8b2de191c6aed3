// Vectors of float, as wide as the instruction set this file is compiled for; halves are widened on
// load, rounded on store. Everything here is internal to one object file, so that code of a wider
// instruction set can never be linked for an older machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.h"
#include "tokenkernels.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define TK_INLINE inline __attribute__((always_inline))

namespace tk::TK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <class T>
TK_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
TK_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

TK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Subtracting zero keeps every bit and folds into a broadcast; adding zero does not (−0).
TK_INLINE Floats splat(float value) { return value - Floats{}; }

TK_INLINE Ints splat_int(int32_t value) { return Ints{} + value; }

TK_INLINE Ints iota() {
  Ints lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

TK_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

TK_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

#if defined(__AVX512F__)
TK_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

TK_INLINE Floats widen(__m256i bits, BFloat16) {
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

TK_INLINE Floats widen(__m256i bits, Half) { return _mm512_cvtph_ps(bits); }

TK_INLINE __m256i narrow(Floats value, Half) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}

TK_INLINE __m256i narrow(Floats value, BFloat16) {
#if defined(__AVX512BF16__)
  // The instruction takes denormals for zeros.
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(value, kDenormal) == 0, 1))
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#endif
  const __m512i bits = reinterpret_cast<__m512i>(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

template <class T>
TK_INLINE Floats load(const T* from) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), T{});
}

template <class T>
TK_INLINE void store(T* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(value, T{}));
}

// The first `count` elements (0 ≤ count ≤ kLanes), zeros behind them.
TK_INLINE Floats load(const float* from, int count) {
  return _mm512_maskz_loadu_ps(first(count), from);
}

template <class T>
TK_INLINE Floats load(const T* from, int count) {
  return widen(_mm256_maskz_loadu_epi16(first(count), from), T{});
}

TK_INLINE void store(float* to, Floats value, int count) {
  _mm512_mask_storeu_ps(to, first(count), value);
}

template <class T>
TK_INLINE void store(T* to, Floats value, int count) {
  _mm256_mask_storeu_epi16(to, first(count), narrow(value, T{}));
}

#else

#if defined(__AVX2__)
TK_INLINE Floats load(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

TK_INLINE Floats load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

TK_INLINE void store(Half* to, Floats value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

TK_INLINE void store(BFloat16* to, Floats value) {
  const __m256i bits = reinterpret_cast<__m256i>(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#else
template <class T>
TK_INLINE Floats load(const T* from) {
  Floats value{};
  for (int i = 0; i < kLanes; ++i) value[i] = to_float(from[i]);
  return value;
}

template <class T>
TK_INLINE void store(T* to, Floats value) {
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<T>(value[i]);
}
#endif

// The first `count` elements (0 ≤ count ≤ kLanes), zeros behind them.
template <class T>
TK_INLINE Floats load(const T* from, int count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, from, sizeof(T) * static_cast<size_t>(count));
  return load(buffer);
}

template <class T>
TK_INLINE void store(T* to, Floats value, int count) {
  T buffer[kLanes];
  store(buffer, value);
  std::memcpy(to, buffer, sizeof(T) * static_cast<size_t>(count));
}
#endif

TK_INLINE Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

// a > b ? a : b and a < b ? a : b: b where one is NaN.
#if defined(__AVX512F__)
TK_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }

TK_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
#else
TK_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }

TK_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
#endif

// The upper half of `width` lanes in the place of the lower; what lies in the others does not
// matter.
template <int kWidth, class T>
TK_INLINE T upper_half(T value) {
  Ints from = iota();
  for (int i = 0; i < kLanes; ++i) from[i] = (i + kWidth / 2) % kLanes;
  return __builtin_shuffle(value, from);
}

// combine(lane i, lane i + width/2) for halving widths, in registers. Always the same tree: the
// same bits every time.
template <int kWidth = kLanes, class T, class Combine>
TK_INLINE auto fold(T value, const Combine& combine) {
  if constexpr (kWidth == 1) {
    return value[0];
  } else {
    return fold<kWidth / 2>(combine(value, upper_half<kWidth>(value)), combine);
  }
}

TK_INLINE float sum(Floats value) {
  return fold(value, [](Floats a, Floats b) { return a + b; });
}

TK_INLINE float max(Floats value) {
  return fold(value, [](Floats a, Floats b) { return a < b ? b : a; });
}

TK_INLINE int32_t min(Ints value) {
  return fold(value, [](Ints a, Ints b) { return b < a ? b : a; });
}

// value · 2^power; `shifted` is the power as an integer above 1.5·2^23.
TK_INLINE Floats scale_by_power(Floats value, [[maybe_unused]] Floats power,
                                [[maybe_unused]] Floats shifted) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(value, power);
#else
  // In two factors: the power runs to 128, one factor would overflow its exponent.
  const Ints exponent = reinterpret_cast<Ints>(shifted) - 0x4b400000;
  const Ints half = exponent >> 1;
  const Floats scale1 = reinterpret_cast<Floats>((half + 127) << 23);
  const Floats scale2 = reinterpret_cast<Floats>((exponent - half + 127) << 23);
  return value * scale1 * scale2;
#endif
}

// e^x, relative error below 2 ulp; 0 below −87.34 (and for −inf), inf above 88.73, NaN for NaN.
TK_INLINE Floats exp(Floats x) {
  const Floats clamped = max(min(x, splat(89.0f)), splat(-88.0f));
  const Floats shifted =
      clamped * 1.44269504088896341f + 12582912.0f;  // 1.5·2^23: rounds to an integer
  const Floats power = shifted - 12582912.0f;
  const Floats r = (clamped - power * 0.693359375f) - power * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats result = scale_by_power(p, power, shifted);
  return select(x != x, x, select(x < -87.33654475f, splat(0.0f), result));
}

// 2^x, relative error below 2 ulp; inf above 128, 0 far below −126, NaN for NaN.
TK_INLINE Floats exp2(Floats x) {
  const Floats clamped = max(splat(-200.0f), min(splat(129.0f), x));
  const Floats shifted = clamped + 12582912.0f;  // 1.5·2^23: rounds to an integer
  const Floats power = shifted - 12582912.0f;
  const Floats r = clamped - power;
  Floats y = splat(1.326472639e-3f);
  y = y * r + 9.671512697e-3f;
  y = y * r + 5.550733746e-2f;
  y = y * r + 2.402224208e-1f;
  y = y * r + 6.931469776e-1f;
  y = y * r + 1.0f;
  return scale_by_power(y, power, shifted);
}

// e^x where x ≤ 0, as a softmax has it: absolute error below 2e-7, NaN for NaN.
TK_INLINE Floats exp_below(Floats x) { return exp2(x * 1.44269504088896341f); }

// How many items make a range worth a thread of its own, when one costs about `cost` bytes moved or
// multiply-adds.
TK_INLINE int64_t grain_of(int64_t cost) {
  return larger<int64_t>(1, (1 << 18) / larger<int64_t>(1, cost));
}

// Threads for so many multiply-adds: one where waking others costs more than they save.
TK_INLINE int threads_for(int threads, int64_t products) {
  return products < (1 << 19) ? 1 : threads;
}

// Runs body(begin, end) over [0, count) on the binding's threads.
template <class Body>
TK_INLINE void parallel_for(const Pool& pool, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain || pool.threads == 1) return body(int64_t{0}, count);
  pool.run(
      count, grain,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      &body);
}

// The first `count` elements, mostly all of them: the partial load of a narrow instruction set goes
// through memory.
template <class T>
TK_INLINE Floats load_some(const T* from, int count) {
  return count == kLanes ? load(from) : load(from, count);
}

template <class T>
TK_INLINE void store_some(T* to, Floats value, int count) {
  if (count == kLanes) return store(to, value);
  store(to, value, count);
}

}  // namespace
}  // namespace tk::TK_ISA
