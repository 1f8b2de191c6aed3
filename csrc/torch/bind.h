// What every torch binding needs: views of tensors as plain pointers and strides, fresh outputs,
// errors that reach Python as words.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tokenkernels.h"

namespace tk::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Memory safety only: what users do wrong is told by the Python front, in better words. "op: …"
// arrives there as ValueError.
inline void check(bool good, const char* op, const std::string& message) {
  if (!good) throw std::runtime_error(std::string(op) + ": " + message);
}

// Words that are there already cost a good call nothing.
inline void check(bool good, const char* op, const char* message) {
  if (!good) check(false, op, std::string(message));
}

inline void check(Status status, const char* op, const std::string& message) {
  check(status == Status::kOk, op, message);
}

inline bool is_number(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline DType dtype_of(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      check(false, op,
            "dtype: allowed float32, float16, bfloat16 (backend=\"reference\" takes float64)");
  }
  return DType::kFloat32;
}

// At most 16 dimensions.
inline Tensor empty(const int64_t* sizes, int64_t dims, ScalarType type,
                    int32_t device_type = aoti_torch_device_type_cpu(), int32_t device = 0) {
  int64_t strides[16];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    const bool fits = !__builtin_mul_overflow(stride, sizes[i] > 1 ? sizes[i] : 1, &stride);
    check(fits, "output", "sizes: allowed a product below 2^63");
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device_type, device, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}

// A copy whose last dimension is contiguous, where it was not. A tensor of no dimension stays: what
// checks its rank comes next.
inline Tensor rows_contiguous(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (last < 0) return tensor;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor
                                                            : torch::stable::contiguous(tensor);
}

// For tests: whether scratch arrives as NaN, in every type. Outputs do where torch is
// deterministic.
extern bool poisoned;

// Bytes that a kernel borrows for one call; few of them cost no allocation.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    check(bytes >= 0, "scratch", "sizes: allowed fewer than 2^63 bytes");
    if (bytes > static_cast<int64_t>(sizeof small_)) {
      large_ = empty({bytes + 64}, ScalarType::Byte);
      data_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(large_->data_ptr()) + 63) &
                                      ~uintptr_t{63});
    }
    if (poisoned) std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  Scratch(const Scratch&) = delete;
  void* data() { return data_; }

 private:
  alignas(64) char small_[4096];
  std::optional<Tensor> large_;
  void* data_ = small_;
};

// torch's own threads.
inline Pool pool() {
  return {[](int64_t count, int64_t grain, Pool::Body body, const void* context) {
            torch::stable::parallel_for(
                0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

}  // namespace tk::bind
