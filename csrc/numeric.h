// The number types of every kernel: half and bfloat16 as plain structs, and the switch from a
// run-time dtype to a type.
#pragma once

#include <cstdint>
#include <cstring>

namespace tk {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

static inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

static inline float to_float(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return float_of(sign | bits_of(subnormal));
}

template <class T>
T from_float(float value);

template <>
inline __attribute__((always_inline)) float from_float<float>(float value) {
  return value;
}

// Round to nearest even; a NaN stays a NaN.
template <>
inline __attribute__((always_inline)) BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline __attribute__((always_inline)) Half from_float<Half>(float value) {
  const uint32_t bits = bits_of(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude <
      0x38800000u) {  // below 2^-14: adding 0.5 rounds at the last bit of a subnormal half
    const float rounded = float_of(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of(rounded) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// Calls `function` with a value of the C++ type that `dtype` names: dispatch(d, [&](auto zero) {
// using T = decltype(zero); … }).
template <class Function>
static inline __attribute__((always_inline)) void dispatch(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat16:
      return function(Half{});
    case DType::kBFloat16:
      return function(BFloat16{});
  }
}

}  // namespace tk
