// The exact GELU, u·Φ(u) with the normal distribution Φ, and its derivative: for float32, and as
// good as bfloat16 wants it.
#pragma once

#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

// Φ(u), absolute error below 1e-7. Near zero an odd polynomial for erf; in the tails e to a
// polynomial for 1 − erf, so that nothing cancels there.
TK_INLINE Floats normal_cdf(Floats u) {
  const Floats a = u * 0.70710678118654752f;
  const Floats s = a * a;
  const Floats t = a < 0.0f ? -a : a;
  Floats centre = splat(-5.96761703e-4f);
  centre = centre * s + 4.99119423e-3f;
  centre = centre * s + -2.67681349e-2f;
  centre = centre * s + 1.12819925e-1f;
  centre = centre * s + -3.76125336e-1f;
  centre = centre * s + 1.28379166e-1f;
  centre = centre * a + a;
  Floats power =
      (t * -1.72853470e-5f + 3.83197126e-4f) * s + (t * -3.88396438e-3f + 2.42546219e-2f);
  power = power * t + -1.06777877e-1f;
  power = power * t + -6.34846687e-1f;
  power = power * t + -1.28717512e-1f;
  power = power * t - t;
  const Floats tail = exp(power) * 0.5f;
  const Floats outside = select(a < 0.0f, tail, 1.0f - tail);
  return select(t > 0.927734375f, outside, centre * 0.5f + 0.5f);
}

TK_INLINE Floats gelu(Floats u, float) { return u * normal_cdf(u); }

// Φ(u) + u·φ(u)
TK_INLINE Floats gelu_slope(Floats u, float) {
  return normal_cdf(u) + u * 0.39894228040143268f * exp(u * u * -0.5f);
}

// A function that rises from 0 to 1 around the point (0, 1/2): t times a polynomial of t², u
// clamped to t in [−end, end]; its variable is scaled to [−1, 1], where rounding does least.
template <int kCount>
TK_INLINE Floats odd_step(Floats u, float end, const float (&coefficients)[kCount]) {
  const Floats t = max(splat(-end), min(splat(end), u));
  const Floats z = t * t * (2.0f / (end * end)) - 1.0f;
  Floats value = splat(coefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < kCount; ++i) value = value * z + coefficients[i];
  return t * value + 0.5f;
}

// For what is rounded to bfloat16: absolute error below 2e-5, a hundredth of the rounding at 1, and
// below 1e-7·|u| far out.
TK_INLINE Floats gelu(Floats u, BFloat16) {
  constexpr float kPhi[] = {-9.390688501e-4f, 4.220831674e-3f, -7.800432853e-3f, 1.083440799e-2f,
                            -1.751326211e-2f, 2.828838117e-2f, -4.042936489e-2f, 5.472162738e-2f,
                            -7.717622072e-2f, 1.569042206e-1f};
  return u * odd_step(u, 4.5f, kPhi);
}

TK_INLINE Floats gelu_slope(Floats u, BFloat16) {
  constexpr float kSlope[] = {-2.055806667e-2f, 4.653231427e-2f, -2.812759951e-2f, 2.118804678e-2f,
                              -6.808202714e-2f, 9.515140206e-2f, -8.549798280e-2f, 7.707946748e-2f,
                              -7.151963562e-2f, 6.682725251e-2f, -7.512373477e-2f, 1.421305686e-1f};
  return odd_step(u, 5.0f, kSlope);
}

}  // namespace
}  // namespace tk::TK_ISA
