// The NumPy module: pybind11 over the CPU core, and what the build contains.
#include "numpy/bind.h"

namespace tk::bind {
bool poisoned = false;

void bind_accumulate_codes(py::module_& m);
void bind_aggregate_logits(py::module_& m);
void bind_aggregate_soft(py::module_& m);
void bind_assign_nearest(py::module_& m);
void bind_assign_residual(py::module_& m);
void bind_compact_kv(py::module_& m);
void bind_compact_kv_paged(py::module_& m);
void bind_gather_topk(py::module_& m);
void bind_merge_adjacent(py::module_& m);
void bind_merge_runs(py::module_& m);
void bind_score_attention(py::module_& m);
void bind_slim_tokens(py::module_& m);
}  // namespace tk::bind

PYBIND11_MODULE(_numpy, m) {
  m.def("instruction_set", &tk::instruction_set);
  m.def("set_instruction_set", &tk::set_instruction_set);
  m.def("poison", [](bool on) { tk::bind::poisoned = on; });
  tk::bind::bind_accumulate_codes(m);
  tk::bind::bind_aggregate_logits(m);
  tk::bind::bind_aggregate_soft(m);
  tk::bind::bind_assign_nearest(m);
  tk::bind::bind_assign_residual(m);
  tk::bind::bind_compact_kv(m);
  tk::bind::bind_compact_kv_paged(m);
  tk::bind::bind_gather_topk(m);
  tk::bind::bind_merge_adjacent(m);
  tk::bind::bind_merge_runs(m);
  tk::bind::bind_score_attention(m);
  tk::bind::bind_slim_tokens(m);
}
