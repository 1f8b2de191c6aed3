// Where a token lies, for kernels that read tokens in any layout.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

// In elements from the first.
__device__ inline int64_t offset_of(const TokenRows& x, int64_t row, int64_t group) {
  int64_t offset = group * x.group_stride;
#pragma unroll 1
  for (int d = x.dims - 1; d > 0; --d) {
    const int64_t rest = row / x.sizes[d];
    offset += (row - rest * x.sizes[d]) * x.strides[d];
    row = rest;
  }
  return x.dims > 0 ? offset + row * x.strides[0] : offset;
}

}  // namespace tk::cuda
