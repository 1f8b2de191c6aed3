// compact_kv and its in-place form for torch tensors.
#include "torch/compact.h"

namespace tk::bind {
namespace {

constexpr const char* kOp = "compact_kv";

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

void set_tensors(const Place& place, Tensors& tensors, Call& call, Tensors& outputs) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Tensor& from = tensors[t];
    const auto layer = t / static_cast<size_t>(call.p.per_layer);
    const int64_t count = call.indices[call.indices.size() == 1 ? 0 : layer].kept.count;
    if (call.p.in_place) {
      check(count <= from.size(2), kOp, "index: allowed at most T entries in place");
    } else {
      outputs.push_back(
          place.empty({from.size(0), from.size(1), count, from.size(3)}, from.scalar_type()));
    }
    const Tensor& to = call.p.in_place ? from : outputs.back();
    const auto bytes = static_cast<int64_t>(from.element_size());
    call.tensors.push_back({from.data_ptr(), to.data_ptr(), from.stride(0) * bytes,
                            from.stride(1) * bytes, from.stride(2) * bytes, to.stride(0) * bytes,
                            to.stride(1) * bytes, to.stride(2) * bytes, from.size(3) * bytes});
  }
}

void run(const Place& place, Call& call) {
  set_pointers(call);
  const char* op = call.p.in_place ? "compact_kv_" : kOp;
  const char* complaint = "";
  call.p.complaint = &complaint;
  place.run(
      op, "",
      [&](const auto& threads) {
        const Status status = tk::compact_kv(call.p, threads);
        if (status != Status::kOk) check(status, op, complaint);
        return status;
      },
      [&](auto* stream) { return compact_kv_cuda(call.p, stream); });
}

std::tuple<Tensors, Tensor, Tensor> compact(Tensors& tensors, const Tensors& index,
                                            const Tensors& lengths, int64_t per_layer, bool fill,
                                            const std::optional<Tensor>& inv_freq,
                                            const Tensors& old_positions,
                                            const Tensors& new_positions, bool in_place) {
  check(!tensors.empty(), kOp, "layers: allowed tuples of one length");
  const Place place(tensors[0]);
  Call call;
  call.op = kOp;
  Tensors outputs;
  call.p.fill = fill;
  call.p.in_place = in_place;
  set_layers(tensors, per_layer, call);
  for (const Tensor& one : index)
    call.indices.push_back({rows_of(one, true, kOp, "index"), nullptr, nullptr});
  call.lengths = rows_of(lengths, false, kOp, "lengths");
  call.old_positions = rows_of(old_positions, true, kOp, "rope");
  call.new_positions = rows_of(new_positions, true, kOp, "rope");
  set_rope(tensors, inv_freq, call);
  check_index(call);
  set_tensors(place, tensors, call, outputs);
  auto [new_lengths, positions] = index_outputs(place, index, call);
  run(place, call);
  return {std::move(outputs), new_lengths, positions};
}

std::tuple<Tensors, Tensor, Tensor> compact_kv(Tensors tensors, Tensors index, Tensors lengths,
                                               int64_t per_layer, bool fill,
                                               std::optional<Tensor> inv_freq,
                                               Tensors old_positions, Tensors new_positions) {
  for (Tensor& tensor : tensors) {
    if (tensor.dim() == 4) tensor = rows_contiguous(tensor);
  }
  return compact(tensors, index, lengths, per_layer, fill, inv_freq, old_positions, new_positions,
                 false);
}

std::tuple<Tensor, Tensor> compact_kv_(Tensors tensors, Tensors index, Tensors lengths,
                                       int64_t per_layer, bool fill, std::optional<Tensor> inv_freq,
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

TK_LIBRARY(CPU, m) {
  TK_IMPL(m, compact_kv);
  TK_IMPL(m, compact_kv_);
}

TK_LIBRARY(CUDA, m) {
  TK_IMPL(m, compact_kv);
  TK_IMPL(m, compact_kv_);
}

}  // namespace tk::bind
