// aggregate_soft on the CPU: slots from tokens by the softmax of query · key.
#include "cpu/aggregate_forward.h"

namespace tk::TK_ISA {

Status aggregate_soft(const AggregateSoft& params, const Pool& pool) {
  dispatch(params.dtype, [&](auto zero) { run<decltype(zero), false>(params, pool); });
  return Status::kOk;
}

int64_t aggregate_soft_scratch(const AggregateSoft& params, int threads) {
  return forward_scratch(params, threads);
}

}  // namespace tk::TK_ISA
