// The fused token of gather_topk: the score-weighted sum or mean of the rows that were not chosen.
#pragma once

#include "cuda/gather_topk.cuh"

namespace tk::cuda {

// A block of kThreads adds up kFuseLanes vectors of 16 bytes next to each other, in kFuseRows
// threads each every kFuseRows-th token: 128 bytes of a row at a time, which makes enough blocks
// even of few images. Which thread adds what depends on N and C alone.
constexpr int kFuseLanes = 8, kFuseRows = kThreads / kFuseLanes, kFuseInFlight = 4;
static_assert(kFuseRows == kWarp);  // a word of `chosen` is one step of all threads

template <class T>
constexpr int kPerVector = 16 / sizeof(T);

__host__ __device__ inline int64_t fuse_slices(const GatherTopk::Tensor& tensor) {
  return (tensor.row_bytes + 16 * kFuseLanes - 1) / (16 * kFuseLanes);
}

constexpr int64_t kFuseFloats = kFuseRows * (kFuseLanes * 8 + 1);

// Values column … column + kPerVector − 1 of a row, zeros beyond its end.
template <class T>
__device__ Vector<T, kPerVector<T>> load_part(const T* row, int64_t column, int64_t channels,
                                              bool wide) {
  using V = Vector<T, kPerVector<T>>;
  if (wide) return load<V, kReadOnly>(row + column);
  V part = {};
#pragma unroll
  for (int v = 0; v < V::kCount; ++v) {
    if (column + v < channels) part.at[v] = load<T, kReadOnly>(row + column + v);
  }
  return part;
}

__device__ inline float score_of(const void* scores, DType dtype, int64_t at) {
  float value = 0;
  if (dtype == DType::kFloat32) value = static_cast<const float*>(scores)[at];
  if (dtype == DType::kFloat16) value = widen(static_cast<const Half*>(scores)[at]);
  if (dtype == DType::kBFloat16) value = widen(static_cast<const BFloat16*>(scores)[at]);
  return value;
}

// What one thread adds up.
template <class T>
struct FusedPart {
  float total[kPerVector<T>] = {};
  float weight = 0;
};

template <class T>
__device__ FusedPart<T> add_dropped(const TopkJob& job, const GatherTopk::Tensor& tensor,
                                    int64_t image, int64_t column, bool wide) {
  const GatherTopk& p = job.p;
  const int64_t channels = tensor.row_bytes / int64_t{sizeof(T)}, own = thread() / kFuseLanes;
  const char* rows = static_cast<const char*>(tensor.from) + image * tensor.batch_stride +
                     p.prefix * tensor.token_stride;
  const uint32_t* chosen = job.chosen + image * job.chosen_words;
  FusedPart<T> sum;
  if (column >= channels) return sum;
  for (int64_t w = 0; w < job.chosen_words; w += kFuseInFlight) {
    Vector<T, kPerVector<T>> part[kFuseInFlight] = {};
    float weight[kFuseInFlight] = {};
    bool dropped[kFuseInFlight] = {};
#pragma unroll
    for (int i = 0; i < kFuseInFlight; ++i) {
      const int64_t n = (w + i) * kFuseRows + own;
      dropped[i] = n < p.tokens && (chosen[w + i] >> own & 1u) == 0;
      if (!dropped[i]) continue;
      weight[i] = score_of(p.scores, p.scores_dtype,
                           image * p.scores_batch_stride + n * p.scores_token_stride);
      part[i] = load_part(reinterpret_cast<const T*>(rows + n * tensor.token_stride), column,
                          channels, wide);
    }
#pragma unroll
    for (int i = 0; i < kFuseInFlight; ++i) {
      if (!dropped[i]) continue;
      sum.weight += weight[i];
#pragma unroll
      for (int v = 0; v < kPerVector<T>; ++v) sum.total[v] += weight[i] * widen(part[i].at[v]);
    }
  }
  return sum;
}

// One slice of one image's fused row, which is row number `row` of the output.
template <class T>
__device__ void fuse_slice(const TopkJob& job, const GatherTopk::Tensor& tensor, int64_t image,
                           int64_t slice, int64_t row, float* memory) {
  constexpr int kWidth = kFuseLanes * kPerVector<T>;
  const int64_t channels = tensor.row_bytes / int64_t{sizeof(T)}, first = slice * kWidth;
  const int own = thread() / kFuseLanes, at = thread() % kFuseLanes * kPerVector<T>;
  const bool wide = word_of(place_of(tensor.from) | tensor.batch_stride | tensor.token_stride |
                            tensor.row_bytes) == 16;
  float *sums = memory, *weights = memory + kFuseRows * kWidth;
  const FusedPart<T> part = add_dropped<T>(job, tensor, image, first + at, wide);
#pragma unroll
  for (int v = 0; v < kPerVector<T>; ++v) sums[own * kWidth + at + v] = part.total[v];
  if (at == 0) weights[own] = part.weight;
  sync();
  const int64_t column = first + thread();
  if (thread() < kWidth && column < channels) {
    float total = 0, weight = 0;
    for (int i = 0; i < kFuseRows; ++i) {
      total += sums[i * kWidth + thread()];
      weight += weights[i];
    }
    if (job.p.fuse == GatherTopk::Fuse::kMean && weight != 0) total /= weight;
    static_cast<T*>(tensor.to)[row * channels + column] = narrow<T>(total);
  }
  sync();
}

// Slice number `slice` of all tensors together.
__device__ inline void fuse_slice(const TopkJob& job, int64_t image, int64_t slice, int64_t row,
                                  float* memory) {
  int t = 0;
  for (; slice >= fuse_slices(job.p.tensors[t]); ++t) slice -= fuse_slices(job.p.tensors[t]);
  const GatherTopk::Tensor& tensor = job.p.tensors[t];
  if (tensor.dtype == DType::kFloat32) {
    fuse_slice<float>(job, tensor, image, slice, row, memory);
  } else if (tensor.dtype == DType::kFloat16) {
    fuse_slice<Half>(job, tensor, image, slice, row, memory);
  } else {
    fuse_slice<BFloat16>(job, tensor, image, slice, row, memory);
  }
}

}  // namespace tk::cuda
