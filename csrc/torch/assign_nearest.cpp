// assign_nearest for torch tensors.
#include "torch/codes.h"

namespace tk::bind {
namespace {

using Metric = AssignNearest::Metric;

Metric metric_of(const std::string& name) {
  return name == "cosine" ? Metric::kCosine : name == "dot" ? Metric::kDot : Metric::kL2;
}

std::tuple<Tensor, Tensor, Tensor> assign_nearest(Tensor x, Tensor codebook, std::string metric,
                                                  bool return_distance, bool return_codes) {
  const char* op = "assign_nearest";
  const Place place(x);
  const bool grouped = codebook.dim() == 3;
  AssignNearest p{};
  p.x = rows_of(x, grouped, op);
  p.codebook = codebooks_of(codebook, op);
  p.metric = metric_of(metric);
  const int64_t last = x.dim() - 1;
  check(x.size(last) == p.codebook.dim && (!grouped || x.size(last - 1) == p.codebook.groups) &&
            p.x.dtype == p.codebook.dtype,
        op, "x: allowed (…, D) or (…, G, D) of the codebook's dtype");
  Tensor index = empty_per_row(place, x, ScalarType::Long);
  Tensor distance = return_distance ? empty_per_row(place, x, ScalarType::Float)
                                    : place.empty({0}, ScalarType::Float);
  Tensor codes = return_codes ? empty_of_shape(place, x) : place.empty({0}, x.scalar_type());
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.distance = return_distance ? static_cast<float*>(distance.data_ptr()) : nullptr;
  p.codes = return_codes ? codes.data_ptr() : nullptr;
  place.run(
      op, "x: allowed anything",
      [&](const auto& threads) {
        Scratch scratch(assign_nearest_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::assign_nearest(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(assign_nearest_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return assign_nearest_cuda(p, stream);
      });
  return {index, distance, codes};
}

}  // namespace

TK_LIBRARY(CPU, m) { TK_IMPL(m, assign_nearest); }
TK_LIBRARY(CUDA, m) { TK_IMPL(m, assign_nearest); }

}  // namespace tk::bind
