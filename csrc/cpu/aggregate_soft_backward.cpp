// Gradients of aggregate_soft on the CPU.
#include "cpu/aggregate_backward.h"

namespace tk::TK_ISA {

Status aggregate_soft_backward(const AggregateSoftBackward& params, const Pool& pool) {
  dispatch(params.dtype, [&](auto zero) { run_backward<decltype(zero), false>(params, pool); });
  return Status::kOk;
}

int64_t aggregate_soft_backward_scratch(const AggregateSoftBackward& params, int threads) {
  return backward_scratch_bytes(params, threads);
}

}  // namespace tk::TK_ISA
