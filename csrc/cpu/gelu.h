// The exact GELU, u·Φ(u) with the normal distribution Φ, and its derivative.
#pragma once

#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

// erf, absolute error below 2e-7: an odd rational function on [−4, 4], where float32 has reached ±1.
TK_INLINE Floats erf(Floats x) {
  const Floats z = max(min(x, splat(4.0f)), splat(-4.0f));
  const Floats y = z * z;
  Floats p = splat(-2.72614225801306e-10f);
  p = p * y + 2.77068142495902e-08f;
  p = p * y + -2.10102402082508e-06f;
  p = p * y + -5.69250639462346e-05f;
  p = p * y + -7.34990630326855e-04f;
  p = p * y + -2.95459980854025e-03f;
  p = p * y + -1.60960333262415e-02f;
  Floats q = splat(-1.45660718464996e-05f);
  q = q * y + -2.13374055278905e-04f;
  q = q * y + -1.68282697438203e-03f;
  q = q * y + -7.37332916720468e-03f;
  q = q * y + -1.42647390514189e-02f;
  return select(x != x, x, z * p / q);
}

// Φ(u)
TK_INLINE Floats normal_cdf(Floats u) { return erf(u * 0.70710678118654752f) * 0.5f + 0.5f; }

TK_INLINE Floats gelu(Floats u) { return u * normal_cdf(u); }

// Φ(u) + u·φ(u)
TK_INLINE Floats gelu_slope(Floats u) {
  return normal_cdf(u) + u * 0.39894228040143268f * exp(u * u * -0.5f);
}

}  // namespace
}  // namespace tk::TK_ISA
