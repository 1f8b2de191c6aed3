// Gradients of aggregate_logits on the CPU.
#include "cpu/aggregate_backward.h"

namespace tk::TK_ISA {
namespace {

AggregateSoftBackward given(const AggregateLogitsBackward& p) {
  auto soft = as_scores<AggregateSoftBackward>(p);
  soft.gradient = p.gradient;
  soft.tokens = p.tokens;
  soft.key_grad = p.logits_grad;
  soft.value_grad = p.value_grad;
  return soft;
}

}  // namespace

Status aggregate_logits_backward(const AggregateLogitsBackward& params, const Pool& pool) {
  dispatch(params.dtype,
           [&](auto zero) { run_backward<decltype(zero), true>(given(params), pool); });
  return Status::kOk;
}

int64_t aggregate_logits_backward_scratch(const AggregateLogitsBackward& params, int threads) {
  return backward_scratch_bytes(given(params), threads);
}

}  // namespace tk::TK_ISA
