// What the bindings of both compactions of a key/value cache share: lists of integers per layer,
// and everything one call holds.
#pragma once

#include "compact_call.h"
#include "torch/place.h"

namespace tk::bind {

using Tensors = std::vector<Tensor>;
using Rows = CompactKv::Rows;

inline void allow(bool good, const char* op, const char* name, const char* rule) {
  if (!good) check(false, op, std::string(name) + ": allowed " + rule);
}

// (), (B), (B, G) and one more dimension, `entries` long, where there is one; a missing dimension
// is shared.
inline Rows rows_of(const Tensor& tensor, bool entries, const char* op, const char* name) {
  const ScalarType type = tensor.scalar_type();
  const int64_t last = tensor.dim() - (entries ? 1 : 0);
  allow(type == ScalarType::Long || type == ScalarType::Int, op, name, "int64, int32");
  allow(last >= 0 && last <= 2, op, name, "one row, one per sample, or one per head");
  Rows rows{tensor.data_ptr(), 1, 1, 1, 0, 0, 0, type == ScalarType::Long};
  if (last > 0) {
    rows.batch = tensor.size(0);
    rows.batch_stride = tensor.stride(0);
  }
  if (last > 1) {
    rows.heads = tensor.size(1);
    rows.head_stride = tensor.stride(1);
  }
  if (entries) {
    rows.count = tensor.size(last);
    rows.stride = tensor.stride(last);
  }
  return rows;
}

inline std::vector<Rows> rows_of(const Tensors& tensors, bool entries, const char* op,
                                 const char* name) {
  std::vector<Rows> rows;
  rows.reserve(tensors.size());
  for (const Tensor& tensor : tensors) rows.push_back(rows_of(tensor, entries, op, name));
  return rows;
}

// Everything a call holds: the struct of the core and what its pointers point to.
struct Call {
  const char* op;
  CompactKv p{};
  std::vector<CompactKv::Layer> layers;
  std::vector<CompactKv::Tensor> tensors;
  std::vector<CompactKv::Index> indices;
  std::vector<Rows> lengths, old_positions, new_positions;
};

// Rows shared, or one for each of `batch` samples and `heads` heads; `count` entries, whatever it
// is where −1.
inline void check_rows(const std::vector<Rows>& rows, size_t layer, int64_t batch, int64_t heads,
                       int64_t count, const char* op, const char* name) {
  const Rows& one = rows[rows.size() == 1 ? 0 : layer];
  allow((one.batch_stride == 0 && one.batch == 1) || one.batch == batch, op, name,
        "one row per sample");
  allow((one.head_stride == 0 && one.heads == 1) || one.heads == heads, op, name,
        "one row per head");
  allow(count < 0 || one.count == count, op, name, "one entry per index entry");
}

inline void check_count(size_t count, size_t layers, bool optional, const char* op,
                        const char* name) {
  allow(count == 1 || count == layers || (optional && count == 0), op, name,
        "one, or one per layer");
}

inline void set_rope(const Tensors& tensors, const std::optional<Tensor>& inv_freq, Call& call) {
  if (!inv_freq) return;
  check(inv_freq->scalar_type() == ScalarType::Float && inv_freq->dim() == 1 &&
            inv_freq->is_contiguous(),
        call.op, "rope: allowed contiguous float32 frequencies");
  check_count(call.old_positions.size(), call.layers.size(), false, call.op, "rope");
  check_count(call.new_positions.size(), call.layers.size(), false, call.op, "rope");
  call.p.inv_freq = static_cast<const float*>(inv_freq->data_ptr());
  call.p.half = inv_freq->size(0);
  call.p.key_dtype = dtype_of(tensors[0], call.op);
  for (size_t t = 0; t < tensors.size(); t += static_cast<size_t>(call.p.per_layer)) {
    check(tensors[t].size(3) == 2 * call.p.half &&
              tensors[t].scalar_type() == tensors[0].scalar_type(),
          call.op, "rope: allowed keys of one dtype and twice as many channels as frequencies");
  }
}

inline void check_index(const Call& call) {
  check_count(call.indices.size(), call.layers.size(), false, call.op, "index");
  check_count(call.lengths.size(), call.layers.size(), true, call.op, "lengths");
  std::vector<Rows> kept;
  for (const CompactKv::Index& index : call.indices) kept.push_back(index.kept);
  for (size_t layer = 0; layer < call.layers.size(); ++layer) {
    const int64_t batch = call.p.batch, heads = call.layers[layer].heads;
    check_rows(kept, layer, batch, heads, -1, call.op, "index");
    if (!call.lengths.empty())
      check_rows(call.lengths, layer, batch, heads, -1, call.op, "lengths");
    if (!call.p.inv_freq) continue;
    const int64_t count = kept[kept.size() == 1 ? 0 : layer].count;
    check_rows(call.old_positions, layer, batch, heads, count, call.op, "rope");
    check_rows(call.new_positions, layer, batch, heads, count, call.op, "rope");
  }
}

inline Tensor empty_like_index(const Place& place, const Tensor& index, int64_t dims) {
  if (dims == 0) return place.empty({}, ScalarType::Long);
  if (dims == 1) return place.empty({index.size(0)}, ScalarType::Long);
  if (dims == 2) return place.empty({index.size(0), index.size(1)}, ScalarType::Long);
  return place.empty({index.size(0), index.size(1), index.size(2)}, ScalarType::Long);
}

// Lengths and positions of all index rows: of one index in its own shape, of several packed.
inline std::tuple<Tensor, Tensor> index_outputs(const Place& place, const Tensors& index,
                                                Call& call) {
  int64_t rows = 0, entries = 0;
  for (const CompactKv::Index& one : call.indices) {
    rows += one.kept.batch * one.kept.heads;
    entries += one.kept.batch * one.kept.heads * one.kept.count;
  }
  const bool one_shape = index.size() == 1;
  Tensor lengths = one_shape ? empty_like_index(place, index[0], index[0].dim() - 1)
                             : place.empty({rows}, ScalarType::Long);
  Tensor positions = one_shape ? empty_like_index(place, index[0], index[0].dim())
                               : place.empty({entries}, ScalarType::Long);
  auto* length = static_cast<int64_t*>(lengths.data_ptr());
  auto* position = static_cast<int64_t*>(positions.data_ptr());
  for (CompactKv::Index& one : call.indices) {
    one.lengths = length;
    one.positions = position;
    length += one.kept.batch * one.kept.heads;
    position += one.kept.batch * one.kept.heads * one.kept.count;
  }
  return {lengths, positions};
}

}  // namespace tk::bind
