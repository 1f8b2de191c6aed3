// What every NumPy binding needs: arrays as plain pointers and strides, fresh outputs.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "numpy/threads.h"
#include "tokenkernels.h"

namespace tk::bind {

namespace py = pybind11;
using py::array;

inline void check(bool good, const char* op, const std::string& message) {
  if (!good) throw py::value_error(std::string(op) + ": " + message);
}

inline void check(Status status, const char* op, const std::string& message) {
  check(status == Status::kOk, op, message);
}

// float32, float16, and ml_dtypes' bfloat16, which NumPy knows as a two-byte type of kind 'V'.
inline DType dtype_of(const array& a, const char* op) {
  const char kind = a.dtype().kind();
  if (kind == 'f' && a.itemsize() == 4) return DType::kFloat32;
  if (kind == 'f' && a.itemsize() == 2) return DType::kFloat16;
  if (kind == 'V' && a.itemsize() == 2) return DType::kBFloat16;
  throw py::type_error(std::string(op) +
                       ": dtype: allowed float32, float16, bfloat16 (ml_dtypes), got " +
                       py::str(a.dtype()).cast<std::string>());
}

// A stride in elements; kernels never take steps that are no whole number of them.
inline int64_t stride_of(const array& a, int axis) { return a.strides(axis) / a.itemsize(); }

inline bool aligned(const array& a) {
  bool good = reinterpret_cast<uintptr_t>(a.data()) % static_cast<size_t>(a.itemsize()) == 0;
  for (int axis = 0; axis < a.ndim(); ++axis) good = good && a.strides(axis) % a.itemsize() == 0;
  return good;
}

// A C-ordered copy, where elements are not aligned (a field of a structured array, say).
inline array elements(const array& a) {
  return aligned(a)
             ? a
             : array::ensure(a, array::c_style | array::forcecast).attr("copy")().cast<array>();
}

// The elements one behind the other, aligned; a copy where they are not.
inline array contiguous(const array& a) { return elements(array::ensure(a, array::c_style)); }

// A C-ordered copy, where the last dimension is not contiguous.
inline array rows_contiguous(const array& a) {
  const bool good =
      a.ndim() == 0 || a.shape(a.ndim() - 1) <= 1 || a.strides(a.ndim() - 1) == a.itemsize();
  return good ? elements(a) : contiguous(a);
}

// For tests: whether outputs and scratch arrive as NaN, in every type.
extern bool poisoned;

inline array empty(std::vector<py::ssize_t> shape, const py::dtype& dtype) {
  array result(dtype, std::move(shape));
  if (poisoned) std::memset(result.mutable_data(), 0xff, static_cast<size_t>(result.nbytes()));
  return result;
}

// Bytes that a kernel borrows for one call; few of them cost no allocation.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > static_cast<int64_t>(sizeof small_)) {
      large_.reset(new char[static_cast<size_t>(bytes) + 64]);
      data_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(large_.get()) + 63) &
                                      ~uintptr_t{63});
    }
    if (poisoned) std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  Scratch(const Scratch&) = delete;
  void* data() { return data_; }

 private:
  alignas(64) char small_[4096];
  std::unique_ptr<char[]> large_;
  void* data_ = small_;
};

}  // namespace tk::bind
