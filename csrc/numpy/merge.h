// What the NumPy bindings of both merges share.
#pragma once

#include "numpy/bind.h"

namespace tk::bind {

// x (B, P+N, C) and sizes (B, P+N), float32, or None. Returns the sizes that p points to.
template <class Params>
[[nodiscard]] inline py::object set_inputs(const array& x, const py::object& size, const char* op,
                                           Params& p) {
  p.x = x.data();
  p.dtype = dtype_of(x, op);
  p.batch = x.shape(0);
  p.channels = x.shape(2);
  p.batch_stride = stride_of(x, 0);
  p.token_stride = stride_of(x, 1);
  if (size.is_none()) return size;
  const array sizes = elements(py::reinterpret_borrow<array>(size));
  p.size = static_cast<const float*>(sizes.data());
  p.size_batch_stride = stride_of(sizes, 0);
  p.size_token_stride = stride_of(sizes, 1);
  return sizes;
}

// Outputs with as many rows as there may be, and what of them there is in the end.
struct Merged {
  array tokens, sizes, index, offsets;

  template <class Params>
  Merged(int64_t rows, int64_t length, const py::dtype& dtype, Params& p)
      : tokens(empty({rows, p.channels}, dtype)),
        sizes(empty({rows}, py::dtype::of<float>())),
        index(empty({p.batch, length}, py::dtype::of<int64_t>())),
        offsets(empty({p.batch + 1}, py::dtype::of<int64_t>())) {
    p.tokens = tokens.mutable_data();
    p.merged_size = static_cast<float*>(sizes.mutable_data());
    p.index = static_cast<int64_t*>(index.mutable_data());
    p.offsets = static_cast<int64_t*>(offsets.mutable_data());
  }

  py::tuple head(int64_t rows) const {
    const py::slice first(0, rows, 1);
    return py::make_tuple(tokens[first], sizes[first], index, offsets);
  }

  py::tuple dense(int64_t batch, int64_t rows, int64_t channels) const {
    const array all = tokens[py::slice(0, batch * rows, 1)],
                all_sizes = sizes[py::slice(0, batch * rows, 1)];
    return py::make_tuple(array(all).reshape({batch, rows, channels}),
                          array(all_sizes).reshape({batch, rows}), index, offsets);
  }
};

}  // namespace tk::bind
