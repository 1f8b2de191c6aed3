// The gradient of both merges for torch tensors on the CPU.
#include "torch/merge.h"

namespace tk::bind {
namespace {

// grad (total, C) is packed: one image of rows for all; grad (B, M, C) has its rows per image. merged_size has the same rows.
Tensor merge_backward_cpu(Tensor grad, Tensor index, std::optional<Tensor> size, Tensor merged_size) {
  const char* op = "merge_backward";
  check(grad.dim() == 2 || grad.dim() == 3, op, "grad: allowed (total, C) or (B, M, C)");
  check(index.dim() == 2 && index.scalar_type() == ScalarType::Long, op, "index: allowed int64 (B, P+N)");
  const bool packed = grad.dim() == 2;
  grad = rows_contiguous(grad);
  index = torch::stable::contiguous(index);
  merged_size = torch::stable::contiguous(merged_size);
  MergeBackward p{};
  p.grad = grad.data_ptr();
  p.dtype = dtype_of(grad, op);
  p.batch = index.size(0);
  p.length = index.size(1);
  p.rows = grad.size(grad.dim() - 2);
  p.channels = grad.size(grad.dim() - 1);
  p.batch_stride = packed ? 0 : grad.stride(0);
  p.token_stride = grad.stride(grad.dim() - 2);
  check(packed || grad.size(0) == p.batch, op, "grad: allowed the batch of index");
  check(merged_size.scalar_type() == ScalarType::Float && merged_size.numel() == (packed ? 1 : p.batch) * p.rows, op,
        "merged_size: allowed float32, one per row of grad");
  p.merged_size = static_cast<const float*>(merged_size.data_ptr());
  p.merged_batch_stride = packed ? 0 : p.rows;
  p.index = static_cast<const int64_t*>(index.data_ptr());
  set_size(size, p.batch, p.length, op, p);
  Tensor grad_x = empty({p.batch, p.length, p.channels}, grad.scalar_type());
  p.grad_x = grad_x.data_ptr();
  check(merge_backward(p, pool()), op, "index: allowed rows of grad");
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) { m.impl("merge_backward", TORCH_BOX(&merge_backward_cpu)); }

}  // namespace tk::bind
