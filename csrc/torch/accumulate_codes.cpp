// accumulate_codes for torch tensors.
#include "torch/codes.h"
#include "torch/place.h"

namespace tk::bind {
namespace {

std::tuple<Tensor, Tensor> accumulate_codes(Tensor x, Tensor index, int64_t codes, bool grouped) {
  const char* op = "accumulate_codes";
  const Place place(x);
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
  Tensor counts = grouped ? place.empty({p.groups, codes}, ScalarType::Long)
                          : place.empty({codes}, ScalarType::Long);
  Tensor sums = grouped ? place.empty({p.groups, codes, p.dim}, ScalarType::Float)
                        : place.empty({codes, p.dim}, ScalarType::Float);
  p.counts = static_cast<int64_t*>(counts.data_ptr());
  p.sums = static_cast<float*>(sums.data_ptr());
  place.run(
      op, "index: allowed -1 … K−1 (-1: counted nowhere), got something else",
      [&](const auto& threads) {
        Scratch scratch(accumulate_codes_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::accumulate_codes(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(accumulate_codes_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return accumulate_codes_cuda(p, stream);
      });
  return {counts, sums};
}

}  // namespace

TK_LIBRARY(CPU, m) { TK_IMPL(m, accumulate_codes); }
TK_LIBRARY(CUDA, m) { TK_IMPL(m, accumulate_codes); }

}  // namespace tk::bind
