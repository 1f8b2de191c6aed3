// fill for CUDA tensors: doctor asks it whether this build carries code for the GPU at hand.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/bind.h"

// Absent from a CPU-only torch; there nobody calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace tk {

const char* fill_cuda(float* to, int64_t count, float value, void* stream);

namespace bind {
namespace {

Tensor fill(Tensor x, double value) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor result = torch::stable::empty_like(x);
  check(result.scalar_type() == ScalarType::Float && result.is_contiguous(), "fill",
        "x: allowed contiguous float32");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const char* error = fill_cuda(static_cast<float*>(result.data_ptr()), result.numel(),
                                static_cast<float>(value), stream);
  if (error != nullptr) throw std::runtime_error(std::string("fill failed on this GPU: ") + error);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CUDA, m) { m.impl("fill", TORCH_BOX(&fill)); }

}  // namespace bind
}  // namespace tk
