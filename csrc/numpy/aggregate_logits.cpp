// aggregate_logits for NumPy arrays.
#include "numpy/aggregate.h"

namespace tk::bind {
namespace {

array aggregate_logits_numpy(array logits, array value, const py::object& mask_or_none) {
  const array mask = elements_or_none(mask_or_none);
  logits = rows_contiguous(logits);
  value = rows_contiguous(value);
  AggregateLogits p{};
  p.dtype = dtype_of(value, "aggregate_logits");
  p.B = value.shape(0);
  p.N = value.shape(1);
  p.M = logits.shape(2);
  p.C = value.shape(2);
  p.logits = matrices_of(logits);
  p.value = matrices_of(value);
  p.mask = per_token<bool>(mask);
  array out = empty({p.B, p.M, p.C}, value.dtype());
  array lse = empty({p.B, p.M}, py::dtype::of<float>());
  p.out = out.mutable_data();
  p.lse = static_cast<float*>(lse.mutable_data());
  const Pool threads = pool();
  Scratch scratch(aggregate_logits_scratch(p, threads.threads));
  p.scratch = scratch.data();
  {
    const py::gil_scoped_release release;
    aggregate_logits(p, threads);
  }
  return out;
}

}  // namespace

void bind_aggregate_logits(py::module_& m) { m.def("aggregate_logits", &aggregate_logits_numpy); }

}  // namespace tk::bind
