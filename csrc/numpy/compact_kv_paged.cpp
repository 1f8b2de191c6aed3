// compact_kv_paged for NumPy arrays.
#include "numpy/compact.h"

namespace tk::bind {
namespace {

constexpr const char* kOp = "compact_kv_paged";

// The arrays were checked by the Python front: shapes agree, integers are int64 or int32,
// frequencies contiguous float32.
py::tuple compact_kv_paged_numpy(Arrays tensors, const array& block_table, const Arrays& index,
                                 const Arrays& lengths, int64_t per_layer, bool fill,
                                 const py::object& inv_freq, const Arrays& old_positions,
                                 const Arrays& new_positions) {
  Call call;
  CompactKvPaged p{};
  const array table = elements(block_table);
  p.table = table.data();
  p.table_batch_stride = stride_of(table, 0);
  p.table_stride = stride_of(table, 1);
  p.wide = table.itemsize() == 8;
  p.max_blocks = table.shape(1);
  p.block_count = tensors[0].shape(0);
  p.block_size = tensors[0].shape(1);
  for (size_t t = 0; t < tensors.size(); ++t) {
    array& tensor = tensors[t];
    if (t % static_cast<size_t>(per_layer) == 0) {
      call.layers.push_back({tensor.shape(2), p.max_blocks * p.block_size});
      check(inv_freq.is_none() || aligned(tensor), kOp,
            "pool: allowed keys of aligned elements with rope");
    }
    void* data = tensor.mutable_data();
    call.tensors.push_back({data, data, tensor.strides(0), tensor.strides(2), tensor.strides(1), 0,
                            0, 0, tensor.shape(3) * tensor.itemsize()});
  }
  set_rows(call, index, lengths, inv_freq, old_positions, new_positions, tensors[0]);
  call.p.per_layer = per_layer;
  call.p.batch = table.shape(0);
  call.p.fill = fill;
  call.p.in_place = true;
  const char* complaint = "";
  call.p.complaint = &complaint;
  array freed = empty({table.shape(0), table.shape(1)}, py::dtype::of<int64_t>());
  p.cache = call.p;
  p.freed = static_cast<int64_t*>(freed.mutable_data());
  const Pool threads = pool();
  Scratch scratch(compact_kv_paged_scratch(p, threads.threads));
  p.scratch = scratch.data();
  Status status;
  {
    const py::gil_scoped_release release;
    status = compact_kv_paged(p, threads);
  }
  if (status != Status::kOk) check(status, kOp, complaint);
  return py::make_tuple(call.new_lengths, call.positions, freed);
}

}  // namespace

void bind_compact_kv_paged(py::module_& m) { m.def("compact_kv_paged", &compact_kv_paged_numpy); }

}  // namespace tk::bind
