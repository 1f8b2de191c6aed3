// merge_adjacent for NumPy arrays.
#include "numpy/merge.h"

namespace tk::bind {
namespace {

// counts: one for all images (dense) or one per image; empty: `threshold` decides. The front has checked shapes and values, and has
// given grid and window three extents.
py::tuple merge_adjacent_numpy(const array& input, const std::vector<int64_t>& grid, const std::vector<int64_t>& window,
                               const std::vector<int64_t>& counts, float threshold, bool dense, const py::object& size,
                               int64_t prefix, bool by_similarity) {
  const array x = rows_contiguous(input);
  MergeAdjacent p{};
  p.x = x.data();
  p.dtype = dtype_of(x, "merge_adjacent");
  p.batch = x.shape(0);
  p.channels = x.shape(2);
  p.batch_stride = stride_of(x, 0);
  p.token_stride = stride_of(x, 1);
  set_size(size, p);
  std::copy_n(grid.begin(), 3, p.grid);
  std::copy_n(window.begin(), 3, p.window);
  p.prefix = prefix;
  p.counts = counts.empty() ? nullptr : counts.data();
  p.counts_stride = counts.size() == 1 ? 0 : 1;
  p.threshold = threshold;
  p.uniform = dense && counts.empty();
  p.by_similarity = by_similarity;
  p.packed = !dense;
  const int64_t length = x.shape(1), saved = p.window[0] * p.window[1] * p.window[2] - 1;
  int64_t at_most = p.batch * length;
  for (int64_t b = 0; b < p.batch && !counts.empty(); ++b) at_most -= saved * counts[static_cast<size_t>(b * p.counts_stride)];
  array tokens = empty({at_most, p.channels}, x.dtype()), sizes = empty({at_most}, py::dtype::of<float>());
  array index = empty({p.batch, length}, py::dtype::of<int64_t>()), offsets = empty({p.batch + 1}, py::dtype::of<int64_t>());
  p.tokens = tokens.mutable_data();
  p.merged_size = static_cast<float*>(sizes.mutable_data());
  p.index = static_cast<int64_t*>(index.mutable_data());
  p.offsets = static_cast<int64_t*>(offsets.mutable_data());
  const Pool threads = pool();
  Scratch scratch(merge_adjacent_scratch(p, threads.threads));
  p.scratch = scratch.data();
  {
    const py::gil_scoped_release release;
    merge_adjacent(p, threads);
  }
  return py::make_tuple(tokens, sizes, index, offsets);
}

}  // namespace

void bind_merge_adjacent(py::module_& m) { m.def("merge_adjacent", &merge_adjacent_numpy); }

}  // namespace tk::bind
