// What the bindings of both compactions of a key/value cache share: lists of integers per layer,
// and the results per index.
#pragma once

#include "compact_call.h"
#include "numpy/bind.h"

namespace tk::bind {

using Arrays = std::vector<array>;
using Rows = CompactKv::Rows;

// (), (B), (B, G) and one more dimension of entries where there is one; a missing dimension is
// shared.
inline std::vector<Rows> rows_of(const Arrays& arrays, bool entries) {
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

inline Arrays all_elements(const Arrays& arrays) {
  Arrays result;
  for (const array& a : arrays) result.push_back(elements(a));
  return result;
}

inline std::vector<py::ssize_t> shape_of(const array& a, int64_t dims) {
  return {a.shape(), a.shape() + dims};
}

// Everything a call holds: the struct of the core, what its pointers point to, and the results.
struct Call {
  CompactKv p{};
  Arrays integers, new_lengths, positions;
  std::vector<CompactKv::Layer> layers;
  std::vector<CompactKv::Tensor> tensors;
  std::vector<CompactKv::Index> indices;
  std::vector<Rows> lengths, old_positions, new_positions;
  array frequencies;

  std::vector<Rows> held(const Arrays& arrays, bool entries) {
    const Arrays good = all_elements(arrays);
    integers.insert(integers.end(), good.begin(), good.end());
    return rows_of(good, entries);
  }
};

// All but layers and tensors, which the caller has set; `key` is the first of them.
inline void set_rows(Call& call, const Arrays& index, const Arrays& lengths,
                     const py::object& inv_freq, const Arrays& old_positions,
                     const Arrays& new_positions, const array& key) {
  for (const Rows& kept : call.held(index, true)) {
    const array& one = index[call.indices.size()];
    call.new_lengths.push_back(empty(shape_of(one, one.ndim() - 1), py::dtype::of<int64_t>()));
    call.positions.push_back(empty(shape_of(one, one.ndim()), py::dtype::of<int64_t>()));
    call.indices.push_back({kept, static_cast<int64_t*>(call.new_lengths.back().mutable_data()),
                            static_cast<int64_t*>(call.positions.back().mutable_data())});
  }
  call.lengths = call.held(lengths, false);
  call.old_positions = call.held(old_positions, true);
  call.new_positions = call.held(new_positions, true);
  set_pointers(call);
  if (inv_freq.is_none()) return;
  call.frequencies = elements(py::cast<array>(inv_freq));
  CompactKv& p = call.p;
  p.inv_freq = static_cast<const float*>(call.frequencies.data());
  p.half = call.frequencies.size();
  p.key_dtype = dtype_of(key, "compact_kv");
}

}  // namespace tk::bind
