// score_attention for NumPy arrays.
#include "numpy/bind.h"

namespace tk::bind {
namespace {

using Heads = ScoreAttention::Heads;
constexpr const char* kOp = "score_attention";

// A small array of the call, if it came: its pointer and its strides. `object` becomes the copy,
// where one is needed, and keeps it.
template <class T>
const T* view(py::object& object, int64_t* strides) {
  if (object.is_none()) return nullptr;
  const array a = elements(py::cast<array>(object));
  object = a;
  for (int i = 0; i < a.ndim(); ++i) strides[i] = stride_of(a, i);
  return static_cast<const T*>(a.data());
}

// Shapes and dtypes were checked by the caller.
array score_attention_numpy(const array& query_any, const array& key_any, float scale, bool causal,
                            py::object query_positions, py::object key_lengths, py::object lse,
                            py::object row_weights, int64_t first_column, int64_t end_column,
                            int heads, bool sum, bool max, int64_t pool_size) {
  const array query = rows_contiguous(query_any), key = rows_contiguous(key_any);
  ScoreAttention p{};
  p.query = query.data();
  p.key = key.data();
  p.dtype = dtype_of(query, kOp);
  for (int i = 0; i < 3; ++i) {
    p.query_strides[i] = stride_of(query, i);
    p.key_strides[i] = stride_of(key, i);
  }
  p.batch = query.shape(0);
  p.heads = query.shape(1);
  p.rows = query.shape(2);
  p.dim = query.shape(3);
  p.key_heads = key.shape(1);
  p.keys = key.shape(2);
  p.scale = scale;
  p.causal = causal;
  p.positions = view<int64_t>(query_positions, p.position_strides);
  p.key_lengths = view<int64_t>(key_lengths, &p.length_stride);
  p.lse = view<float>(lse, p.lse_strides);
  p.row_weights = view<float>(row_weights, p.weight_strides);
  p.first_column = first_column;
  p.end_column = end_column;
  p.reduce_heads = static_cast<Heads>(heads);
  p.sum = sum;
  p.max = max;
  p.pool = pool_size;
  std::vector<py::ssize_t> shape{p.batch, end_column - first_column};
  if (p.reduce_heads == Heads::kGroup) shape.insert(shape.begin() + 1, p.key_heads);
  if (p.reduce_heads == Heads::kNone) shape.insert(shape.begin() + 1, p.heads);
  if (sum && max) shape.insert(shape.begin(), 2);
  array out = empty(shape, py::dtype::of<float>());
  p.out = static_cast<float*>(out.mutable_data());
  const Pool threads = pool();
  Scratch scratch(score_attention_scratch(p, threads.threads));
  p.scratch = scratch.data();
  Status status;
  {
    const py::gil_scoped_release release;
    status = score_attention(p, threads);
  }
  check(status, kOp, "key_lengths, query_positions: allowed 0 … N and at least -1");
  return out;
}

}  // namespace

void bind_score_attention(py::module_& m) { m.def("score_attention", &score_attention_numpy); }

}  // namespace tk::bind
