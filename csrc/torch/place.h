// Where a call computes, so that one binding serves the CPU, CUDA and, in tests, CUDA kernels that
// run on the CPU.
//
// A binding makes a Place of its first tensor, takes outputs and scratch from it, fills the struct,
// and runs:
//
//   place.run(op, "index: allowed …",
//             [&](const auto& threads) { return tk::op(p, threads); },
//             [&](auto* stream) { return op_cuda(p, stream); });
//
// Only the branch that a build has is compiled, which is why the arguments are `auto`. Registered
// is by TK_LIBRARY(CPU, m) and TK_LIBRARY(CUDA, m), with TK_IMPL(m, op) for the function `op`.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/bind.h"

#ifdef TK_CUDA_ON_HOST
#define TK_OVERLOAD ".cuda_on_host"
#define TK_LIBRARY_CPU(m) \
  [[maybe_unused]] static void left_out(torch::stable::detail::StableLibrary& m)
#define TK_LIBRARY_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m)
#else
#define TK_OVERLOAD ""
#define TK_LIBRARY_CPU(m) STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m)
#ifdef USE_CUDA
#define TK_LIBRARY_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CUDA, m)
#else
#define TK_LIBRARY_CUDA(m) \
  [[maybe_unused]] static void left_out(torch::stable::detail::StableLibrary& m)
#endif
#endif
#define TK_LIBRARY(key, m) TK_LIBRARY_##key(m)
#define TK_IMPL(m, op) m.impl(#op TK_OVERLOAD, TORCH_BOX(&op))

// Absent from a CPU-only torch; there nobody calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace tk::bind {

#ifdef TK_CUDA_ON_HOST
constexpr bool kHasCpu = false, kHasCuda = true;
#elif defined(USE_CUDA)
constexpr bool kHasCpu = true, kHasCuda = true;
#else
constexpr bool kHasCpu = true, kHasCuda = false;
#endif

class Place {
 public:
  explicit Place(const Tensor& like) {
    if (!like.is_cuda()) return;
    type_ = aoti_torch_device_type_cuda();
    device_ = like.get_device_index();
    guard_.emplace(device_);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }

  // Whether a CUDA kernel runs: values are not to be read, and nothing is to wait for it.
  bool runs_cuda() const { return !kHasCpu || type_ == aoti_torch_device_type_cuda(); }
  void* stream() const { return stream_; }

  Tensor empty(const int64_t* sizes, int64_t dims, ScalarType type) const {
    return bind::empty(sizes, dims, type, type_, device_);
  }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) const {
    return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), type);
  }

  // Bytes that one call borrows: for a CUDA kernel, memory of the stream's device.
  Tensor scratch(int64_t bytes) const {
    Tensor memory = empty({bytes}, ScalarType::Byte);
    if (poisoned && type_ == aoti_torch_device_type_cpu())
      std::memset(memory.data_ptr(), 0xff, static_cast<size_t>(bytes));
    return memory;
  }

  // The values of a small tensor where they can be read: what makes a call wait for the GPU.
  Tensor on_cpu(const Tensor& tensor) const {
    if (type_ == aoti_torch_device_type_cpu()) return tensor;
    Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), std::nullopt, std::nullopt,
                                           torch::stable::Device(torch::stable::DeviceType::CPU));
    return torch::stable::copy_(copy, tensor);
  }

  // `bad_value` are the words for Status::kBadValue.
  template <class Cpu, class Cuda>
  void run(const char* op, const char* bad_value, const Cpu& cpu, const Cuda& cuda) const {
    if constexpr (kHasCuda) {
      if (runs_cuda()) return done(op, cuda(stream_));
    }
    if constexpr (kHasCpu) check(cpu(pool()), op, bad_value);
  }

  // What a launcher said.
  static void done(const char* op, const char* error) {
    if (error != nullptr)
      throw std::runtime_error(std::string(op) + " failed on this GPU: " + error);
  }

 private:
  int32_t type_ = aoti_torch_device_type_cpu(), device_ = 0;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace tk::bind
