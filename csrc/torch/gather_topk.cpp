// gather_topk and its gradient for torch tensors.
#include "torch/place.h"

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
  check(keep->scalar_type() == ScalarType::Bool && keep->dim() == 2 && keep->size(0) == p.batch &&
            keep->size(1) == p.tokens,
        "gather_topk", "keep: allowed bool (B, N)");
  p.keep = static_cast<const bool*>(keep->data_ptr());
  p.keep_batch_stride = keep->stride(0);
  p.keep_token_stride = keep->stride(1);
}

std::vector<int64_t> budgets_of(const std::vector<int64_t>& k, bool ragged, const GatherTopk& p) {
  check(static_cast<int64_t>(k.size()) == (ragged ? p.batch : 1), "gather_topk",
        "k: allowed one int, or one per image");
  std::vector<int64_t> budgets = k;
  if (!ragged) budgets.assign(static_cast<size_t>(p.batch), k[0]);
  for (const int64_t budget : budgets)
    check(budget >= 0 && budget <= p.tokens, "gather_topk", "k: allowed 0…N");
  return budgets;
}

// (B, rows, C) where every image keeps the same number, else packed (total, C); without C where x
// has none.
Tensor output_like(const Place& place, const Tensor& x, int64_t batch, int64_t rows, bool dense) {
  const ScalarType type = x.scalar_type();
  if (x.dim() == 3)
    return dense ? place.empty({batch, rows, x.size(2)}, type)
                 : place.empty({rows, x.size(2)}, type);
  return dense ? place.empty({batch, rows}, type) : place.empty({rows}, type);
}

GatherTopk::Tensor tensor_of(const Tensor& from, const Tensor& to, const GatherTopk& p) {
  check((from.dim() == 2 || from.dim() == 3) && from.size(0) == p.batch &&
            from.size(1) == p.prefix + p.tokens,
        "gather_topk", "x: allowed (B, P+N) or (B, P+N, C)");
  const auto bytes = static_cast<int64_t>(from.element_size());
  const int64_t channels = from.dim() == 3 ? from.size(2) : 1;
  return {from.data_ptr(),
          to.data_ptr(),
          from.stride(0) * bytes,
          from.stride(1) * bytes,
          channels * bytes,
          p.fuse == Fuse::kNone ? DType::kFloat32 : dtype_of(from, "gather_topk")};
}

using Results = std::tuple<std::vector<Tensor>, Tensor, Tensor>;

// Outputs for `chosen` tokens of all images together: (B, each, …) with `each`, else packed.
Results make_results(const Place& place, const std::vector<Tensor>& tensors, int64_t chosen,
                     std::optional<int64_t> each, const Tensor& offsets, GatherTopk& p) {
  const int64_t extra = p.prefix + (p.fuse != Fuse::kNone);
  const int64_t rows = each ? extra + *each : chosen + p.batch * extra;
  Tensor index = each ? place.empty({p.batch, *each}, ScalarType::Long)
                      : place.empty({chosen}, ScalarType::Long);
  p.index = static_cast<int64_t*>(index.data_ptr());
  std::vector<Tensor> outputs;
  for (const Tensor& tensor : tensors) {
    outputs.push_back(output_like(place, tensor, p.batch, rows, each.has_value()));
    p.tensors[p.tensor_count++] = tensor_of(tensor, outputs.back(), p);
  }
  return {outputs, index, offsets};
}

// Selects first, so that the outputs of a threshold have their size from the start.
Results on_cpu(const Place& place, const std::vector<Tensor>& tensors, std::optional<int64_t> each,
               const Tensor& offsets, GatherTopk& p) {
  Scratch selected(p.batch * p.tokens * 8);
  p.selected = static_cast<int64_t*>(selected.data());
  const Pool threads = pool();
  Scratch select_scratch(gather_topk_select_scratch(p, threads.threads));
  p.scratch = select_scratch.data();
  gather_topk_select(p, threads);
  const int64_t extra = p.prefix + (p.fuse != Fuse::kNone);
  Results results =
      make_results(place, tensors, p.offsets[p.batch] - p.batch * extra, each, offsets, p);
  Scratch scratch(gather_topk_scratch(p, threads.threads));
  p.scratch = scratch.data();
  tk::gather_topk(p, threads);
  return results;
}

// With a threshold the outputs begin as large as they could become; the one number that is waited
// for says how much of them is meant.
Results on_cuda(const Place& place, const std::vector<Tensor>& tensors, std::optional<int64_t> each,
                bool ragged, const Tensor& offsets, GatherTopk& p) {
  int64_t chosen = p.batch * p.tokens;
  if (p.budgets != nullptr) {
    chosen = 0;
    for (int64_t b = 0; b < p.batch; ++b) chosen += p.budgets[b];
  }
  Results results = make_results(place, tensors, chosen, each, offsets, p);
  const Tensor scratch = place.scratch(gather_topk_cuda_scratch(p));
  p.scratch = scratch.data_ptr();
  Place::done("gather_topk", gather_topk_cuda(p, ragged, place.stream()));
  if (p.budgets != nullptr) return results;
  auto& [outputs, index, ends] = results;
  const Tensor last = place.on_cpu(torch::stable::narrow(ends, 0, p.batch, 1));
  const int64_t total = *static_cast<const int64_t*>(last.data_ptr());
  for (Tensor& output : outputs) output = torch::stable::narrow(output, 0, 0, total);
  const int64_t extra = p.prefix + (p.fuse != Fuse::kNone);
  index = torch::stable::narrow(index, 0, 0, total - p.batch * extra);
  return results;
}

Results gather_topk(std::vector<Tensor> tensors, Tensor scores, std::optional<Tensor> keep,
                    std::vector<int64_t> k, bool ragged, std::optional<double> threshold,
                    int64_t prefix, std::string order, std::string fuse) {
  check(tensors.size() <= GatherTopk::kMaxTensors, "gather_topk", "x: allowed at most 16 tensors");
  check(scores.dim() == 2, "gather_topk", "scores: allowed (B, N)");
  check(prefix >= 0 && prefix >> 31 == 0, "gather_topk", "prefix: allowed 0 … 2^31−1");
  const Place place(scores);
  GatherTopk p{};
  set_scores(scores, p);
  set_keep(keep, p);
  p.prefix = prefix;
  p.by_score = order == "score";
  p.fuse = fuse_of(fuse);
  std::vector<int64_t> budgets;
  if (!threshold) budgets = budgets_of(k, ragged, p);
  p.budgets = threshold ? nullptr : budgets.data();
  p.threshold = static_cast<float>(threshold.value_or(0));
  for (Tensor& tensor : tensors) {
    if (tensor.dim() == 3) tensor = rows_contiguous(tensor);
  }
  std::optional<int64_t> each;
  if (!threshold && !ragged) each = k[0];
  const Tensor offsets = place.empty({p.batch + 1}, ScalarType::Long);
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  if constexpr (kHasCuda) {
    if (place.runs_cuda()) return on_cuda(place, tensors, each, ragged, offsets, p);
  }
  Results results;
  if constexpr (kHasCpu) results = on_cpu(place, tensors, each, offsets, p);
  return results;
}

// Offsets of images that keep 0…N tokens each, as many as there are in the index.
bool fits(const GatherTopkBackward& p, int64_t extra, int64_t chosen) {
  bool good = p.offsets[0] == 0;
  for (int64_t b = 0; b < p.batch && good; ++b) {
    const int64_t end = p.offsets[b + 1];
    good = end >= p.offsets[b] && end - p.offsets[b] >= extra &&
           end - p.offsets[b] - extra <= p.tokens;
  }
  return good && p.offsets[p.batch] - p.batch * extra == chosen;
}

void set_index(const Tensor& index, const Tensor& offsets, GatherTopkBackward& p) {
  const bool good = index.scalar_type() == ScalarType::Long &&
                    offsets.scalar_type() == ScalarType::Long &&
                    (index.dim() == 1 || (index.dim() == 2 && index.size(0) == p.batch)) &&
                    offsets.dim() == 1 && offsets.numel() == p.batch + 1;
  check(good, "gather_topk_backward", "index, offsets: those of the forward call");
  p.index = static_cast<const int64_t*>(index.data_ptr());
  p.offsets = static_cast<const int64_t*>(offsets.data_ptr());
  p.rows = index.numel() + p.batch * (p.prefix + (p.fuse != Fuse::kNone));
}

// One gradient (contiguous) and the input's, which it returns.
Tensor add_gradient(const Place& place, const Tensor& from, const Tensor& index,
                    GatherTopkBackward& p) {
  const char* op = "gather_topk_backward";
  const bool dense = index.dim() == 2, has_channels = from.dim() == index.dim() + 1;
  check(has_channels || from.dim() == index.dim(), op, "gradients: shape of the output");
  const int64_t channels = has_channels ? from.size(from.dim() - 1) : 1, rows = p.prefix + p.tokens;
  const int64_t each = p.prefix + (p.fuse != Fuse::kNone);
  check(dense ? from.size(0) == p.batch && from.size(1) == each + index.size(1)
              : from.size(0) == p.rows,
        op, "gradients: shape of the output");
  Tensor to = has_channels ? place.empty({p.batch, rows, channels}, from.scalar_type())
                           : place.empty({p.batch, rows}, from.scalar_type());
  p.tensors[p.tensor_count++] = {from.data_ptr(), to.data_ptr(),     nullptr, 0, 0,
                                 channels,        dtype_of(from, op)};
  return to;
}

// The input that rows were fused of; `like` is its gradient.
void add_input(const Tensor& x, const Tensor& like, GatherTopkBackward::Tensor& tensor) {
  bool good = x.scalar_type() == like.scalar_type() && x.dim() == like.dim();
  for (int64_t d = 0; good && d < x.dim(); ++d) good = x.size(d) == like.size(d);
  check(good, "gather_topk_backward", "tensors: those of the forward call");
  tensor.x = x.data_ptr();
  tensor.x_batch_stride = x.stride(0);
  tensor.x_token_stride = x.stride(1);
}

std::tuple<std::vector<Tensor>, Tensor> gather_topk_backward(std::vector<Tensor> gradients,
                                                             Tensor index, Tensor offsets,
                                                             std::vector<Tensor> tensors,
                                                             Tensor scores, int64_t prefix,
                                                             std::string fuse) {
  const char* op = "gather_topk_backward";
  const Place place(scores);
  GatherTopkBackward p{};
  p.fuse = fuse_of(fuse);
  const bool fused = p.fuse != Fuse::kNone;
  check(
      gradients.size() <= GatherTopk::kMaxTensors && (!fused || gradients.size() == tensors.size()),
      op, "gradients: one per tensor, at most 16");
  check(scores.dim() == 2, op, "scores: allowed (B, N)");
  check(prefix >= 0 && prefix >> 31 == 0, op, "prefix: allowed 0 … 2^31−1");
  p.scores = scores.data_ptr();
  p.scores_dtype = dtype_of(scores, op);
  p.scores_batch_stride = scores.stride(0);
  p.scores_token_stride = scores.stride(1);
  p.batch = scores.size(0);
  p.tokens = scores.size(1);
  p.prefix = prefix;
  index = torch::stable::contiguous(index);
  offsets = torch::stable::contiguous(offsets);
  set_index(index, offsets, p);
  check(place.runs_cuda() || fits(p, prefix + fused, index.numel()), op,
        "offsets: allowed 0, then the ends of images that keep 0…N tokens of the index each");
  Tensor scores_gradient =
      place.empty({fused ? p.batch : 0, fused ? p.tokens : 0}, ScalarType::Float);
  p.scores_gradient = static_cast<float*>(scores_gradient.data_ptr());
  std::vector<Tensor> results;
  for (size_t t = 0; t < gradients.size(); ++t) {
    gradients[t] = torch::stable::contiguous(gradients[t]);
    results.push_back(add_gradient(place, gradients[t], index, p));
    if (!fused) continue;
    if (tensors[t].dim() == 3) tensors[t] = rows_contiguous(tensors[t]);
    add_input(tensors[t], results[t], p.tensors[t]);
  }
  place.run(
      op, "index: allowed 0 … N−1",
      [&](const auto& threads) {
        Scratch scratch(gather_topk_backward_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::gather_topk_backward(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(gather_topk_backward_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return gather_topk_backward_cuda(p, stream);
      });
  return {results, scores_gradient};
}

}  // namespace

TK_LIBRARY(CPU, m) {
  TK_IMPL(m, gather_topk);
  TK_IMPL(m, gather_topk_backward);
}

TK_LIBRARY(CUDA, m) {
  TK_IMPL(m, gather_topk);
  TK_IMPL(m, gather_topk_backward);
}

}  // namespace tk::bind
