// What the NumPy bindings of both merges share.
#pragma once

#include "numpy/bind.h"

namespace tk::bind {

// Sizes (B, P+N), float32, or None.
template <class Params>
inline void set_size(const py::object& size, Params& p) {
  if (size.is_none()) return;
  const auto sizes = py::reinterpret_borrow<array>(size);
  p.size = static_cast<const float*>(sizes.data());
  p.size_batch_stride = stride_of(sizes, 0);
  p.size_token_stride = stride_of(sizes, 1);
}

}  // namespace tk::bind
