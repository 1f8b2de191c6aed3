// aggregate_soft for NumPy arrays.
#include "numpy/aggregate.h"

namespace tk::bind {
namespace {

// bias: float32 or None; mask: bool or None. Returns (tokens, weights or None).
py::tuple aggregate_soft_numpy(array query, array key, array value, const py::object& bias_or_none,
                               const py::object& mask_or_none, float scale, bool return_weights) {
  const array bias = elements_or_none(bias_or_none), mask = elements_or_none(mask_or_none);
  query = rows_contiguous(query);
  key = rows_contiguous(key);
  value = rows_contiguous(value);
  AggregateSoft p{};
  p.dtype = dtype_of(value, "aggregate_soft");
  p.B = key.shape(0);
  p.N = key.shape(1);
  p.E = key.shape(2);
  p.M = query.shape(query.ndim() - 2);
  p.C = value.shape(2);
  p.query = matrices_of(query);
  p.key = matrices_of(key);
  p.value = matrices_of(value);
  p.bias = per_token<float>(bias);
  p.mask = per_token<bool>(mask);
  p.scale = scale;
  array out = empty({p.B, p.M, p.C}, value.dtype());
  array lse = empty({p.B, p.M}, py::dtype::of<float>());
  array weights = empty({return_weights ? p.B : 0, p.N, p.M}, py::dtype::of<float>());
  p.out = out.mutable_data();
  p.lse = static_cast<float*>(lse.mutable_data());
  p.weights = return_weights ? static_cast<float*>(weights.mutable_data()) : nullptr;
  const Pool threads = pool();
  Scratch scratch(aggregate_soft_scratch(p, threads.threads));
  p.scratch = scratch.data();
  {
    const py::gil_scoped_release release;
    aggregate_soft(p, threads);
  }
  return py::make_tuple(out, weights);
}

}  // namespace

void bind_aggregate_soft(py::module_& m) { m.def("aggregate_soft", &aggregate_soft_numpy); }

}  // namespace tk::bind
