// gather_topk and its gradient for torch tensors on the CPU.
#include "torch/bind.h"

namespace tk::bind {
namespace {

using Fuse = GatherTopk::Fuse;

Fuse fuse_of(const std::string& name) {
  return name == "sum" ? Fuse::kSum : name == "mean" ? Fuse::kMean : Fuse::kNone;
}

void set_scores(const Tensor& scores, GatherTopk& p) {
  p.scores = scores.data_ptr();
  p.scores_dtype = dtype_of(scores, "gather_topk");
  p.scores_batch_stride = scores.stride(0);
  p.scores_token_stride = scores.stride(1);
  p.batch = scores.size(0);
  p.tokens = scores.size(1);
}

void set_keep(const std::optional<Tensor>& keep, GatherTopk& p) {
  if (!keep) return;
  check(keep->scalar_type() == ScalarType::Bool && keep->dim() == 2 && keep->size(0) == p.batch && keep->size(1) == p.tokens,
        "gather_topk", "keep: allowed bool (B, N)");
  p.keep = static_cast<const bool*>(keep->data_ptr());
  p.keep_batch_stride = keep->stride(0);
  p.keep_token_stride = keep->stride(1);
}

std::vector<int64_t> budgets_of(const std::vector<int64_t>& k, const GatherTopk& p) {
  check(k.size() == 1 || static_cast<int64_t>(k.size()) == p.batch, "gather_topk", "k: allowed one int or one per image");
  std::vector<int64_t> budgets(static_cast<size_t>(p.batch), k[0]);
  if (k.size() > 1) budgets = k;
  for (const int64_t budget : budgets) check(budget >= 0 && budget <= p.tokens, "gather_topk", "k: allowed 0…N");
  return budgets;
}

// Dense (B, P+k+fused, …) where every image keeps the same number, else packed (total, …).
Tensor output_like(const Tensor& x, int64_t batch, int64_t total, bool dense) {
  const int64_t channels = x.dim() == 3 ? x.size(2) : 1;
  if (!dense) return x.dim() == 3 ? empty({total, channels}, x.scalar_type()) : empty({total}, x.scalar_type());
  const int64_t rows = batch > 0 ? total / batch : 0;
  return x.dim() == 3 ? empty({batch, rows, channels}, x.scalar_type()) : empty({batch, rows}, x.scalar_type());
}

GatherTopk::Tensor tensor_of(const Tensor& from, const Tensor& to, const GatherTopk& p) {
  check(from.dim() >= 2 && from.size(0) == p.batch && from.size(1) == p.prefix + p.tokens, "gather_topk",
        "x: allowed (B, P+N) or (B, P+N, C)");
  const auto bytes = static_cast<int64_t>(from.element_size());
  const int64_t channels = from.dim() == 3 ? from.size(2) : 1;
  return {from.data_ptr(), to.data_ptr(),     from.stride(0) * bytes,
          from.stride(1) * bytes, channels * bytes, p.fuse == Fuse::kNone ? DType::kFloat32 : dtype_of(from, "gather_topk")};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> gather_topk_cpu(std::vector<Tensor> tensors, Tensor scores,
                                                               std::optional<Tensor> keep, std::vector<int64_t> k,
                                                               std::optional<double> threshold, int64_t prefix,
                                                               std::string order, std::string fuse) {
  check(tensors.size() <= GatherTopk::kMaxTensors, "gather_topk", "x: allowed at most 16 tensors");
  check(scores.dim() == 2, "gather_topk", "scores: allowed (B, N)");
  GatherTopk p{};
  set_scores(scores, p);
  set_keep(keep, p);
  p.prefix = prefix;
  p.by_score = order == "score";
  p.fuse = fuse_of(fuse);
  std::vector<int64_t> budgets;
  if (!threshold) budgets = budgets_of(k, p);
  p.budgets = threshold ? nullptr : budgets.data();
  p.threshold = static_cast<float>(threshold.value_or(0));
  for (Tensor& tensor : tensors) {
    if (tensor.dim() == 3) tensor = rows_contiguous(tensor);
  }
  Tensor offsets = empty({p.batch + 1}, ScalarType::Long);
  Scratch selected(p.batch * p.tokens * 8);
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  p.selected = static_cast<int64_t*>(selected.data());
  const Pool threads = pool();
  const Scratch select_scratch(gather_topk_select_scratch(p, threads.threads));
  p.scratch = select_scratch.data();
  gather_topk_select(p, threads);

  const bool dense = !threshold && k.size() == 1;
  const int64_t total = p.offsets[p.batch], chosen = total - p.batch * (prefix + (p.fuse != Fuse::kNone));
  Tensor index = dense ? empty({p.batch, k[0]}, ScalarType::Long) : empty({chosen}, ScalarType::Long);
  p.index = static_cast<int64_t*>(index.data_ptr());
  std::vector<Tensor> outputs;
  for (const Tensor& tensor : tensors) {
    outputs.push_back(output_like(tensor, p.batch, dense ? p.batch * (prefix + k[0] + (p.fuse != Fuse::kNone)) : total, dense));
    p.tensors[p.tensor_count++] = tensor_of(tensor, outputs.back(), p);
  }
  const Scratch scratch(gather_topk_scratch(p, threads.threads));
  p.scratch = scratch.data();
  gather_topk(p, threads);
  return {outputs, index, offsets};
}

std::tuple<std::vector<Tensor>, Tensor> gather_topk_backward_cpu(std::vector<Tensor> gradients, Tensor index, Tensor offsets,
                                                                std::vector<Tensor> tensors, Tensor scores, int64_t prefix,
                                                                std::string fuse) {
  const char* op = "gather_topk_backward";
  check(gradients.size() <= GatherTopk::kMaxTensors && gradients.size() == tensors.size(), op, "gradients: one per tensor, at most 16");
  GatherTopkBackward p{};
  p.batch = scores.size(0);
  p.tokens = scores.size(1);
  p.prefix = prefix;
  p.fuse = fuse_of(fuse);
  check(index.is_contiguous() && offsets.is_contiguous() && offsets.numel() == p.batch + 1, op, "index, offsets: of the forward call");
  p.index = static_cast<const int64_t*>(index.data_ptr());
  p.offsets = static_cast<const int64_t*>(offsets.data_ptr());
  const bool fused = p.fuse != Fuse::kNone;
  Tensor scores_gradient = empty({fused ? p.batch : 0, fused ? p.tokens : 0}, ScalarType::Float);
  p.scores_gradient = static_cast<float*>(scores_gradient.data_ptr());
  p.scores = scores.data_ptr();
  p.scores_dtype = dtype_of(scores, op);
  p.scores_batch_stride = scores.stride(0);
  p.scores_token_stride = scores.stride(1);
  std::vector<Tensor> results;
  for (size_t t = 0; t < gradients.size(); ++t) {
    gradients[t] = torch::stable::contiguous(gradients[t]);
    tensors[t] = rows_contiguous(tensors[t]);
    const Tensor& x = tensors[t];
    const int64_t channels = x.dim() == 3 ? x.size(2) : 1, rows = prefix + p.tokens;
    check(gradients[t].numel() == p.offsets[p.batch] * channels && gradients[t].scalar_type() == x.scalar_type(), op,
          "gradients: shape and dtype of the output");
    results.push_back(x.dim() == 3 ? empty({p.batch, rows, channels}, x.scalar_type()) : empty({p.batch, rows}, x.scalar_type()));
    p.tensors[p.tensor_count++] = {gradients[t].data_ptr(), results.back().data_ptr(), x.data_ptr(), x.stride(0),
                                   x.stride(1),             channels,                  dtype_of(x, op)};
  }
  const Pool threads = pool();
  const Scratch scratch(gather_topk_backward_scratch(p, threads.threads));
  p.scratch = scratch.data();
  gather_topk_backward(p, threads);
  return {results, scores_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) {
  m.impl("gather_topk", TORCH_BOX(&gather_topk_cpu));
  m.impl("gather_topk_backward", TORCH_BOX(&gather_topk_backward_cpu));
}

}  // namespace tk::bind
