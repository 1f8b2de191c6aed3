// assign_residual for torch tensors on the CPU.
#include "torch/codes.h"

namespace tk::bind {
namespace {

std::tuple<Tensor, Tensor> assign_residual_cpu(Tensor x, Tensor codebooks) {
  const char* op = "assign_residual";
  AssignResidual p{};
  p.x = rows_of(x, false, op);
  check(codebooks.dim() == 3, op, "codebooks: allowed (Q, K, D)");
  p.codebooks = codebooks_of(codebooks, op);
  check(x.size(x.dim() - 1) == p.codebooks.dim && p.x.dtype == p.codebooks.dtype, op,
        "x: allowed (…, D) of the codebooks' dtype");
  Sizes sizes(x);
  sizes.at[sizes.dims - 1] = p.codebooks.groups;
  Tensor index = empty(sizes.at, sizes.dims, ScalarType::Long);
  Tensor residual = empty_of_shape(x);
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.residual = residual.data_ptr();
  const Pool threads = pool();
  Scratch scratch(assign_residual_scratch(p, threads.threads));
  p.scratch = scratch.data();
  assign_residual(p, threads);
  return {index, residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) {
  m.impl("assign_residual", TORCH_BOX(&assign_residual_cpu));
}

}  // namespace tk::bind
