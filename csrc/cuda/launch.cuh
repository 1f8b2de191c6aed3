// The only file that names a launch, a thread or a block: kernels say what they need through it.
#pragma once

#include "tokenkernels.h"

namespace tk::cuda {

constexpr int kThreads = 256;

// Runs body(i) for every i in [0, count), each thread taking every (number of threads)-th.
template <class Body>
__device__ void for_each(int64_t count, const Body& body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step)
    body(i);
}

// Launches `kernel` with about one thread per element; nullptr, or what went wrong in words.
template <class... Args>
const char* launch(void (*kernel)(Args...), int64_t count, void* stream, Args... args) {
  if (count == 0) return nullptr;
  constexpr int64_t kMaxBlocks = 65536;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0,
           static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tk::cuda
