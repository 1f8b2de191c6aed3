// The whole C++ API of the CPU core: one plain struct per op, filled by a binding, read by a kernel.
//
// A binding checks, allocates the outputs and `<op>_scratch` bytes, and calls `<op>(params, pool)`. The kernel allocates nothing
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

// The instruction set in use ("avx512bf16", "avx512", "avx2", "baseline"); tests choose another one, which must be supported.
const char* instruction_set();
bool set_instruction_set(const char* name);

// gather_topk: the best tokens of every image, and their rows of every tensor. First select, then (the outputs can be allocated now,
// their sizes being known) gather. Rows move as bytes.
struct GatherTopk {
  static constexpr int kMaxTensors = 16;
  struct Tensor {
    const void* from;                    // (B, P+N, row_bytes)
    void* to;                            // (offsets[B], row_bytes)
    int64_t batch_stride, token_stride;  // of `from`, in bytes
    int64_t row_bytes;
    DType dtype;  // read only where rows are fused
  };
  const void* scores;  // (B, N)
  DType scores_dtype;
  int64_t scores_batch_stride, scores_token_stride;
  const bool* keep;  // (B, N) or null: tokens that come first, whatever their score
  int64_t keep_batch_stride, keep_token_stride;
  int64_t batch, tokens, prefix;
  const int64_t* budgets;  // (B), each 0…N; null where a threshold decides
  float threshold;         // every token with score ≥ threshold
  bool by_score;           // descending score instead of ascending index
  enum class Fuse : int32_t { kNone, kSum, kMean } fuse;  // one more row: the score-weighted sum or mean of the dropped rows
  int64_t* selected;  // (B, N): written by select; row b holds the chosen tokens of image b, the rest of it nothing
  int64_t* index;     // (total): the chosen tokens of all images, packed
  int64_t* offsets;   // (B+1): the first output row of every image (prefix, chosen and fused rows counted)
  Tensor tensors[kMaxTensors];
  int tensor_count;
  void* scratch;
};
Status gather_topk_select(const GatherTopk& params, const Pool& pool);
int64_t gather_topk_select_scratch(const GatherTopk& params, int threads);
Status gather_topk(const GatherTopk& params, const Pool& pool);
int64_t gather_topk_scratch(const GatherTopk& params, int threads);

// gather_topk_backward: the rows of the gradient back where they came from, zeros for the others; with a fused row its share of both.
struct GatherTopkBackward {
  struct Tensor {
    const void* from;  // (offsets[B], C): gradient of the output, contiguous
    void* to;          // (B, P+N, C): gradient of the input, contiguous
    const void* x;     // (B, P+N, C): the input itself, read only where rows are fused
    int64_t x_batch_stride, x_token_stride;
    int64_t channels;
    DType dtype;
  };
  const int64_t* index;    // (total)
  const int64_t* offsets;  // (B+1)
  const void* scores;      // (B, N), with fuse
  DType scores_dtype;
  int64_t scores_batch_stride, scores_token_stride;
  float* scores_gradient;  // (B, N) contiguous, with fuse
  int64_t batch, tokens, prefix;
  GatherTopk::Fuse fuse;
  Tensor tensors[GatherTopk::kMaxTensors];
  int tensor_count;
  void* scratch;
};
Status gather_topk_backward(const GatherTopkBackward& params, const Pool& pool);
int64_t gather_topk_backward_scratch(const GatherTopkBackward& params, int threads);

// One value per token of every image: element (b, n) at data[b * batch_stride + n * token_stride]; null: absent.
template <class T>
struct PerToken {
  const T* data;
  int64_t batch_stride, token_stride;
};

// One matrix per image, its rows contiguous: element (b, i, j) at data[b * batch_stride + i * row_stride + j].
struct Matrices {
  const void* data;
  int64_t batch_stride, row_stride;
};

// aggregate_soft: out[b, m] = sum over n of softmax_n(scale · <query[b, m], key[b, n]> + bias[b, n]) · value[b, n].
struct AggregateSoft {
  DType dtype;  // of query, key, value, out
  int64_t B, M, N, E, C;
  Matrices query;             // (B, M, E); batch stride 0: shared by all images
  Matrices key;               // (B, N, E)
  Matrices value;             // (B, N, C)
  PerToken<float> bias;       // (B, N)
  PerToken<bool> mask;        // (B, N), true where a token takes part
  float scale;
  const float* scale_tensor;  // one number in place of `scale`, or null
  void* scratch;
  void* out;                  // (B, M, C)
  float* lse;                 // (B, M): logarithm of the sum of exponentials of a slot, −inf where no token takes part
  float* weights;             // (B, N, M), the softmax itself, or null
};
Status aggregate_soft(const AggregateSoft& params, const Pool& pool);
int64_t aggregate_soft_scratch(const AggregateSoft& params, int threads);

// The gradients. A null output is not wanted.
struct AggregateSoftBackward {
  DType dtype;  // of gradient, query, key, value, tokens and their gradients
  int64_t B, M, N, E, C;
  Matrices query, key, value;
  PerToken<float> bias;
  PerToken<bool> mask;
  float scale;
  const float* scale_tensor;
  Matrices gradient;     // (B, M, C)
  Matrices tokens;       // (B, M, C), what the forward call gave
  const float* lse;      // (B, M), contiguous
  const float* weights;  // (B, N, M), contiguous, or null: made again from lse
  void* scratch;
  void* query_grad;      // (M, E) where the query is shared, else (B, M, E)
  void* key_grad;        // (B, N, E)
  void* value_grad;      // (B, N, C)
  float* bias_grad;      // (B, N)
  float* scale_grad;     // one number; its weights are always made again
};
Status aggregate_soft_backward(const AggregateSoftBackward& params, const Pool& pool);
int64_t aggregate_soft_backward_scratch(const AggregateSoftBackward& params, int threads);

// aggregate_logits: the same with given logits.
struct AggregateLogits {
  DType dtype;  // of logits, value, out
  int64_t B, M, N, C;
  Matrices logits;      // (B, N, M)
  Matrices value;       // (B, N, C)
  PerToken<bool> mask;  // (B, N)
  void* scratch;
  void* out;            // (B, M, C)
  float* lse;           // (B, M)
};
Status aggregate_logits(const AggregateLogits& params, const Pool& pool);
int64_t aggregate_logits_scratch(const AggregateLogits& params, int threads);

struct AggregateLogitsBackward {
  DType dtype;  // of gradient, logits, value, tokens and the gradients
  int64_t B, M, N, C;
  Matrices logits, value;
  PerToken<bool> mask;
  Matrices gradient;  // (B, M, C)
  Matrices tokens;    // (B, M, C), what the forward call gave
  const float* lse;   // (B, M), contiguous
  void* scratch;
  void* logits_grad;  // (B, N, M), or null
  void* value_grad;   // (B, N, C), or null
};
Status aggregate_logits_backward(const AggregateLogitsBackward& params, const Pool& pool);
int64_t aggregate_logits_backward_scratch(const AggregateLogitsBackward& params, int threads);

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
Status slim_tokens(const SlimTokens& params, const Pool& pool);
int64_t slim_tokens_scratch(const SlimTokens& params, int threads);

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
Status slim_tokens_backward(const SlimTokensBackward& params, const Pool& pool);
int64_t slim_tokens_backward_scratch(const SlimTokensBackward& params, int threads);

}  // namespace tk
