// The exact GELU, u·Φ(u) with the normal distribution Φ, and its derivative.
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

TK_INLINE Floats gelu(Floats u) { return u * normal_cdf(u); }

// Φ(u) + u·φ(u)
TK_INLINE Floats gelu_slope(Floats u) {
  return normal_cdf(u) + u * 0.39894228040143268f * exp(u * u * -0.5f);
}

}  // namespace
}  // namespace tk::TK_ISA
