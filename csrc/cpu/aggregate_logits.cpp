// aggregate_logits on the CPU: slots from tokens by the softmax of given logits.
#include "cpu/aggregate_forward.h"

namespace tk::TK_ISA {
namespace {

AggregateSoft given(const AggregateLogits& p) {
  AggregateSoft soft{};
  soft.dtype = p.dtype;
  soft.B = p.B;
  soft.M = p.M;
  soft.N = p.N;
  soft.C = p.C;
  soft.key = p.logits;
  soft.value = p.value;
  soft.mask = p.mask;
  soft.scale = 1.0f;
  soft.scratch = p.scratch;
  soft.out = p.out;
  soft.lse = p.lse;
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
