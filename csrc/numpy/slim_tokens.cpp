// slim_tokens for NumPy arrays.
#include "numpy/bind.h"

namespace tk::bind {
namespace {

array slim_tokens_numpy(const array& x, const array& norm_weight, const array& norm_bias,
                        const array& w1, const array& b1, const array& w2, float scale, float eps) {
  const array tokens = rows_contiguous(x), first = rows_contiguous(w1),
              second = rows_contiguous(w2);
  const array gain = contiguous(norm_weight), shift = contiguous(norm_bias);
  const array bias = contiguous(b1);
  SlimTokens p{};
  p.dtype = dtype_of(x, "slim_tokens");
  p.batch = x.shape(0);
  p.tokens = x.shape(1);
  p.channels = x.shape(2);
  p.hidden = w1.shape(0);
  p.slots = w2.shape(0);
  p.x = tokens.data();
  p.x_batch = stride_of(tokens, 0);
  p.x_token = stride_of(tokens, 1);
  p.norm_weight = gain.data();
  p.norm_bias = shift.data();
  p.w1 = first.data();
  p.b1 = bias.data();
  p.w2 = second.data();
  p.w1_row = stride_of(first, 0);
  p.w2_row = stride_of(second, 0);
  p.scale = scale;
  p.eps = eps;
  array out = empty({p.batch, p.slots, p.channels}, x.dtype());
  p.out = out.mutable_data();
  const Pool threads = pool();
  Scratch scratch(slim_tokens_scratch(p, threads.threads)), lse(p.batch * p.slots * 4);
  p.scratch = scratch.data();
  p.lse = static_cast<float*>(lse.data());
  {
    const py::gil_scoped_release release;
    slim_tokens(p, threads);
  }
  return out;
}

}  // namespace

void bind_slim_tokens(py::module_& m) { m.def("slim_tokens", &slim_tokens_numpy); }

}  // namespace tk::bind
