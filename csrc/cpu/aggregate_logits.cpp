// aggregate_logits on the CPU: slots from tokens by the softmax of given logits.
#include "cpu/aggregate_forward.h"

namespace tk::TK_ISA {
namespace {

AggregateSoft given(const AggregateLogits& p) {
  auto soft = as_scores<AggregateSoft>(p);
  soft.out = p.out;
  return soft;
}

}  // namespace

Status aggregate_logits(const AggregateLogits& params, const Pool& pool) {
  dispatch(params.dtype, [&](auto zero) { run<decltype(zero), true>(given(params), pool); });
  return Status::kOk;
}

int64_t aggregate_logits_scratch(const AggregateLogits& params, int threads) {
  return forward_scratch(given(params), threads);
}

}  // namespace tk::TK_ISA
