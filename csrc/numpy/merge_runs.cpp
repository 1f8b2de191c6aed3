// merge_runs for NumPy arrays.
#include "numpy/merge.h"

namespace tk::bind {
namespace {

// The front has checked shapes and values.
py::tuple merge_runs_numpy(const array& input, float threshold, int64_t max_run,
                           const py::object& size, int64_t prefix, bool padded) {
  const array x = rows_contiguous(input);
  MergeRuns p{};
  const py::object sizes = set_inputs(x, size, "merge_runs", p);
  p.length = x.shape(1);
  p.threshold = threshold;
  p.max_run = max_run;
  p.prefix = prefix;
  p.padded = padded;
  const Merged merged(p.batch * p.length, p.length, x.dtype(), p);
  const Pool threads = pool();
  {
    const py::gil_scoped_release release;
    merge_runs(p, threads);
  }
  return padded ? merged.dense(p.batch, p.length, p.channels) : merged.head(p.offsets[p.batch]);
}

}  // namespace

void bind_merge_runs(py::module_& m) { m.def("merge_runs", &merge_runs_numpy); }

}  // namespace tk::bind
