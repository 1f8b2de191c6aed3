// The gradient of both merges on a GPU: every token takes its share of the gradient of the row that
// it went to, one warp per token.
#include "cuda/launch.cuh"

namespace tk {
namespace {

constexpr int kInFlight = 2;  // vectors that a lane has asked for before it uses the first

template <class V>
__device__ V scaled(V vector, float factor) {
  using T = std::remove_reference_t<decltype(vector.at[0])>;
#pragma unroll
  for (int i = 0; i < V::kCount; ++i)
    vector.at[i] = cuda::narrow<T>(cuda::widen(vector.at[i]) * factor);
  return vector;
}

template <class T>
struct Share {
  const T* from;  // null: an index out of range is not followed, its token gets zeros
  float factor;   // 1: the row as it is
};

template <class T>
__device__ Share<T> share_of(const MergeBackward& p, int64_t token) {
  const int64_t image = token / p.length, row = p.index[token];
  if (row < 0 || row >= p.rows) return {nullptr, 0};
  const T* from = static_cast<const T*>(p.grad) + image * p.batch_stride + row * p.token_stride;
  const int64_t position = token - image * p.length;
  const float size = p.size == nullptr
                         ? 1.0f
                         : p.size[image * p.size_batch_stride + position * p.size_token_stride];
  const float total = p.merged_size[image * p.merged_batch_stride + row];
  return {from, size == total ? 1.0f : size / total};
}

template <class T, int N>
__global__ void __launch_bounds__(cuda::kThreads)
    merge_backward_kernel(const __grid_constant__ MergeBackward p) {
  using V = cuda::Vector<T, N>;
  constexpr int64_t kStep = int64_t{cuda::kWarp} * N;
  const int64_t tokens = p.batch * p.length, step = cuda::blocks() * cuda::warps();
  for (int64_t t = cuda::block() * cuda::warps() + cuda::warp(); t < tokens; t += step) {
    const Share<T> share = share_of<T>(p, t);
    T* to = static_cast<T*>(p.grad_x) + t * p.channels;
    for (int64_t c = int64_t{cuda::lane()} * N; c < p.channels; c += kInFlight * kStep) {
      V values[kInFlight] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (share.from != nullptr && c + i * kStep < p.channels)
          values[i] = cuda::load<V, cuda::kReadOnly>(share.from + c + i * kStep);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (c + i * kStep < p.channels)
          cuda::store<cuda::kStream>(to + c + i * kStep, share.factor == 1.0f
                                                             ? values[i]
                                                             : scaled(values[i], share.factor));
      }
    }
  }
}

// Whether every row begins where `bytes` may be loaded at once, and ends there.
bool is_aligned(const MergeBackward& p, int64_t bytes) {
  const int64_t size = size_of(p.dtype);
  const auto from = reinterpret_cast<uintptr_t>(p.grad), to = reinterpret_cast<uintptr_t>(p.grad_x);
  const int64_t places = (p.channels | p.batch_stride | p.token_stride) * size;
  return (places | static_cast<int64_t>(from | to)) % bytes == 0;
}

}  // namespace

const char* merge_backward_cuda(const MergeBackward& p, void* stream) {
  constexpr int64_t kEach = cuda::kThreads / cuda::kWarp;
  if (p.channels == 0) return nullptr;
  const cuda::Launch how{.blocks = cuda::blocks_for(p.batch * p.length, kEach),
                         .threads = cuda::kThreads,
                         .stream = stream};
  const char* error = nullptr;
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWide = 16 / sizeof(T);
    error = is_aligned(p, 16) ? cuda::launch<merge_backward_kernel<T, kWide>>(how, p)
                              : cuda::launch<merge_backward_kernel<T, 1>>(how, p);
  });
  return error;
}

}  // namespace tk
