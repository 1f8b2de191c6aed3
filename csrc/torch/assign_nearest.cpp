// assign_nearest for torch tensors on the CPU.
#include "torch/codes.h"

namespace tk::bind {
namespace {

using Metric = AssignNearest::Metric;

Metric metric_of(const std::string& name) {
  return name == "cosine" ? Metric::kCosine : name == "dot" ? Metric::kDot : Metric::kL2;
}

std::tuple<Tensor, Tensor, Tensor> assign_nearest_cpu(Tensor x, Tensor codebook, std::string metric,
                                                      bool return_distance, bool return_codes) {
  const char* op = "assign_nearest";
  const bool grouped = codebook.dim() == 3;
  AssignNearest p{};
  p.x = rows_of(x, grouped, op);
  p.codebook = codebooks_of(codebook, op);
  p.metric = metric_of(metric);
  const int64_t last = x.dim() - 1;
  check(x.size(last) == p.codebook.dim && (!grouped || x.size(last - 1) == p.codebook.groups) &&
            p.x.dtype == p.codebook.dtype,
        op, "x: allowed (…, D) or (…, G, D) of the codebook's dtype");
  Tensor index = empty_per_row(x, ScalarType::Long);
  Tensor distance =
      return_distance ? empty_per_row(x, ScalarType::Float) : empty({0}, ScalarType::Float);
  Tensor codes = return_codes ? empty_of_shape(x) : empty({0}, x.scalar_type());
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.distance = return_distance ? static_cast<float*>(distance.data_ptr()) : nullptr;
  p.codes = return_codes ? codes.data_ptr() : nullptr;
  const Pool threads = pool();
  Scratch scratch(assign_nearest_scratch(p, threads.threads));
  p.scratch = scratch.data();
  assign_nearest(p, threads);
  return {index, distance, codes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) {
  m.impl("assign_nearest", TORCH_BOX(&assign_nearest_cpu));
}

}  // namespace tk::bind
