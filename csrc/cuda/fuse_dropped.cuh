// The fused token of gather_topk: the score-weighted sum or mean of the rows that were not chosen.
#pragma once

#include "cuda/gather_topk.cuh"
#include "cuda/values.cuh"

namespace tk::cuda {

// A block of kThreads adds up kFuseLanes vectors of 16 bytes next to each other, in kFuseRows
// threads each every kFuseRows-th token: 128 bytes of a row at a time, which makes enough blocks
// even of few images. Which thread adds what depends on N and C alone.
constexpr int kFuseLanes = 8, kFuseRows = kThreads / kFuseLanes;
static_assert(kFuseRows == kWarp);  // a word of `chosen` is one step of all threads

__host__ __device__ inline int64_t fuse_slices(const GatherTopk::Tensor& tensor) {
  return (tensor.row_bytes + 16 * kFuseLanes - 1) / (16 * kFuseLanes);
}

constexpr int64_t kFuseFloats = kFuseRows * (kFuseLanes * 8 + 1);

// What one thread adds up.
template <class T>
struct FusedPart {
  float total[kPerVector<T>] = {};
  float weight = 0;
};

template <class T, bool wide>
__device__ FusedPart<T> add_dropped(const TopkJob& job, const GatherTopk::Tensor& tensor,
                                    int64_t image, int64_t column) {
  constexpr int kInFlight = wide ? 4 : 1;
  const GatherTopk& p = job.p;
  const int64_t channels = tensor.row_bytes / int64_t{sizeof(T)};
  const int own = thread() / kFuseLanes, tokens = static_cast<int>(p.tokens);
  const char* rows = static_cast<const char*>(tensor.from) + image * tensor.batch_stride +
                     p.prefix * tensor.token_stride;
  const uint32_t* chosen = job.chosen + image * job.chosen_words;
  FusedPart<T> sum;
  if (column >= channels) return sum;
  const int64_t step = kFuseRows * tensor.token_stride;
  const int64_t score_step = kFuseRows * p.scores_token_stride;
  int64_t score = image * p.scores_batch_stride + own * p.scores_token_stride;
  rows += own * tensor.token_stride;
  for (int first = own; first < tokens; first += kInFlight * kFuseRows) {
    Vector<T, kPerVector<T>> part[kInFlight] = {};
    bool dropped[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int n = first + i * kFuseRows;
      dropped[i] = n < tokens && (chosen[n / kWarp] >> own & 1u) == 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i, rows += step) {
      if (dropped[i])
        part[i] = load_part<T, wide>(reinterpret_cast<const T*>(rows), column, channels);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i, score += score_step) {
      const float weight = dropped[i] ? score_of(p.scores, p.scores_dtype, score) : 0.0f;
      sum.weight += weight;
#pragma unroll
      for (int v = 0; v < kPerVector<T>; ++v) sum.total[v] += weight * widen(part[i].at[v]);
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
  const FusedPart<T> part = wide ? add_dropped<T, true>(job, tensor, image, first + at)
                                 : add_dropped<T, false>(job, tensor, image, first + at);
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
