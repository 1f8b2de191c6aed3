// compact_kv_paged for torch tensors.
#include "torch/compact.h"

namespace tk::bind {
namespace {

constexpr const char* kOp = "compact_kv_paged";

void set_table(const Tensor& table, CompactKvPaged& p) {
  const ScalarType type = table.scalar_type();
  allow(type == ScalarType::Long || type == ScalarType::Int, kOp, "block_table", "int64, int32");
  allow(table.dim() == 2, kOp, "block_table", "2 dimensions");
  p.table = table.data_ptr();
  p.table_batch_stride = table.stride(0);
  p.table_stride = table.stride(1);
  p.wide = type == ScalarType::Long;
  p.max_blocks = table.size(1);
}

void set_pool(const Tensors& pool, int64_t per_layer, CompactKvPaged& p, Call& call) {
  check(per_layer > 0 && !pool.empty() && static_cast<int64_t>(pool.size()) % per_layer == 0, kOp,
        "pool: allowed tuples of one length");
  for (size_t t = 0; t < pool.size(); ++t) {
    const Tensor& tensor = pool[t];
    const Tensor& first = pool[t - t % static_cast<size_t>(per_layer)];
    check(tensor.dim() == 4 && tensor.size(0) == pool[0].size(0) && tensor.size(1) > 0 &&
              tensor.size(1) == pool[0].size(1) && tensor.size(2) == first.size(2),
          kOp, "pool: allowed (num_blocks, block_size, G, D), the same G in one layer");
    check(tensor.stride(3) == 1 || tensor.size(3) <= 1, kOp,
          "pool: allowed a contiguous last dimension in place");
    if (t % static_cast<size_t>(per_layer) == 0)
      call.layers.push_back({tensor.size(2), p.max_blocks * tensor.size(1)});
    const auto bytes = static_cast<int64_t>(tensor.element_size());
    void* data = tensor.data_ptr();
    call.tensors.push_back({data, data, tensor.stride(0) * bytes, tensor.stride(2) * bytes,
                            tensor.stride(1) * bytes, 0, 0, 0, tensor.size(3) * bytes});
  }
  p.block_count = pool[0].size(0);
  p.block_size = pool[0].size(1);
  check(p.max_blocks <= INT64_MAX / 2 / p.block_size, kOp, "block_table: allowed fewer blocks");
}

std::tuple<Tensor, Tensor, Tensor> compact_kv_paged(Tensors pool_tensors, Tensor table,
                                                    Tensors index, Tensors lengths,
                                                    int64_t per_layer, bool fill,
                                                    std::optional<Tensor> inv_freq,
                                                    Tensors old_positions, Tensors new_positions) {
  const Place place(table);
  Call call;
  CompactKvPaged p{};
  call.op = kOp;
  call.p.fill = fill;
  call.p.in_place = true;
  set_table(table, p);
  set_pool(pool_tensors, per_layer, p, call);
  call.p.batch = table.size(0);
  call.p.per_layer = per_layer;
  for (const Tensor& one : index) {
    call.indices.push_back({rows_of(one, true, kOp, "index"), nullptr, nullptr});
    allow(call.indices.back().kept.count <= p.max_blocks * p.block_size, kOp, "index",
          "at most max_blocks · block_size entries");
  }
  call.lengths = rows_of(lengths, false, kOp, "lengths");
  call.old_positions = rows_of(old_positions, true, kOp, "rope");
  call.new_positions = rows_of(new_positions, true, kOp, "rope");
  check_count(call.lengths.size(), call.layers.size(), false, kOp, "lengths");
  set_rope(pool_tensors, inv_freq, call);
  check_index(call);
  auto [new_lengths, positions] = index_outputs(place, index, call);
  Tensor freed = place.empty({call.p.batch, p.max_blocks}, ScalarType::Long);
  set_pointers(call);
  const char* complaint = "";
  call.p.complaint = &complaint;
  p.cache = call.p;
  p.freed = static_cast<int64_t*>(freed.data_ptr());
  place.run(
      kOp, "",
      [&](const auto& threads) {
        Scratch scratch(compact_kv_paged_scratch(p, threads.threads));
        p.scratch = scratch.data();
        const Status status = tk::compact_kv_paged(p, threads);
        if (status != Status::kOk) check(status, kOp, complaint);
        return status;
      },
      [&](auto* stream) {
        Tensor scratch = place.scratch(compact_kv_paged_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return compact_kv_paged_cuda(p, stream);
      });
  return {new_lengths, positions, freed};
}

}  // namespace

TK_LIBRARY(CPU, m) { TK_IMPL(m, compact_kv_paged); }
TK_LIBRARY(CUDA, m) { TK_IMPL(m, compact_kv_paged); }

}  // namespace tk::bind
