// gather_topk backward on the CPU: every row of the input's gradient is written once, from the row
// that was chosen, from the fused row, or as zeros.
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

using Fuse = GatherTopk::Fuse;

constexpr int32_t kDropped = -1;

TK_INLINE int64_t extra_rows(const GatherTopkBackward& p) {
  return p.prefix + (p.fuse != Fuse::kNone);
}

TK_INLINE float score(const GatherTopkBackward& p, int64_t image, int64_t n) {
  float value = 0;
  dispatch(p.scores_dtype, [&](auto zero) {
    value = to_float(static_cast<const decltype(zero)*>(
        p.scores)[image * p.scores_batch_stride + n * p.scores_token_stride]);
  });
  return value;
}

// Where every token of an image went: its output row behind the prefix, or kDropped.
void invert(const GatherTopkBackward& p, int64_t image, int32_t* place) {
  for (int64_t n = 0; n < p.tokens; ++n) place[n] = kDropped;
  const int64_t first = p.offsets[image] - image * extra_rows(p);
  const int64_t count = p.offsets[image + 1] - p.offsets[image] - extra_rows(p);
  for (int64_t i = 0; i < count; ++i) place[p.index[first + i]] = static_cast<int32_t>(i);
}

// Every chosen token is one of 0…N−1.
bool all_valid(const GatherTopkBackward& p) {
  const int64_t count = p.offsets[p.batch] - p.batch * extra_rows(p);
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= (p.index[i] < 0) | (p.index[i] >= p.tokens);
  return bad == 0;
}

TK_INLINE int lanes_left(int64_t channels, int64_t at) {
  return static_cast<int>(smaller<int64_t>(channels - at, kLanes));
}

template <class T>
void scale_row(T* to, const T* from, int64_t channels, float factor) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int lanes = lanes_left(channels, c);
    store(to + c, load(from + c, lanes) * factor, lanes);
  }
}

template <class T>
float dot(const T* a, const T* b, int64_t channels) {
  Floats total{};
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int lanes = lanes_left(channels, c);
    total += load(a + c, lanes) * load(b + c, lanes);
  }
  return sum(total);
}

float dropped_weight(const GatherTopkBackward& p, int64_t image, const int32_t* place) {
  float total = 0;
  for (int64_t n = 0; n < p.tokens; ++n) {
    if (place[n] == kDropped) total += score(p, image, n);
  }
  return total;
}

// Gradient of the scores through one tensor's fused row f = Σ s·x / W (W = 1, or Σ s): ⟨x_n, g⟩ /
// W, less ⟨f, g⟩ / W for a mean.
template <class T>
void add_scores_gradient(const GatherTopkBackward& p, const GatherTopkBackward::Tensor& tensor,
                         int64_t image, const int32_t* place, const T* gradient, float weight) {
  const T* x = static_cast<const T*>(tensor.x) + image * tensor.x_batch_stride +
               p.prefix * tensor.x_token_stride;
  float* to = p.scores_gradient + image * p.tokens;
  const bool mean = p.fuse == Fuse::kMean && weight != 0;
  const float inverse = mean ? 1 / weight : 1;
  float centre = 0;
  for (int pass = mean ? 0 : 1; pass < 2; ++pass) {
    for (int64_t n = 0; n < p.tokens; ++n) {
      if (place[n] != kDropped) continue;
      const float share = dot(x + n * tensor.x_token_stride, gradient, tensor.channels) * inverse;
      if (pass == 0) {
        centre += share * score(p, image, n) * inverse;
      } else {
        to[n] += share - centre;
      }
    }
  }
}

// Rows first … last of the gradient of an image, prefix tokens in front.
template <class T>
void scatter(const GatherTopkBackward& p, const GatherTopkBackward::Tensor& tensor, int64_t image,
             const int32_t* place, int64_t first, int64_t last, bool streaming) {
  const int64_t channels = tensor.channels, bytes = channels * static_cast<int64_t>(sizeof(T));
  const T* from = static_cast<const T*>(tensor.from) + p.offsets[image] * channels;
  T* to = static_cast<T*>(tensor.to) + image * (p.prefix + p.tokens) * channels;
  const int64_t fused_row = p.fuse == Fuse::kNone ? 0 : p.offsets[image + 1] - 1;
  const T* fused = static_cast<const T*>(tensor.from) + fused_row * channels;
  const float weight = p.fuse == Fuse::kMean ? dropped_weight(p, image, place) : 1;
  const float inverse = weight != 0 ? 1 / weight : 1;
  for (int64_t at = first; at < last; ++at) {
    T* row = to + at * channels;
    const int64_t n = at - p.prefix;
    if (n < 0) {
      copy_row(reinterpret_cast<char*>(row), reinterpret_cast<const char*>(from + at * channels),
               bytes, streaming);
    } else if (place[n] != kDropped) {
      copy_row(reinterpret_cast<char*>(row),
               reinterpret_cast<const char*>(from + (p.prefix + place[n]) * channels), bytes,
               streaming);
    } else if (p.fuse == Fuse::kNone) {
      zero_row(reinterpret_cast<char*>(row), bytes, streaming);
    } else {
      scale_row(row, fused, channels, score(p, image, n) * inverse);
    }
  }
}

template <class T>
void scores_of(const GatherTopkBackward& p, const GatherTopkBackward::Tensor& tensor, int64_t image,
               const int32_t* place) {
  const T* fused =
      static_cast<const T*>(tensor.from) + (p.offsets[image + 1] - 1) * tensor.channels;
  const float weight = p.fuse == Fuse::kMean ? dropped_weight(p, image, place) : 1;
  add_scores_gradient(p, tensor, image, place, fused, weight);
}

}  // namespace

Status gather_topk_backward(const GatherTopkBackward& p, const Pool& pool) {
  if (!all_valid(p)) return Status::kBadValue;
  if (p.fuse != Fuse::kNone) {
    std::memset(p.scores_gradient, 0, sizeof(float) * static_cast<size_t>(p.batch * p.tokens));
  }
  const int64_t channels = p.tensor_count > 0 ? p.tensors[0].channels : 1;
  auto* places = static_cast<int32_t*>(p.scratch);
  const int64_t looked_at = p.fuse == Fuse::kNone ? 1 : channels;
  parallel_for(pool, p.batch, grain_of(p.tokens * looked_at * 4), [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      int32_t* place = places + image * p.tokens;
      invert(p, image, place);
      for (int t = 0; p.fuse != Fuse::kNone && t < p.tensor_count; ++t) {
        dispatch(p.tensors[t].dtype,
                 [&](auto zero) { scores_of<decltype(zero)>(p, p.tensors[t], image, place); });
      }
    }
  });
  const int64_t rows = p.prefix + p.tokens;
  int64_t bytes = 0;
  for (int t = 0; t < p.tensor_count; ++t)
    bytes += p.batch * rows * p.tensors[t].channels * size_of(p.tensors[t].dtype);
  const bool streaming = bytes > kStreamingBytes;
  parallel_for(pool, p.batch * rows, grain_of(channels * 4), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at = (at / rows + 1) * rows) {
      const int64_t image = at / rows, first = at % rows;
      const int64_t last = end - at < rows - first ? first + end - at : rows;
      for (int t = 0; t < p.tensor_count; ++t) {
        dispatch(p.tensors[t].dtype, [&](auto zero) {
          scatter<decltype(zero)>(p, p.tensors[t], image, places + image * p.tokens, first, last,
                                  streaming);
        });
      }
    }
    if (streaming) streaming_done();
  });
  return Status::kOk;
}

int64_t gather_topk_backward_scratch(const GatherTopkBackward& p, int) {
  return p.batch * p.tokens * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace tk::TK_ISA
