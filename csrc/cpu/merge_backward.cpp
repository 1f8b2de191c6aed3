// The gradient of both merges on the CPU: every token takes its share of the gradient of the row
// that it went to.
#include "cpu/merge.h"

namespace tk::TK_ISA {
namespace {

template <class T>
void scale_row(T* to, const T* from, float factor, int64_t channels) {
  int64_t c = 0;
  for (; c + kPair <= channels; c += kPair) {
    const Pair value = load_pair(from + c);
    store_pair(to + c, {value.a * factor, value.b * factor});
  }
  for (; c < channels; c += kLanes) {
    const int count = lanes_left(channels, c);
    store_some(to + c, load_some(from + c, count) * factor, count);
  }
}

// The tokens [begin, end) of the batch.
template <class T>
void share(const MergeBackward& p, int64_t begin, int64_t end) {
  const bool streaming = p.batch * p.length * p.channels * size_of(p.dtype) > kStreamingBytes;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t image = t / p.length, position = t % p.length, row = p.index[t];
    const T* from = static_cast<const T*>(p.grad) + image * p.batch_stride + row * p.token_stride;
    T* to = static_cast<T*>(p.grad_x) + t * p.channels;
    const float size = p.size == nullptr
                           ? 1.0f
                           : p.size[image * p.size_batch_stride + position * p.size_token_stride];
    const float total = p.merged_size[image * p.merged_batch_stride + row];
    if (size == total) {
      copy_token(to, from, p.channels, streaming);
    } else {
      scale_row(to, from, size / total, p.channels);
    }
  }
  streaming_done();
}

}  // namespace

int64_t merge_backward_scratch(const MergeBackward&, int) { return 0; }

Status merge_backward(const MergeBackward& p, const Pool& pool) {
  const int64_t tokens = p.batch * p.length;
  int64_t least = 0, most = -1;
  for (int64_t t = 0; t < tokens; ++t) {
    least = smaller(least, p.index[t]);
    most = larger(most, p.index[t]);
  }
  if (least < 0 || most >= p.rows) return Status::kBadValue;
  const int64_t grain = 1 + kGrainBytes / (1 + size_of(p.dtype) * p.channels);
  dispatch(p.dtype, [&](auto zero) {
    parallel_for(pool, tokens, grain,
                 [&](int64_t begin, int64_t end) { share<decltype(zero)>(p, begin, end); });
  });
  return Status::kOk;
}

}  // namespace tk::TK_ISA
