// merge_adjacent for NumPy arrays.
#include "numpy/merge.h"

namespace tk::bind {
namespace {

// counts: one for all images or one per image, read where no threshold decides. The front has
// checked shapes and values and given grid and window three extents.
py::tuple merge_adjacent_numpy(const array& input, const std::vector<int64_t>& grid,
                               const std::vector<int64_t>& window, bool by_threshold,
                               float threshold, const std::vector<int64_t>& counts, bool dense,
                               const py::object& size, int64_t prefix, bool by_similarity) {
  const array x = rows_contiguous(input);
  MergeAdjacent p{};
  const py::object sizes = set_inputs(x, size, "merge_adjacent", p);
  std::copy_n(grid.begin(), 3, p.grid);
  std::copy_n(window.begin(), 3, p.window);
  p.prefix = prefix;
  p.counts = by_threshold ? nullptr : counts.data();
  p.counts_stride = counts.size() == 1 ? 0 : 1;
  p.threshold = threshold;
  p.uniform = dense && by_threshold;
  p.by_similarity = by_similarity;
  p.packed = !dense;
  const int64_t length = x.shape(1), saved = p.window[0] * p.window[1] * p.window[2] - 1;
  int64_t at_most = p.batch * length;
  for (int64_t b = 0; b < p.batch && !by_threshold; ++b)
    at_most -= saved * p.counts[b * p.counts_stride];
  const Merged merged(at_most, length, x.dtype(), p);
  const Pool threads = pool();
  Scratch scratch(merge_adjacent_scratch(p, threads.threads));
  p.scratch = scratch.data();
  {
    const py::gil_scoped_release release;
    merge_adjacent(p, threads);
  }
  const int64_t rows = p.offsets[p.batch];
  if (!dense) return merged.head(rows);
  return merged.dense(
      p.batch, p.batch > 0 ? rows / p.batch : length - (by_threshold ? 0 : counts[0] * saved),
      p.channels);
}

}  // namespace

void bind_merge_adjacent(py::module_& m) { m.def("merge_adjacent", &merge_adjacent_numpy); }

}  // namespace tk::bind
