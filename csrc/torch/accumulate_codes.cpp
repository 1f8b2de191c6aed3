// accumulate_codes for torch tensors on the CPU.
#include "torch/codes.h"

namespace tk::bind {
namespace {

std::tuple<Tensor, Tensor> accumulate_codes_cpu(Tensor x, Tensor index, int64_t codes,
                                                bool grouped) {
  const char* op = "accumulate_codes";
  AccumulateCodes p{};
  p.x = rows_of(x, grouped, op);
  const int64_t last = x.dim() - 1;
  p.groups = grouped ? x.size(last - 1) : 1;
  p.codes = codes;
  p.dim = x.size(last);
  check(codes > 0 && codes < int64_t{1} << 31, op, "K: allowed 1 … 2^31 − 1");
  check(index.scalar_type() == ScalarType::Long && index.numel() == p.x.rows * p.groups, op,
        "index: allowed int64, one per row of x");
  if (!index.is_contiguous()) index = torch::stable::contiguous(index);
  p.index = static_cast<const int64_t*>(index.data_ptr());
  Tensor counts =
      grouped ? empty({p.groups, codes}, ScalarType::Long) : empty({codes}, ScalarType::Long);
  Tensor sums = grouped ? empty({p.groups, codes, p.dim}, ScalarType::Float)
                        : empty({codes, p.dim}, ScalarType::Float);
  p.counts = static_cast<int64_t*>(counts.data_ptr());
  p.sums = static_cast<float*>(sums.data_ptr());
  const Pool threads = pool();
  Scratch scratch(accumulate_codes_scratch(p, threads.threads));
  p.scratch = scratch.data();
  check(accumulate_codes(p, threads), op,
        "index: allowed -1 … K−1 (-1: counted nowhere), got something else");
  return {counts, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) {
  m.impl("accumulate_codes", TORCH_BOX(&accumulate_codes_cpu));
}

}  // namespace tk::bind
