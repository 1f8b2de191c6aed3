// What the NumPy bindings of the soft aggregations share: their operands as views.
#pragma once

#include "numpy/bind.h"

namespace tk::bind {

inline Matrices matrices_of(const array& a) {
  const bool batched = a.ndim() == 3;
  return {a.data(), batched ? stride_of(a, 0) : 0, stride_of(a, batched ? 1 : 0)};
}

// None becomes an array of no dimensions.
inline array elements_or_none(const py::object& values) {
  return values.is_none() ? array(py::dtype::of<bool>(), std::vector<py::ssize_t>{})
                          : elements(py::cast<array>(values));
}

template <class T>
PerToken<T> per_token(const array& a) {
  if (a.ndim() == 0) return {};
  return {static_cast<const T*>(a.data()), stride_of(a, 0), stride_of(a, 1)};
}

}  // namespace tk::bind
