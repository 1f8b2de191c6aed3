// The whole C++ API: one plain struct per op, filled by a binding, read by a kernel.
//
// A binding checks, allocates the outputs and `<op>_scratch` bytes, and calls `<op>(params, pool)`.
// The kernel allocates nothing and owns no thread: it lends out ranges through `Pool`. On a GPU it
// is `<op>_cuda(params, stream)`, every pointer being one of the device: it launches, waits for
// nothing, and returns null or what went wrong in words; values that only the GPU sees it does not
// follow where they are bad. Strides count elements; the last dimension of a token tensor is
// contiguous. Letters: B batch, P prefix tokens, N tokens in, M tokens out, C channels, H heads, D
// head dim, K codes, L layers.
#pragma once

#include <cstdint>

#include "codes.h"
#include "numeric.h"
#include "pool.h"

namespace tk {

// The instruction set in use ("avx512bf16", "avx512", "avx2", "baseline"); tests choose another
// one, which must be supported.
const char* instruction_set();
bool set_instruction_set(const char* name);

// gather_topk: the best tokens of every image, and their rows of every tensor. First select, then
// (the outputs can be allocated now, their sizes being known) gather. Rows move as bytes.
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
  // One more row: the score-weighted sum or mean of the dropped rows.
  enum class Fuse : int32_t { kNone, kSum, kMean } fuse;
  int64_t* selected;  // (B, N): written by select; row b begins with the chosen tokens of image b
  int64_t* index;     // (total): the chosen tokens of all images, packed
  int64_t* offsets;   // (B+1): the first output row of every image, prefix and fused rows counted
  Tensor tensors[kMaxTensors];
  int tensor_count;
  void* scratch;
};
Status gather_topk_select(const GatherTopk& params, const Pool& pool);
int64_t gather_topk_select_scratch(const GatherTopk& params, int threads);
Status gather_topk(const GatherTopk& params, const Pool& pool);
int64_t gather_topk_scratch(const GatherTopk& params, int threads);
// Selects and gathers in one call, `budgets` being memory of the host; `selected` is not used.
// `ragged`: they differ between images.
const char* gather_topk_cuda(const GatherTopk& params, bool ragged, void* stream);
int64_t gather_topk_cuda_scratch(const GatherTopk& params);

// gather_topk_backward: the rows of the gradient back where they came from, zeros for the others;
// with a fused row its share of both.
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
  int64_t rows;  // of every gradient: the index and what each image has besides; guards a GPU
  GatherTopk::Fuse fuse;
  Tensor tensors[GatherTopk::kMaxTensors];
  int tensor_count;
  void* scratch;
};
Status gather_topk_backward(const GatherTopkBackward& params, const Pool& pool);
int64_t gather_topk_backward_scratch(const GatherTopkBackward& params, int threads);
const char* gather_topk_backward_cuda(const GatherTopkBackward& params, void* stream);
int64_t gather_topk_backward_cuda_scratch(const GatherTopkBackward& params);

// One value per token of every image: element (b, n) at data[b * batch_stride + n * token_stride];
// null: absent.
template <class T>
struct PerToken {
  const T* data;
  int64_t batch_stride, token_stride;
};

// One matrix per image, rows contiguous: (b, i, j) at data[b * batch_stride + i * row_stride + j].
struct Matrices {
  const void* data;
  int64_t batch_stride, row_stride;
};

// aggregate_soft: out[b, m] = Σ_n softmax_n(scale · ⟨query[b, m], key[b, n]⟩ + bias[b, n]) · value.
struct AggregateSoft {
  DType dtype;  // of query, key, value, out
  int64_t B, M, N, E, C;
  Matrices query;        // (B, M, E); batch stride 0: shared by all images
  Matrices key;          // (B, N, E)
  Matrices value;        // (B, N, C)
  PerToken<float> bias;  // (B, N)
  PerToken<bool> mask;   // (B, N), true where a token takes part
  float scale;
  const float* scale_tensor;  // one number in place of `scale`, or null
  void* scratch;
  void* out;   // (B, M, C)
  float* lse;  // (B, M): logarithm of a slot's sum of exponentials, −inf where no token takes part
  float* weights;  // (B, N, M), the softmax itself, or null
};
Status aggregate_soft(const AggregateSoft& params, const Pool& pool);
int64_t aggregate_soft_scratch(const AggregateSoft& params, int threads);
const char* aggregate_soft_cuda(const AggregateSoft& params, void* stream);
int64_t aggregate_soft_cuda_scratch(const AggregateSoft& params);

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
  void* query_grad;   // (M, E) where the query is shared, else (B, M, E)
  void* key_grad;     // (B, N, E)
  void* value_grad;   // (B, N, C)
  float* bias_grad;   // (B, N)
  float* scale_grad;  // one number; its weights are always made again
};
Status aggregate_soft_backward(const AggregateSoftBackward& params, const Pool& pool);
int64_t aggregate_soft_backward_scratch(const AggregateSoftBackward& params, int threads);
const char* aggregate_soft_backward_cuda(const AggregateSoftBackward& params, void* stream);
int64_t aggregate_soft_backward_cuda_scratch(const AggregateSoftBackward& params);

// aggregate_logits: the same with given logits.
struct AggregateLogits {
  DType dtype;  // of logits, value, out
  int64_t B, M, N, C;
  Matrices logits;      // (B, N, M)
  Matrices value;       // (B, N, C)
  PerToken<bool> mask;  // (B, N)
  void* scratch;
  void* out;   // (B, M, C)
  float* lse;  // (B, M)
};
Status aggregate_logits(const AggregateLogits& params, const Pool& pool);
int64_t aggregate_logits_scratch(const AggregateLogits& params, int threads);
const char* aggregate_logits_cuda(const AggregateLogits& params, void* stream);
int64_t aggregate_logits_cuda_scratch(const AggregateLogits& params);

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
const char* aggregate_logits_backward_cuda(const AggregateLogitsBackward& params, void* stream);
int64_t aggregate_logits_backward_cuda_scratch(const AggregateLogitsBackward& params);

// slim_tokens: softmax over the tokens of scale · GELU(LN(x) · w1ᵀ + b1) · w2ᵀ, applied to x.
struct SlimTokens {
  DType dtype;                                     // of every `const void*` and of `out`
  int64_t batch, tokens, channels, hidden, slots;  // B, N, C, H (of the projection), M
  const void* x;                                   // (B, N, C)
  int64_t x_batch, x_token;                        // strides
  const void *norm_weight, *norm_bias;             // (C)
  const void* w1;                                  // (H, C)
  const void* b1;                                  // (H)
  const void* w2;                                  // (M, H)
  int64_t w1_row, w2_row;                          // strides
  float scale;
  const void* scale_tensor;  // one number in place of `scale`, read on a GPU only; or null
  DType scale_dtype;
  float eps;
  void* out;         // (B, M, C), contiguous
  float* lse;        // (B, M): logarithm of the softmax's denominator
  float* projected;  // (B, N, H): what goes into the GELU, for the backward pass; or null
  void* scratch;
};
Status slim_tokens(const SlimTokens& params, const Pool& pool);
int64_t slim_tokens_scratch(const SlimTokens& params, int threads);
const char* slim_tokens_cuda(const SlimTokens& params, void* stream);
int64_t slim_tokens_cuda_scratch(const SlimTokens& params);

// slim_tokens_backward: the gradients of everything that slim_tokens reads.
struct SlimTokensBackward {
  SlimTokens forward;  // its inputs; `out`, `lse` as it left them; `projected` may be null, then it
                       // is computed again
  const void* grad_out;           // (B, M, C), of the same dtype
  int64_t grad_batch, grad_slot;  // strides
  void* grad_x;                   // (B, N, C), contiguous
  void *grad_norm_weight, *grad_norm_bias, *grad_w1, *grad_b1,
      *grad_w2;       // contiguous, of the same dtype
  float* grad_scale;  // one number
  void* scratch;
};
Status slim_tokens_backward(const SlimTokensBackward& params, const Pool& pool);
int64_t slim_tokens_backward_scratch(const SlimTokensBackward& params, int threads);
const char* slim_tokens_backward_cuda(const SlimTokensBackward& params, void* stream);
int64_t slim_tokens_backward_cuda_scratch(const SlimTokensBackward& params);

// score_attention: the share of attention that each key receives from the rows of `query`. softmax
// over the visible keys of scale·⟨q, k⟩, then the mean over heads, then the sum and the maximum
// over rows.
struct ScoreAttention {
  enum class Heads : int32_t { kMean, kGroup, kNone };
  const void* query;  // (B, H, R, D)
  const void* key;    // (B, G, N, D), H a multiple of G
  DType dtype;
  int64_t query_strides[3], key_strides[3];  // batch, head, row
  int64_t batch, heads, key_heads, rows, keys, dim;
  const int64_t* positions;    // (B, R) or null; causal: row t sees the keys 0…position, −1 sees
                               // none. Null: the last R keys
  const int64_t* key_lengths;  // (B) or null: keys from there on are invisible
  const float* lse;  // (B, H, R) or null: the natural logarithm of each row's sum of exponentials
  const float* row_weights;  // (B, R) or null: factors of the sum
  int64_t position_strides[2], length_stride, lse_strides[3], weight_strides[2];
  float scale;
  bool causal;
  int64_t first_column, end_column;  // the keys whose scores are wanted
  Heads reduce_heads;
  bool sum, max;  // sum only, max only, or sum then max
  int64_t pool;   // odd: the window of the average over columns
  float* out;     // (sum + max, B, 1 | G | H, end_column − first_column)
  void* scratch;
};
constexpr int64_t kMaxPool = 1023;
Status score_attention(const ScoreAttention& params, const Pool& pool);
int64_t score_attention_scratch(const ScoreAttention& params, int threads);
const char* score_attention_cuda(const ScoreAttention& params, void* stream);
int64_t score_attention_cuda_scratch(const ScoreAttention& params);
// merge_adjacent: every window of similar neighbours becomes its size-weighted mean.
// The N tokens behind the P prefix tokens lie in raster order on a grid; where the window does not
// divide it, the tokens at the far edges stay. An image (H, W) is the grid {H, 1, W} with the
// window {h, 1, w}, a sequence (N) is {N, 1, 1} with {n, 1, 1}.
struct MergeAdjacent {
  const void* x;  // (B, P+N, C)
  int64_t batch_stride, token_stride;
  const float* size;  // (B, P+N) tokens that a token stands for; null: one each
  int64_t size_batch_stride, size_token_stride;
  const int64_t* counts;  // windows to merge in image b, at b · counts_stride; null: by threshold
  int64_t counts_stride;
  float threshold;     // merge where the mean pairwise cosine is at least this
  bool uniform;        // by threshold, every image merges as many as the image with the fewest
  bool by_similarity;  // merged windows first, the most similar first; else in raster order
  bool packed;         // index counts rows of the whole batch; else rows of the image
  DType dtype;
  int64_t batch, prefix, channels, grid[3], window[3];
  void* tokens;        // (total, C), total = offsets[B] ≤ B(P+N)
  float* merged_size;  // (total)
  int64_t* index;      // (B, P+N): the output row of each token
  int64_t* offsets;    // (B+1): the first output row of each image
  void* scratch;
};

// kBadValue: a count outside [0, windows].
Status merge_adjacent(const MergeAdjacent& params, const Pool& pool);
int64_t merge_adjacent_scratch(const MergeAdjacent& params, int threads);
const char* merge_adjacent_cuda(const MergeAdjacent& params, void* stream);
int64_t merge_adjacent_cuda_scratch(const MergeAdjacent& params);

// merge_runs: a token joins the run of its predecessor where their cosine is at least the threshold
// and the run holds fewer than `max_run` tokens; every run becomes its size-weighted mean. The P
// prefix tokens stay.
struct MergeRuns {
  const void* x;  // (B, P+N, C)
  int64_t batch_stride, token_stride;
  const float* size;  // (B, P+N) or null: one each
  int64_t size_batch_stride, size_token_stride;
  float threshold;
  int64_t max_run;
  bool padded;  // image b starts at row b(P+N), zeros behind its last run; else packed
  DType dtype;
  int64_t batch, prefix, length, channels;  // length: P+N
  void* tokens;        // padded: (B, P+N, C); else (total, C), total = offsets[B] ≤ B(P+N)
  float* merged_size;  // padded: (B, P+N); else (total)
  int64_t* index;      // (B, P+N): the output row of each token; padded: the row within its image
  int64_t* offsets;    // (B+1): how many rows the images before b have
  void* scratch;       // of the GPU alone
};

Status merge_runs(const MergeRuns& params, const Pool& pool);
int64_t merge_runs_scratch(const MergeRuns& params, int threads);
const char* merge_runs_cuda(const MergeRuns& params, void* stream);
int64_t merge_runs_cuda_scratch(const MergeRuns& params);

// merge_backward: the gradient of either merge. Every token takes its share, size / Σ size, of the
// gradient of its output row.
struct MergeBackward {
  const void* grad;  // (images, M, C); packed: one image of `total` rows, batch_stride 0
  int64_t batch_stride, token_stride;
  const int64_t* index;  // (B, length), contiguous
  const float* size;     // (B, length) or null: one each
  int64_t size_batch_stride, size_token_stride;
  const float* merged_size;     // as the rows of grad, contiguous
  int64_t merged_batch_stride;  // M; packed: 0
  DType dtype;
  int64_t batch, length, rows, channels;  // rows: M; packed: total
  void* grad_x;                           // (B, length, C)
};

// kBadValue: an index outside [0, rows).
Status merge_backward(const MergeBackward& params, const Pool& pool);
int64_t merge_backward_scratch(const MergeBackward& params, int threads);
const char* merge_backward_cuda(const MergeBackward& params, void* stream);
// compact_kv: the kept positions of a key/value cache move together, all layers in one call. Rows
// are bytes, whatever the dtype; with `inv_freq` the first tensor of every layer (the keys) is
// rotated by the difference of two positions on the way. Out of place the rows behind the kept ones
// become zero; in place they keep their bytes. Nothing moves before every value is found good.
struct CompactKv {
  // Integers (batch, heads, count), int64 (`wide`) or int32; strides in elements.
  struct Rows {
    const void* values;
    int64_t batch, heads, count;                // batch and heads are 1 where shared
    int64_t batch_stride, head_stride, stride;  // 0 where shared
    bool wide;
  };
  struct Index {
    Rows kept;           // ascending, -1 behind the last
    int64_t* lengths;    // out: (batch, heads)
    int64_t* positions;  // out: (batch, heads, count), where each slot comes from, -1 behind
  };
  struct Layer {
    int64_t heads, tokens;  // G, T
  };
  // Strides in bytes.
  struct Tensor {
    const void* from;  // (B, G, T, row_bytes)
    void* to;          // (B, G, count, row_bytes); in place: `from` with its strides
    int64_t from_batch, from_head, from_row;
    int64_t to_batch, to_head, to_row;
    int64_t row_bytes;
  };

  const Layer* layers;
  const Tensor* tensors;      // layer_count × per_layer
  const Index* indices;       // one for all layers, or one per layer; so are the next three
  const Rows* lengths;        // current lengths, count 1; null: every row is T long
  const Rows* old_positions;  // of each kept entry; read only with inv_freq
  const Rows* new_positions;
  int64_t layer_count, per_layer, index_count, length_count, old_count, new_count;
  int64_t batch;
  const float* inv_freq;  // (half), null: keys are not rotated
  int64_t half;           // D / 2
  DType key_dtype;        // read only with inv_freq
  bool fill;  // kept rows beyond the new length move into the holes below it; else ascending
  bool in_place;
  const char** complaint;  // out: with Status::kBadValue, which values were bad, in words
};

Status compact_kv(const CompactKv& params, const Pool& pool);
int64_t compact_kv_scratch(const CompactKv& params, int threads);
// On a GPU nobody looks at values first: entries that are not good move nothing, `complaint` is not
// read. One launch for up to 128 layers, as far as 32 KB describe them.
const char* compact_kv_cuda(const CompactKv& params, void* stream);

// compact_kv_paged: the same in place, where position t of sample b is row t % block_size of block
// table[b, t / block_size]. Tells also which blocks a sample no longer needs.
struct CompactKvPaged {
  CompactKv cache;    // in_place, with lengths; tokens: max_blocks · block_size
  const void* table;  // (B, max_blocks), int64 (`wide`) or int32; strides in elements
  int64_t table_batch_stride, table_stride;
  bool wide;
  int64_t max_blocks, block_count, block_size;
  int64_t* freed;  // out: (B, max_blocks), −1 behind the last
  void* scratch;
};
// Of a tensor (block_count, block_size, G, row_bytes), `from_batch` is the stride of blocks, and
// `to` and its strides are not read.
Status compact_kv_paged(const CompactKvPaged& params, const Pool& pool);
int64_t compact_kv_paged_scratch(const CompactKvPaged& params, int threads);
const char* compact_kv_paged_cuda(const CompactKvPaged& params, void* stream);
int64_t compact_kv_paged_cuda_scratch(const CompactKvPaged& params);

}  // namespace tk
