// Reads rows of any strides and number type as floats.
#pragma once

#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

TK_INLINE int64_t offset_of(const TokenRows& x, int64_t row, int64_t group) {
  int64_t offset = group * x.group_stride;
  for (int d = x.dims - 1; d > 0; --d) {
    offset += row % x.sizes[d] * x.strides[d];
    row /= x.sizes[d];
  }
  return x.dims > 0 ? offset + row * x.strides[0] : offset;
}

// `count` elements, `stride` apart, widened.
TK_INLINE void read_row(const void* data, DType dtype, int64_t offset, int64_t stride,
                        int64_t count, float* to) {
  dispatch(dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(data) + offset;
    if (stride != 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * stride]);
      return;
    }
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count)
      store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
  });
}

TK_INLINE void read_row(const TokenRows& x, int64_t row, int64_t group, int64_t count, float* to) {
  read_row(x.data, x.dtype, offset_of(x, row, group), x.stride, count, to);
}

}  // namespace
}  // namespace tk::TK_ISA
