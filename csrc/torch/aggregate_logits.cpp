// aggregate_logits and its gradients for torch tensors on the CPU.
#include "torch/aggregate.h"

namespace tk::bind {
namespace {

template <class Params>
void set_logits(const Tensor& logits, const Tensor& value, const std::optional<Tensor>& mask,
                const char* op, Params& p) {
  check(logits.dim() == 3 && value.dim() == 3 && logits.size(0) == value.size(0) &&
            logits.size(1) == value.size(1),
        op, "logits, value: allowed (B, N, M), (B, N, C)");
  p.dtype = dtype_of(value, op);
  check(dtype_of(logits, op) == p.dtype, op, "logits, value: allowed one dtype");
  p.B = value.size(0);
  p.N = value.size(1);
  p.M = logits.size(2);
  p.C = value.size(2);
  p.logits = matrices_of(logits);
  p.value = matrices_of(value);
  p.mask = mask_of(mask, p.B, p.N, op);
}

std::tuple<Tensor, Tensor> aggregate_logits_cpu(Tensor logits, Tensor value,
                                                std::optional<Tensor> mask) {
  logits = rows_contiguous(logits);
  value = rows_contiguous(value);
  AggregateLogits p{};
  set_logits(logits, value, mask, "aggregate_logits", p);
  Tensor out = empty({p.B, p.M, p.C}, value.scalar_type());
  Tensor lse = empty({p.B, p.M}, ScalarType::Float);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  const Pool threads = pool();
  Scratch scratch(aggregate_logits_scratch(p, threads.threads));
  p.scratch = scratch.data();
  aggregate_logits(p, threads);
  return {out, lse};
}

std::tuple<Tensor, Tensor> aggregate_logits_backward_cpu(Tensor gradient, Tensor logits,
                                                         Tensor value, std::optional<Tensor> mask,
                                                         Tensor tokens, Tensor lse,
                                                         bool need_logits, bool need_value) {
  const char* op = "aggregate_logits_backward";
  logits = rows_contiguous(logits);
  value = rows_contiguous(value);
  AggregateLogitsBackward p{};
  set_logits(logits, value, mask, op, p);
  set_forward(gradient, tokens, lse, op, p);
  const ScalarType type = value.scalar_type();
  Tensor logits_grad = need_logits ? empty({p.B, p.N, p.M}, type) : empty({0}, type);
  Tensor value_grad = need_value ? empty({p.B, p.N, p.C}, type) : empty({0}, type);
  p.logits_grad = need_logits ? logits_grad.data_ptr() : nullptr;
  p.value_grad = need_value ? value_grad.data_ptr() : nullptr;
  const Pool threads = pool();
  Scratch scratch(aggregate_logits_backward_scratch(p, threads.threads));
  p.scratch = scratch.data();
  aggregate_logits_backward(p, threads);
  return {logits_grad, value_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) {
  m.impl("aggregate_logits", TORCH_BOX(&aggregate_logits_cpu));
  m.impl("aggregate_logits_backward", TORCH_BOX(&aggregate_logits_backward_cpu));
}

}  // namespace tk::bind
