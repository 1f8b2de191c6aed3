// The whole C++ API of the CPU core: one plain struct per op, filled by a binding, read by a kernel.
//
// A binding checks, allocates the outputs and `<op>_scratch` bytes, and calls `<op>(params, pool)` once. The kernel allocates nothing
// and owns no thread: it lends out ranges through `Pool`. Strides count elements; the last dimension of a token tensor is
// contiguous. Letters: B batch, P prefix tokens, N tokens in, M tokens out, C channels, H heads, D head dim, K codes, L layers.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace tk {

// The threads of whoever calls. `run` splits [0, count) into ranges of at least `grain` and calls body(context, begin, end) on each.
struct Pool {
  using Body = void (*)(const void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, Body body, const void* context);
  int threads;
};

// A kernel that finds a bad value in an index or length tensor says so here; the binding turns it into an error.
enum class Status : int32_t { kOk, kBadValue };

// The instruction set in use ("avx512", "avx2", "baseline"); tests choose another one, which must be supported.
const char* instruction_set();
bool set_instruction_set(const char* name);

// gather_topk: the k best of N scores per image, and their rows of every tensor, in one call. Rows are bytes.
struct GatherTopk {
  struct Rows {
    const void* from;                 // (B, P+N, row_bytes)
    void* to;                         // dense: (B, P+k+fused, row_bytes); ragged: (total, row_bytes)
    int64_t batch_stride, token_stride;  // of `from`, in bytes
    int64_t row_bytes;
  };
  static constexpr int kMaxTensors = 16;
};

// slim_tokens: softmax over the tokens of scale · GELU(LN(x) · w1ᵀ + b1) · w2ᵀ, applied to x. H is the hidden width of the projection.
struct SlimTokens {
  DType dtype;                               // of every `const void*` and of `out`
  int64_t batch, tokens, channels, hidden, slots;  // B, N, C, H, M
  const void* x;                             // (B, N, C)
  int64_t x_batch, x_token;                  // strides
  const void *norm_weight, *norm_bias;       // (C)
  const void* w1;                            // (H, C)
  const void* b1;                            // (H)
  const void* w2;                            // (M, H)
  int64_t w1_row, w2_row;                    // strides
  float scale;
  float eps;
  void* out;         // (B, M, C), contiguous
  float* lse;        // (B, M): logarithm of the softmax's denominator
  float* projected;  // (B, N, H): what goes into the GELU, for the backward pass; or null
  void* scratch;
};

// slim_tokens_backward: the gradients of everything that slim_tokens reads.
struct SlimTokensBackward {
  SlimTokens forward;      // its inputs; `out`, `lse` as it left them; `projected` may be null, then it is computed again
  const void* grad_out;    // (B, M, C), of the same dtype
  int64_t grad_batch, grad_slot;  // strides
  void* grad_x;            // (B, N, C), contiguous
  void *grad_norm_weight, *grad_norm_bias, *grad_w1, *grad_b1, *grad_w2;  // contiguous, of the same dtype
  float* grad_scale;       // one number
  void* scratch;
};

}  // namespace tk
