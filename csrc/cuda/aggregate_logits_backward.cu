// aggregate_logits_backward on a GPU: one launch by blocks of tokens.
#include "cuda/aggregate_by_token.cuh"

namespace tk {
namespace {

template <class T>
const char* run(const AggregateLogitsBackward& p, void* stream) {
  cuda::Gradients g{};
  g.B = p.B;
  g.M = p.M;
  g.N = p.N;
  g.C = p.C;
  g.keys = p.logits;
  g.value = p.value;
  g.gradient = p.gradient;
  g.tokens = p.tokens;
  g.mask = p.mask;
  g.scale = 1.0f;
  g.lse = p.lse;
  g.keys_grad = p.logits_grad;
  g.value_grad = p.value_grad;
  return cuda::launch_by_token<T, false>(g, stream);
}

}  // namespace

int64_t aggregate_logits_backward_cuda_scratch(const AggregateLogitsBackward&) { return 0; }

const char* aggregate_logits_backward_cuda(const AggregateLogitsBackward& p, void* stream) {
  const char* error = nullptr;
  dispatch(p.dtype, [&](auto zero) { error = run<decltype(zero)>(p, stream); });
  return error;
}

}  // namespace tk
