// aggregate_soft for torch tensors on the CPU.
#include "torch/aggregate.h"

namespace tk::bind {
namespace {

std::tuple<Tensor, Tensor, Tensor> aggregate_soft_cpu(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                                                      std::optional<Tensor> mask, std::optional<Tensor> scale_tensor,
                                                      double scale, bool keep_weights) {
  const char* op = "aggregate_soft";
  query = rows_contiguous(query);
  key = rows_contiguous(key);
  value = rows_contiguous(value);
  AggregateSoft p{};
  set_operands(query, key, value, op, p);
  p.bias = bias_of(bias, p.B, p.N, op);
  p.mask = mask_of(mask, p.B, p.N, op);
  p.scale = static_cast<float>(scale);
  p.scale_tensor = number_of(scale_tensor, op);
  Tensor out = empty({p.B, p.M, p.C}, value.scalar_type());
  Tensor lse = empty({p.B, p.M}, ScalarType::Float);
  Tensor weights = keep_weights ? empty({p.B, p.N, p.M}, ScalarType::Float) : empty({0}, ScalarType::Float);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.weights = keep_weights ? static_cast<float*>(weights.data_ptr()) : nullptr;
  const Pool threads = pool();
  const Scratch scratch(aggregate_soft_scratch(p, threads.threads));
  p.scratch = scratch.data();
  aggregate_soft(p, threads);
  return {out, lse, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) { m.impl("aggregate_soft", TORCH_BOX(&aggregate_soft_cpu)); }

}  // namespace tk::bind
