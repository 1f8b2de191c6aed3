// What the torch bindings of both merges share: sizes as a pointer, outputs whose length is known
// only afterwards.
#pragma once

#include "torch/place.h"

namespace tk::bind {

// Strides of sizes (B, L) go into the struct of any merge.
template <class Params>
inline void set_size(const std::optional<Tensor>& size, int64_t batch, int64_t length,
                     const char* op, Params& p) {
  if (!size) return;
  check(size->scalar_type() == ScalarType::Float && size->dim() == 2 && size->size(0) == batch &&
            size->size(1) == length,
        op, "size: allowed float32 (B, P+N)");
  p.size = static_cast<const float*>(size->data_ptr());
  p.size_batch_stride = size->stride(0);
  p.size_token_stride = size->stride(1);
}

// The last of some numbers, for which a call on a GPU waits.
inline int64_t last_of(const Place& place, Tensor& numbers) {
  const Tensor last = place.on_cpu(torch::stable::narrow(numbers, 0, numbers.size(0) - 1, 1));
  return *static_cast<const int64_t*>(last.data_ptr());
}

// The first `rows` of a buffer.
inline Tensor head(Tensor& buffer, int64_t rows) {
  return rows == buffer.size(0) ? buffer : torch::stable::narrow(buffer, 0, 0, rows);
}

}  // namespace tk::bind
