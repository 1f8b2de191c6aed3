// merge_runs for torch tensors.
#include "torch/merge.h"

namespace tk::bind {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_runs(Tensor x, double threshold, int64_t max_run,
                                                      std::optional<Tensor> size, int64_t prefix,
                                                      bool padded) {
  const char* op = "merge_runs";
  const Place place(x);
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
  Tensor tokens = padded ? place.empty({p.batch, p.length, p.channels}, x.scalar_type())
                         : place.empty({at_most, p.channels}, x.scalar_type());
  Tensor sizes = padded ? place.empty({p.batch, p.length}, ScalarType::Float)
                        : place.empty({at_most}, ScalarType::Float);
  Tensor index = place.empty({p.batch, p.length}, ScalarType::Long),
         offsets = place.empty({p.batch + 1}, ScalarType::Long);
  p.tokens = tokens.data_ptr();
  p.merged_size = static_cast<float*>(sizes.data_ptr());
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  place.run(
      op, "", [&](const auto& threads) { return tk::merge_runs(p, threads); },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(merge_runs_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return merge_runs_cuda(p, stream);
      });
  if (padded) return {tokens, sizes, index, offsets};
  const int64_t rows = last_of(place, offsets);
  return {head(tokens, rows), head(sizes, rows), index, offsets};
}

}  // namespace

TK_LIBRARY(CPU, m) { TK_IMPL(m, merge_runs); }
TK_LIBRARY(CUDA, m) { TK_IMPL(m, merge_runs); }

}  // namespace tk::bind
