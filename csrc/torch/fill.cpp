// fill for CUDA tensors: doctor asks it whether this build carries code for the GPU at hand.
#include "torch/place.h"

namespace tk {

const char* fill_cuda(float* to, int64_t count, float value, void* stream);

namespace bind {
namespace {

Tensor fill(Tensor x, double value) {
  const Place place(x);
  Tensor result = torch::stable::empty_like(x);
  check(result.scalar_type() == ScalarType::Float && result.is_contiguous(), "fill",
        "x: allowed contiguous float32");
  Place::done("fill", fill_cuda(static_cast<float*>(result.data_ptr()), result.numel(),
                                static_cast<float>(value), place.stream()));
  return result;
}

}  // namespace

TK_LIBRARY(CUDA, m) { TK_IMPL(m, fill); }

}  // namespace bind
}  // namespace tk
