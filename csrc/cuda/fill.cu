// fill: a constant into every element, the smallest real kernel: it proves that a build carries
// working code for the GPU at hand.
#include "cuda/launch.cuh"

namespace tk {
namespace {

__global__ void fill_kernel(float* to, int64_t count, float value) {
  cuda::for_each(count, [=](int64_t i) { to[i] = value; });
}

}  // namespace

const char* fill_cuda(float* to, int64_t count, float value, void* stream) {
  const int64_t blocks = cuda::blocks_for(count, cuda::kThreads);
  return cuda::launch<fill_kernel>({.blocks = blocks, .threads = cuda::kThreads, .stream = stream},
                                   to, count, value);
}

}  // namespace tk
