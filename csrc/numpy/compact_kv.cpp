// compact_kv and its in-place form for NumPy arrays.
#include "numpy/bind.h"

namespace tk::bind {
namespace {

using Arrays = std::vector<array>;
using Rows = CompactKv::Rows;

// (), (B), (B, G) and one more dimension of entries where there is one; a missing dimension is
// shared.
std::vector<Rows> rows_of(const Arrays& arrays, bool entries) {
  std::vector<Rows> result;
  for (const array& a : arrays) {
    const auto last = static_cast<int>(a.ndim()) - (entries ? 1 : 0);
    Rows rows{a.data(), 1, 1, 1, 0, 0, 0, a.itemsize() == 8};
    if (last > 0) rows.batch = a.shape(0);
    if (last > 0) rows.batch_stride = stride_of(a, 0);
    if (last > 1) rows.heads = a.shape(1);
    if (last > 1) rows.head_stride = stride_of(a, 1);
    if (entries) rows.count = a.shape(last);
    if (entries) rows.stride = stride_of(a, last);
    result.push_back(rows);
  }
  return result;
}

Arrays all_elements(const Arrays& arrays) {
  Arrays result;
  for (const array& a : arrays) result.push_back(elements(a));
  return result;
}

std::vector<py::ssize_t> shape_of(const array& a, int64_t dims) {
  return {a.shape(), a.shape() + dims};
}

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
py::tuple compact_kv_numpy(const Arrays& tensors, const Arrays& index_in, const Arrays& lengths_in,
                           int64_t per_layer, bool fill, bool in_place, const py::object& inv_freq,
                           const Arrays& old_in, const Arrays& new_in) {
  const Arrays index = all_elements(index_in), lengths = all_elements(lengths_in),
               old_positions = all_elements(old_in), new_positions = all_elements(new_in);
  CompactKv p{};
  const auto of_layer = [&](size_t t) {
    return index.size() == 1 ? 0 : t / static_cast<size_t>(per_layer);
  };
  std::vector<CompactKv::Layer> layers;
  std::vector<CompactKv::Tensor> rows;
  Arrays from, to, new_lengths, positions;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const array& tensor = tensors[t];
    if (t % static_cast<size_t>(per_layer) == 0)
      layers.push_back({tensor.shape(1), tensor.shape(2)});
    if (in_place && !inv_freq.is_none() && t % static_cast<size_t>(per_layer) == 0) {
      check(aligned(tensor), "compact_kv",
            "layers: allowed keys of aligned elements with rope in place");
    }
    from.push_back(in_place ? tensor : rows_contiguous(tensor));
    const array& one = index[of_layer(t)];
    to.push_back(in_place ? tensor
                          : empty({tensor.shape(0), tensor.shape(1), one.shape(one.ndim() - 1),
                                   tensor.shape(3)},
                                  tensor.dtype()));
    rows.push_back(tensor_of(from.back(), to.back()));
  }
  std::vector<CompactKv::Index> indices;
  for (const Rows& kept : rows_of(index, true)) {
    const array& one = index[indices.size()];
    new_lengths.push_back(empty(shape_of(one, one.ndim() - 1), py::dtype::of<int64_t>()));
    positions.push_back(empty(shape_of(one, one.ndim()), py::dtype::of<int64_t>()));
    indices.push_back({kept, static_cast<int64_t*>(new_lengths.back().mutable_data()),
                       static_cast<int64_t*>(positions.back().mutable_data())});
  }
  const std::vector<Rows> limits = rows_of(lengths, false), old_rows = rows_of(old_positions, true),
                          new_rows = rows_of(new_positions, true);
  p.layers = layers.data();
  p.tensors = rows.data();
  p.indices = indices.data();
  p.lengths = limits.empty() ? nullptr : limits.data();
  p.old_positions = old_rows.data();
  p.new_positions = new_rows.data();
  p.layer_count = static_cast<int64_t>(layers.size());
  p.per_layer = per_layer;
  p.index_count = static_cast<int64_t>(indices.size());
  p.length_count = static_cast<int64_t>(limits.size());
  p.old_count = static_cast<int64_t>(old_rows.size());
  p.new_count = static_cast<int64_t>(new_rows.size());
  p.batch = tensors[0].shape(0);
  p.fill = fill;
  p.in_place = in_place;
  array frequencies;
  if (!inv_freq.is_none()) {
    frequencies = elements(py::cast<array>(inv_freq));
    p.inv_freq = static_cast<const float*>(frequencies.data());
    p.half = frequencies.size();
    p.key_dtype = dtype_of(tensors[0], "compact_kv");
  }
  const char* complaint = "";
  p.complaint = &complaint;
  Status status;
  {
    const py::gil_scoped_release release;
    status = compact_kv(p, pool());
  }
  if (status != Status::kOk) check(status, "compact_kv", complaint);
  return py::make_tuple(to, new_lengths, positions);
}

}  // namespace

void bind_compact_kv(py::module_& m) {
  m.def("addresses", &addresses);
  m.def("compact_kv", &compact_kv_numpy);
}

}  // namespace tk::bind
