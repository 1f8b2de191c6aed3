// Rows of tokens and codebooks as the kernels of vector quantisation take them, from torch tensors.
#pragma once

#include "token_rows.h"
#include "torch/place.h"

namespace tk::bind {

constexpr int64_t kMaxRank = 9;

// A tensor's sizes, where it has the rank that these ops take.
struct Sizes {
  int64_t at[kMaxRank + 1];  // one more: callers append a dimension
  int64_t dims;

  explicit Sizes(const Tensor& tensor) : dims(tensor.dim()) {
    for (int64_t i = 0; i < dims && i < kMaxRank; ++i) at[i] = tensor.size(i);
  }
};

inline TokenRows rows_of(const Tensor& x, bool grouped, const char* op) {
  const Sizes sizes(x);
  check(sizes.dims > grouped && sizes.dims <= kMaxRank, op,
        "x: allowed (…, D) of at most 9 dimensions");
  int64_t strides[kMaxRank];
  for (int64_t i = 0; i < sizes.dims; ++i) strides[i] = x.stride(i);
  TokenRows rows{};
  rows.data = x.data_ptr();
  rows.dtype = dtype_of(x, op);
  check(set_rows(sizes.at, strides, sizes.dims, grouped, rows), op, "x: too many dimensions");
  return rows;
}

inline Codebooks codebooks_of(const Tensor& codebook, const char* op) {
  const int64_t last = codebook.dim() - 1;
  check(last == 1 || last == 2, op, "codebook: allowed (K, D) or (G, K, D)");
  check(codebook.size(last - 1) > 0 && codebook.size(last) > 0 && codebook.size(last) <= 512, op,
        "codebook: allowed at least one code of 1…512 dimensions");
  check(codebook.size(last - 1) < int64_t{1} << 31, op, "codebook: allowed K below 2^31");
  return {codebook.data_ptr(),       dtype_of(codebook, op), last == 2 ? codebook.size(0) : 1,
          codebook.size(last - 1),   codebook.size(last),    last == 2 ? codebook.stride(0) : 0,
          codebook.stride(last - 1), codebook.stride(last)};
}

// The shape of x without its last dimension.
inline Tensor empty_per_row(const Place& place, const Tensor& x, ScalarType type) {
  const Sizes sizes(x);
  return place.empty(sizes.at, sizes.dims - 1, type);
}

inline Tensor empty_of_shape(const Place& place, const Tensor& x) {
  const Sizes sizes(x);
  return place.empty(sizes.at, sizes.dims, x.scalar_type());
}

}  // namespace tk::bind
