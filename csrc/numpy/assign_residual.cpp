// assign_residual for NumPy arrays.
#include "numpy/codes.h"

namespace tk::bind {
namespace {

py::tuple assign_residual_numpy(const array& x_in, const array& codebooks_in) {
  const array x = elements(x_in), codebooks = elements(codebooks_in);
  AssignResidual p{};
  p.x = rows_of(x, false, "assign_residual");
  p.codebooks = codebooks_of(codebooks, "assign_residual");
  Shape shape = shape_of(x);
  shape.back() = p.codebooks.groups;
  array index = empty(shape, py::dtype::of<int64_t>());
  array residual = empty(shape_of(x), x.dtype());
  p.index = static_cast<int64_t*>(index.mutable_data());
  p.residual = residual.mutable_data();
  const Pool threads = pool();
  Scratch scratch(assign_residual_scratch(p, threads.threads));
  p.scratch = scratch.data();
  {
    const py::gil_scoped_release release;
    assign_residual(p, threads);
  }
  return py::make_tuple(index, residual);
}

}  // namespace

void bind_assign_residual(py::module_& m) { m.def("assign_residual", &assign_residual_numpy); }

}  // namespace tk::bind
