// assign_nearest for NumPy arrays.
#include "numpy/codes.h"

namespace tk::bind {
namespace {

// Results that were not asked for are None.
py::tuple assign_nearest_numpy(const array& x_in, const array& codebook_in, int metric,
                               bool return_distance, bool return_codes) {
  const array x = elements(x_in), codebook = elements(codebook_in);
  AssignNearest p{};
  p.x = rows_of(x, codebook.ndim() == 3, "assign_nearest");
  p.codebook = codebooks_of(codebook, "assign_nearest");
  p.metric = static_cast<AssignNearest::Metric>(metric);
  array index = empty(shape_per_row(x), py::dtype::of<int64_t>());
  py::object distance = py::none(), codes = py::none();
  p.index = static_cast<int64_t*>(index.mutable_data());
  if (return_distance) {
    array values = empty(shape_per_row(x), py::dtype::of<float>());
    p.distance = static_cast<float*>(values.mutable_data());
    distance = values;
  }
  if (return_codes) {
    array values = empty(shape_of(x), x.dtype());
    p.codes = values.mutable_data();
    codes = values;
  }
  const Pool threads = pool();
  Scratch scratch(assign_nearest_scratch(p, threads.threads));
  p.scratch = scratch.data();
  {
    const py::gil_scoped_release release;
    assign_nearest(p, threads);
  }
  return py::make_tuple(index, distance, codes);
}

}  // namespace

void bind_assign_nearest(py::module_& m) { m.def("assign_nearest", &assign_nearest_numpy); }

}  // namespace tk::bind
