// Rows of tokens and codebooks as the kernels of vector quantisation take them, from NumPy arrays.
#pragma once

#include "numpy/bind.h"
#include "token_rows.h"

namespace tk::bind {

using Shape = std::vector<py::ssize_t>;

inline TokenRows rows_of(const array& x, bool grouped, const char* op) {
  std::vector<int64_t> sizes(x.shape(), x.shape() + x.ndim()), strides;
  for (int axis = 0; axis < x.ndim(); ++axis) strides.push_back(stride_of(x, axis));
  check(x.ndim() > static_cast<int>(grouped), op, "x: allowed (…, D)");
  TokenRows rows{};
  rows.data = x.data();
  rows.dtype = dtype_of(x, op);
  check(set_rows(sizes.data(), strides.data(), x.ndim(), grouped, rows), op,
        "x: too many dimensions");
  return rows;
}

inline Codebooks codebooks_of(const array& codebook, const char* op) {
  const auto last = codebook.ndim() - 1;
  return {codebook.data(),
          dtype_of(codebook, op),
          last == 2 ? codebook.shape(0) : 1,
          codebook.shape(last - 1),
          codebook.shape(last),
          last == 2 ? stride_of(codebook, 0) : 0,
          stride_of(codebook, static_cast<int>(last) - 1),
          stride_of(codebook, static_cast<int>(last))};
}

inline Shape shape_of(const array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

inline Shape shape_per_row(const array& x) { return Shape(x.shape(), x.shape() + x.ndim() - 1); }

}  // namespace tk::bind
