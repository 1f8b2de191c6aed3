// What the NumPy bindings of the soft aggregations share: their operands as views.
#pragma once

#include "numpy/bind.h"

namespace tk::bind {

inline Matrices matrices_of(const array& a) {
  const bool batched = a.ndim() == 3;
  return {a.data(), batched ? stride_of(a, 0) : 0, stride_of(a, batched ? 1 : 0)};
}

template <class T>
PerToken<T> per_token(const py::object& values) {
  if (values.is_none()) return {};
  const auto a = py::cast<array>(values);
  return {static_cast<const T*>(a.data()), stride_of(a, 0), stride_of(a, 1)};
}

}  // namespace tk::bind
