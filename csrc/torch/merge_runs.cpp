// merge_runs for torch tensors on the CPU.
#include "torch/merge.h"

namespace tk::bind {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_runs_cpu(Tensor x, double threshold,
                                                          int64_t max_run,
                                                          std::optional<Tensor> size,
                                                          int64_t prefix, bool padded) {
  const char* op = "merge_runs";
  check(x.dim() == 3, op, "x: allowed (B, P+N, C)");
  check(max_run >= 1 && prefix >= 0 && prefix <= x.size(1), op,
        "max_run, prefix: allowed at least 1, 0 … P+N");
  x = rows_contiguous(x);
  MergeRuns p{};
  p.x = x.data_ptr();
  p.dtype = dtype_of(x, op);
  p.batch = x.size(0);
  p.length = x.size(1);
  p.channels = x.size(2);
  p.batch_stride = x.stride(0);
  p.token_stride = x.stride(1);
  set_size(size, p.batch, p.length, op, p);
  p.threshold = static_cast<float>(threshold);
  p.max_run = max_run;
  p.prefix = prefix;
  p.padded = padded;
  const int64_t at_most = p.batch * p.length;
  Tensor tokens = padded ? empty({p.batch, p.length, p.channels}, x.scalar_type())
                         : empty({at_most, p.channels}, x.scalar_type());
  Tensor sizes =
      padded ? empty({p.batch, p.length}, ScalarType::Float) : empty({at_most}, ScalarType::Float);
  Tensor index = empty({p.batch, p.length}, ScalarType::Long),
         offsets = empty({p.batch + 1}, ScalarType::Long);
  p.tokens = tokens.data_ptr();
  p.merged_size = static_cast<float*>(sizes.data_ptr());
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  merge_runs(p, pool());
  if (padded) return {tokens, sizes, index, offsets};
  return {head(tokens, p.offsets[p.batch]), head(sizes, p.offsets[p.batch]), index, offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) {
  m.impl("merge_runs", TORCH_BOX(&merge_runs_cpu));
}

}  // namespace tk::bind
