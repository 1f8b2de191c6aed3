// compact_kv and its in-place form for NumPy arrays.
#include "numpy/compact.h"

namespace tk::bind {
namespace {

// Where the arrays that have elements begin.
std::vector<uintptr_t> addresses(const Arrays& arrays) {
  std::vector<uintptr_t> result;
  for (const array& a : arrays) {
    if (a.size() > 0) result.push_back(reinterpret_cast<uintptr_t>(a.data()));
  }
  return result;
}

CompactKv::Tensor tensor_of(const array& from, array& to) {
  return {from.data(),     to.mutable_data(), from.strides(0),
          from.strides(1), from.strides(2),   to.strides(0),
          to.strides(1),   to.strides(2),     from.shape(3) * from.itemsize()};
}

// The arrays were checked by the Python front: shapes agree, integers are int64 or int32,
// frequencies contiguous float32.
py::tuple compact_kv_numpy(const Arrays& tensors, const Arrays& index, const Arrays& lengths,
                           int64_t per_layer, bool fill, bool in_place, const py::object& inv_freq,
                           const Arrays& old_positions, const Arrays& new_positions) {
  Call call;
  Arrays from, to;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const array& tensor = tensors[t];
    const bool key = t % static_cast<size_t>(per_layer) == 0;
    if (key) call.layers.push_back({tensor.shape(1), tensor.shape(2)});
    if (in_place && !inv_freq.is_none() && key) {
      check(aligned(tensor), "compact_kv",
            "layers: allowed keys of aligned elements with rope in place");
    }
    from.push_back(in_place ? tensor : rows_contiguous(tensor));
    const array& one = index[index.size() == 1 ? 0 : t / static_cast<size_t>(per_layer)];
    to.push_back(in_place ? tensor
                          : empty({tensor.shape(0), tensor.shape(1), one.shape(one.ndim() - 1),
                                   tensor.shape(3)},
                                  tensor.dtype()));
    call.tensors.push_back(tensor_of(from.back(), to.back()));
  }
  set_rows(call, index, lengths, inv_freq, old_positions, new_positions, tensors[0]);
  call.p.per_layer = per_layer;
  call.p.batch = tensors[0].shape(0);
  call.p.fill = fill;
  call.p.in_place = in_place;
  const char* complaint = "";
  call.p.complaint = &complaint;
  Status status;
  {
    const py::gil_scoped_release release;
    status = compact_kv(call.p, pool());
  }
  if (status != Status::kOk) check(status, "compact_kv", complaint);
  return py::make_tuple(to, call.new_lengths, call.positions);
}

}  // namespace

void bind_compact_kv(py::module_& m) {
  m.def("addresses", &addresses);
  m.def("compact_kv", &compact_kv_numpy);
}

}  // namespace tk::bind
