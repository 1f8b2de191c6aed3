// compact_kv and its in-place form for torch tensors on the CPU.
#include "torch/bind.h"

namespace tk::bind {
namespace {

using Tensors = std::vector<Tensor>;
using Rows = CompactKv::Rows;

constexpr const char* kOp = "compact_kv";

void allow(bool good, const char* name, const char* rule) {
  if (!good) check(false, kOp, std::string(name) + ": allowed " + rule);
}

// (), (B), (B, G) and one more dimension, `entries` long, where there is one; a missing dimension
// is shared.
Rows rows_of(const Tensor& tensor, bool entries, const char* name) {
  const ScalarType type = tensor.scalar_type();
  const int64_t last = tensor.dim() - (entries ? 1 : 0);
  allow(type == ScalarType::Long || type == ScalarType::Int, name, "int64, int32");
  allow(last >= 0 && last <= 2, name, "one row, one per sample, or one per head");
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

std::vector<Rows> rows_of(const Tensors& tensors, bool entries, const char* name) {
  std::vector<Rows> rows;
  rows.reserve(tensors.size());
  for (const Tensor& tensor : tensors) rows.push_back(rows_of(tensor, entries, name));
  return rows;
}

// Everything a call holds: the struct of the core and what its pointers point to.
struct Call {
  CompactKv p{};
  std::vector<CompactKv::Layer> layers;
  std::vector<CompactKv::Tensor> tensors;
  std::vector<CompactKv::Index> indices;
  std::vector<Rows> lengths, old_positions, new_positions;
  Tensors outputs;
};

// Rows shared, or one for each of `batch` samples and `heads` heads; `count` entries, whatever it
// is where −1.
void check_rows(const std::vector<Rows>& rows, size_t layer, int64_t batch, int64_t heads,
                int64_t count, const char* name) {
  const Rows& one = rows[rows.size() == 1 ? 0 : layer];
  allow((one.batch_stride == 0 && one.batch == 1) || one.batch == batch, name,
        "one row per sample");
  allow((one.head_stride == 0 && one.heads == 1) || one.heads == heads, name, "one row per head");
  allow(count < 0 || one.count == count, name, "one entry per index entry");
}

void check_count(size_t count, size_t layers, bool optional, const char* name) {
  allow(count == 1 || count == layers || (optional && count == 0), name, "one, or one per layer");
}

void set_layers(const Tensors& tensors, int64_t per_layer, Call& call) {
  check(per_layer > 0 && !tensors.empty() && static_cast<int64_t>(tensors.size()) % per_layer == 0,
        kOp, "layers: allowed tuples of one length");
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& tensor = tensors[t];
    const Tensor& first = tensors[t - t % static_cast<size_t>(per_layer)];
    check(tensor.dim() == 4 && tensor.size(0) == tensors[0].size(0) &&
              tensor.size(1) == first.size(1) && tensor.size(2) == first.size(2),
          kOp,
          "layers: allowed (B, G, T, D), the same B everywhere, the same G and T in one layer");
    if (t % static_cast<size_t>(per_layer) == 0)
      call.layers.push_back({tensor.size(1), tensor.size(2)});
  }
  call.p.batch = tensors[0].size(0);
  call.p.per_layer = per_layer;
}

void set_rope(const Tensors& tensors, const std::optional<Tensor>& inv_freq, Call& call) {
  if (!inv_freq) return;
  check(inv_freq->scalar_type() == ScalarType::Float && inv_freq->dim() == 1 &&
            inv_freq->is_contiguous(),
        kOp, "rope: allowed contiguous float32 frequencies");
  check_count(call.old_positions.size(), call.layers.size(), false, "rope");
  check_count(call.new_positions.size(), call.layers.size(), false, "rope");
  call.p.inv_freq = static_cast<const float*>(inv_freq->data_ptr());
  call.p.half = inv_freq->size(0);
  call.p.key_dtype = dtype_of(tensors[0], kOp);
  for (size_t t = 0; t < tensors.size(); t += static_cast<size_t>(call.p.per_layer)) {
    check(tensors[t].size(3) == 2 * call.p.half &&
              tensors[t].scalar_type() == tensors[0].scalar_type(),
          kOp, "rope: allowed keys of one dtype and twice as many channels as frequencies");
  }
}

void check_index(const Call& call) {
  check_count(call.indices.size(), call.layers.size(), false, "index");
  check_count(call.lengths.size(), call.layers.size(), true, "lengths");
  std::vector<Rows> kept;
  for (const CompactKv::Index& index : call.indices) kept.push_back(index.kept);
  for (size_t layer = 0; layer < call.layers.size(); ++layer) {
    const int64_t batch = call.p.batch, heads = call.layers[layer].heads;
    check_rows(kept, layer, batch, heads, -1, "index");
    if (!call.lengths.empty()) check_rows(call.lengths, layer, batch, heads, -1, "lengths");
    if (!call.p.inv_freq) continue;
    const int64_t count = kept[kept.size() == 1 ? 0 : layer].count;
    check_rows(call.old_positions, layer, batch, heads, count, "rope");
    check_rows(call.new_positions, layer, batch, heads, count, "rope");
  }
}

Tensor empty_like_index(const Tensor& index, int64_t dims) {
  if (dims == 0) return empty({}, ScalarType::Long);
  if (dims == 1) return empty({index.size(0)}, ScalarType::Long);
  if (dims == 2) return empty({index.size(0), index.size(1)}, ScalarType::Long);
  return empty({index.size(0), index.size(1), index.size(2)}, ScalarType::Long);
}

// Lengths and positions of all index rows: of one index in its own shape, of several packed.
std::tuple<Tensor, Tensor> index_outputs(const Tensors& index, Call& call) {
  int64_t rows = 0, entries = 0;
  for (const CompactKv::Index& one : call.indices) {
    rows += one.kept.batch * one.kept.heads;
    entries += one.kept.batch * one.kept.heads * one.kept.count;
  }
  const bool one_shape = index.size() == 1;
  Tensor lengths =
      one_shape ? empty_like_index(index[0], index[0].dim() - 1) : empty({rows}, ScalarType::Long);
  Tensor positions =
      one_shape ? empty_like_index(index[0], index[0].dim()) : empty({entries}, ScalarType::Long);
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

void set_tensors(Tensors& tensors, Call& call) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& from = tensors[t];
    const auto layer = t / static_cast<size_t>(call.p.per_layer);
    const int64_t count = call.indices[call.indices.size() == 1 ? 0 : layer].kept.count;
    if (call.p.in_place) {
      check(count <= from.size(2), kOp, "index: allowed at most T entries in place");
    } else {
      call.outputs.push_back(
          empty({from.size(0), from.size(1), count, from.size(3)}, from.scalar_type()));
    }
    const Tensor& to = call.p.in_place ? from : call.outputs.back();
    const auto bytes = static_cast<int64_t>(from.element_size());
    call.tensors.push_back({from.data_ptr(), to.data_ptr(), from.stride(0) * bytes,
                            from.stride(1) * bytes, from.stride(2) * bytes, to.stride(0) * bytes,
                            to.stride(1) * bytes, to.stride(2) * bytes, from.size(3) * bytes});
  }
}

void run(Call& call) {
  CompactKv& p = call.p;
  p.layers = call.layers.data();
  p.tensors = call.tensors.data();
  p.indices = call.indices.data();
  p.lengths = call.lengths.empty() ? nullptr : call.lengths.data();
  p.old_positions = call.old_positions.data();
  p.new_positions = call.new_positions.data();
  p.layer_count = static_cast<int64_t>(call.layers.size());
  p.index_count = static_cast<int64_t>(call.indices.size());
  p.length_count = static_cast<int64_t>(call.lengths.size());
  p.old_count = static_cast<int64_t>(call.old_positions.size());
  p.new_count = static_cast<int64_t>(call.new_positions.size());
  const char* complaint = "";
  p.complaint = &complaint;
  const Status status = compact_kv(p, pool());
  if (status != Status::kOk) check(status, p.in_place ? "compact_kv_" : kOp, complaint);
}

std::tuple<Tensors, Tensor, Tensor> compact(Tensors& tensors, const Tensors& index,
                                            const Tensors& lengths, int64_t per_layer, bool fill,
                                            const std::optional<Tensor>& inv_freq,
                                            const Tensors& old_positions,
                                            const Tensors& new_positions, bool in_place) {
  Call call;
  call.p.fill = fill;
  call.p.in_place = in_place;
  set_layers(tensors, per_layer, call);
  for (const Tensor& one : index)
    call.indices.push_back({rows_of(one, true, "index"), nullptr, nullptr});
  call.lengths = rows_of(lengths, false, "lengths");
  call.old_positions = rows_of(old_positions, true, "rope");
  call.new_positions = rows_of(new_positions, true, "rope");
  set_rope(tensors, inv_freq, call);
  check_index(call);
  set_tensors(tensors, call);
  auto [new_lengths, positions] = index_outputs(index, call);
  run(call);
  return {std::move(call.outputs), new_lengths, positions};
}

std::tuple<Tensors, Tensor, Tensor> compact_kv_cpu(Tensors tensors, Tensors index, Tensors lengths,
                                                   int64_t per_layer, bool fill,
                                                   std::optional<Tensor> inv_freq,
                                                   Tensors old_positions, Tensors new_positions) {
  for (Tensor& tensor : tensors) {
    if (tensor.dim() == 4) tensor = rows_contiguous(tensor);
  }
  return compact(tensors, index, lengths, per_layer, fill, inv_freq, old_positions, new_positions,
                 false);
}

std::tuple<Tensor, Tensor> compact_kv_in_place_cpu(Tensors tensors, Tensors index, Tensors lengths,
                                                   int64_t per_layer, bool fill,
                                                   std::optional<Tensor> inv_freq,
                                                   Tensors old_positions, Tensors new_positions) {
  for (const Tensor& tensor : tensors) {
    check(tensor.dim() == 4 && (tensor.stride(3) == 1 || tensor.size(3) <= 1), "compact_kv_",
          "layers: allowed (B, G, T, D) with a contiguous last dimension in place");
  }
  auto [outputs, new_lengths, positions] = compact(tensors, index, lengths, per_layer, fill,
                                                   inv_freq, old_positions, new_positions, true);
  return {new_lengths, positions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) {
  m.impl("compact_kv", TORCH_BOX(&compact_kv_cpu));
  m.impl("compact_kv_", TORCH_BOX(&compact_kv_in_place_cpu));
}

}  // namespace tk::bind
