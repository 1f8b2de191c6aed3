// accumulate_codes for NumPy arrays.
#include "numpy/codes.h"

namespace tk::bind {
namespace {

py::tuple accumulate_codes_numpy(const array& x_in, const array& index_in, int64_t codes,
                                 bool grouped) {
  const array x = elements(x_in), index = contiguous(index_in);
  AccumulateCodes p{};
  p.x = rows_of(x, grouped, "accumulate_codes");
  p.groups = grouped ? x.shape(x.ndim() - 2) : 1;
  p.codes = codes;
  p.dim = x.shape(x.ndim() - 1);
  p.index = static_cast<const int64_t*>(index.data());
  Shape shape{codes};
  if (grouped) shape.insert(shape.begin(), p.groups);
  array counts = empty(shape, py::dtype::of<int64_t>());
  shape.push_back(p.dim);
  array sums = empty(shape, py::dtype::of<float>());
  p.counts = static_cast<int64_t*>(counts.mutable_data());
  p.sums = static_cast<float*>(sums.mutable_data());
  const Pool threads = pool();
  Scratch scratch(accumulate_codes_scratch(p, threads.threads));
  p.scratch = scratch.data();
  Status status;
  {
    const py::gil_scoped_release release;
    status = accumulate_codes(p, threads);
  }
  check(status, "accumulate_codes",
        "index: allowed -1 … K−1 (-1: counted nowhere), got something else");
  return py::make_tuple(counts, sums);
}

}  // namespace

void bind_accumulate_codes(py::module_& m) { m.def("accumulate_codes", &accumulate_codes_numpy); }

}  // namespace tk::bind
