// merge_runs for NumPy arrays.
#include "numpy/merge.h"

namespace tk::bind {
namespace {

// The front has checked shapes and values.
py::tuple merge_runs_numpy(const array& input, float threshold, int64_t max_run, const py::object& size, int64_t prefix,
                           bool padded) {
  const array x = rows_contiguous(input);
  MergeRuns p{};
  p.x = x.data();
  p.dtype = dtype_of(x, "merge_runs");
  p.batch = x.shape(0);
  p.length = x.shape(1);
  p.channels = x.shape(2);
  p.batch_stride = stride_of(x, 0);
  p.token_stride = stride_of(x, 1);
  set_size(size, p);
  p.threshold = threshold;
  p.max_run = max_run;
  p.prefix = prefix;
  p.padded = padded;
  array tokens = empty({p.batch * p.length, p.channels}, x.dtype());
  array sizes = empty({p.batch * p.length}, py::dtype::of<float>());
  array index = empty({p.batch, p.length}, py::dtype::of<int64_t>());
  array offsets = empty({p.batch + 1}, py::dtype::of<int64_t>());
  p.tokens = tokens.mutable_data();
  p.merged_size = static_cast<float*>(sizes.mutable_data());
  p.index = static_cast<int64_t*>(index.mutable_data());
  p.offsets = static_cast<int64_t*>(offsets.mutable_data());
  const Pool threads = pool();
  {
    const py::gil_scoped_release release;
    merge_runs(p, threads);
  }
  return py::make_tuple(tokens, sizes, index, offsets);
}

}  // namespace

void bind_merge_runs(py::module_& m) { m.def("merge_runs", &merge_runs_numpy); }

}  // namespace tk::bind
