// fill: a constant into every element, the smallest real kernel: it proves that a build carries working code for the GPU at hand.
#include "tokenkernels.h"

namespace tk {
namespace {

constexpr int kThreads = 256;

__global__ void fill_kernel(float* to, int64_t count, float value) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) to[i] = value;
}

}  // namespace

const char* fill_cuda(float* to, int64_t count, float value, void* stream) {
  if (count == 0) return nullptr;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  fill_kernel<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      to, count, value);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tk
