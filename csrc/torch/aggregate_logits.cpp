// aggregate_logits and its gradients for torch tensors.
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

std::tuple<Tensor, Tensor> aggregate_logits(Tensor logits, Tensor value,
                                            std::optional<Tensor> mask) {
  const char* op = "aggregate_logits";
  const Place place(value);
  logits = rows_contiguous(logits);
  value = rows_contiguous(value);
  AggregateLogits p{};
  set_logits(logits, value, mask, op, p);
  Tensor out = place.empty({p.B, p.M, p.C}, value.scalar_type());
  Tensor lse = place.empty({p.B, p.M}, ScalarType::Float);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  place.run(
      op, "nothing",
      [&](const auto& threads) {
        Scratch scratch(aggregate_logits_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::aggregate_logits(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(aggregate_logits_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return aggregate_logits_cuda(p, stream);
      });
  return {out, lse};
}

std::tuple<Tensor, Tensor> aggregate_logits_backward(Tensor gradient, Tensor logits, Tensor value,
                                                     std::optional<Tensor> mask, Tensor tokens,
                                                     Tensor lse, bool need_logits,
                                                     bool need_value) {
  const char* op = "aggregate_logits_backward";
  const Place place(value);
  logits = rows_contiguous(logits);
  value = rows_contiguous(value);
  AggregateLogitsBackward p{};
  set_logits(logits, value, mask, op, p);
  set_forward(gradient, tokens, lse, op, p);
  const ScalarType type = value.scalar_type();
  Tensor logits_grad = need_logits ? place.empty({p.B, p.N, p.M}, type) : place.empty({0}, type);
  Tensor value_grad = need_value ? place.empty({p.B, p.N, p.C}, type) : place.empty({0}, type);
  p.logits_grad = need_logits ? logits_grad.data_ptr() : nullptr;
  p.value_grad = need_value ? value_grad.data_ptr() : nullptr;
  place.run(
      op, "nothing",
      [&](const auto& threads) {
        Scratch scratch(aggregate_logits_backward_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::aggregate_logits_backward(p, threads);
      },
      [&](auto* stream) { return aggregate_logits_backward_cuda(p, stream); });
  return {logits_grad, value_grad};
}

}  // namespace

TK_LIBRARY(CPU, m) {
  TK_IMPL(m, aggregate_logits);
  TK_IMPL(m, aggregate_logits_backward);
}

TK_LIBRARY(CUDA, m) {
  TK_IMPL(m, aggregate_logits);
  TK_IMPL(m, aggregate_logits_backward);
}

}  // namespace tk::bind
