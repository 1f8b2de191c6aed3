// assign_residual for torch tensors.
#include "torch/codes.h"

namespace tk::bind {
namespace {

std::tuple<Tensor, Tensor> assign_residual(Tensor x, Tensor codebooks) {
  const char* op = "assign_residual";
  const Place place(x);
  AssignResidual p{};
  p.x = rows_of(x, false, op);
  check(codebooks.dim() == 3, op, "codebooks: allowed (Q, K, D)");
  p.codebooks = codebooks_of(codebooks, op);
  check(x.size(x.dim() - 1) == p.codebooks.dim && p.x.dtype == p.codebooks.dtype, op,
        "x: allowed (…, D) of the codebooks' dtype");
  Sizes sizes(x);
  sizes.at[sizes.dims - 1] = p.codebooks.groups;
  Tensor index = place.empty(sizes.at, sizes.dims, ScalarType::Long);
  Tensor residual = empty_of_shape(place, x);
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.residual = residual.data_ptr();
  place.run(
      op, "x: allowed anything",
      [&](const auto& threads) {
        Scratch scratch(assign_residual_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::assign_residual(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(assign_residual_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return assign_residual_cuda(p, stream);
      });
  return {index, residual};
}

}  // namespace

TK_LIBRARY(CPU, m) { TK_IMPL(m, assign_residual); }
TK_LIBRARY(CUDA, m) { TK_IMPL(m, assign_residual); }

}  // namespace tk::bind
