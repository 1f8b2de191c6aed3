// gather_topk for NumPy arrays.
#include "numpy/bind.h"

namespace tk::bind {
namespace {

using Fuse = GatherTopk::Fuse;

// budgets: one int per image, read where no threshold is given. `dense`: all images keep k, the
// outputs are (B, rows, …).
py::tuple gather_topk_numpy(const std::vector<array>& inputs, const array& scores_in,
                            const py::object& keep, const std::vector<int64_t>& budgets, int64_t k,
                            bool by_threshold, float threshold, bool dense, int64_t prefix,
                            bool by_score, int fuse) {
  GatherTopk p{};
  check(inputs.size() <= GatherTopk::kMaxTensors, "gather_topk", "x: allowed at most 16 arrays");
  const array scores = elements(scores_in);
  p.scores = scores.data();
  p.scores_dtype = dtype_of(scores, "gather_topk");
  p.scores_batch_stride = stride_of(scores, 0);
  p.scores_token_stride = stride_of(scores, 1);
  p.batch = scores.shape(0);
  p.tokens = scores.shape(1);
  if (!keep.is_none()) {
    const auto mask = py::cast<array>(keep);
    p.keep = static_cast<const bool*>(mask.data());
    p.keep_batch_stride = mask.strides(0);
    p.keep_token_stride = mask.strides(1);
  }
  bool good = by_threshold || static_cast<int64_t>(budgets.size()) == p.batch;
  for (const int64_t budget : budgets) {
    good = good && (by_threshold || (budget >= 0 && budget <= p.tokens && (!dense || budget == k)));
  }
  check(good, "gather_topk", "k: allowed one int of 0…N per image");
  p.prefix = prefix;
  p.by_score = by_score;
  p.fuse = static_cast<Fuse>(fuse);
  p.budgets = by_threshold ? nullptr : budgets.data();
  p.threshold = threshold;
  std::vector<array> from, to;
  for (const array& x : inputs) from.push_back(x.ndim() == 3 ? rows_contiguous(x) : elements(x));
  array offsets = empty({p.batch + 1}, py::dtype::of<int64_t>());
  p.offsets = static_cast<int64_t*>(offsets.mutable_data());
  Scratch selected(p.batch * p.tokens * 8);
  p.selected = static_cast<int64_t*>(selected.data());
  const Pool threads = pool();
  Scratch select_scratch(gather_topk_select_scratch(p, threads.threads));
  p.scratch = select_scratch.data();
  {
    const py::gil_scoped_release release;
    gather_topk_select(p, threads);
  }
  const int64_t total = p.offsets[p.batch], extra = prefix + (p.fuse != Fuse::kNone);
  const int64_t chosen = total - p.batch * extra;
  array index = dense ? empty({p.batch, k}, py::dtype::of<int64_t>())
                      : empty({chosen}, py::dtype::of<int64_t>());
  p.index = static_cast<int64_t*>(index.mutable_data());
  for (const array& x : from) {
    std::vector<py::ssize_t> shape{total};
    if (dense) shape = {p.batch, k + extra};
    const int64_t channels = x.ndim() == 3 ? x.shape(2) : 1;
    if (x.ndim() == 3) shape.push_back(channels);
    to.push_back(empty(shape, x.dtype()));
    p.tensors[p.tensor_count++] = {
        x.data(),
        to.back().mutable_data(),
        x.strides(0),
        x.strides(1),
        channels * x.itemsize(),
        p.fuse == Fuse::kNone ? DType::kFloat32 : dtype_of(x, "gather_topk")};
  }
  Scratch scratch(gather_topk_scratch(p, threads.threads));
  p.scratch = scratch.data();
  {
    const py::gil_scoped_release release;
    gather_topk(p, threads);
  }
  return py::make_tuple(to, index, offsets);
}

}  // namespace

void bind_gather_topk(py::module_& m) { m.def("gather_topk", &gather_topk_numpy); }

}  // namespace tk::bind
