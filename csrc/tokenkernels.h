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

// The instruction set in use ("avx512", "avx2", "baseline"); tests choose another one, which must be supported.
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

// Vectors of D elements under any number of leading dimensions: row r is the r-th of them in C order. With groups, the last
// leading dimension is set apart: element (r, g, d) lies at offset(r) + g·group_stride + d·stride.
struct TokenRows {
  static constexpr int kMaxDims = 8;
  const void* data;
  DType dtype;
  int64_t rows;  // ∏ sizes
  int dims;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t group_stride, stride;
};

// G codebooks of K codes; element (g, k, d) lies at g·group_stride + k·code_stride + d·stride.
struct Codebooks {
  const void* data;
  DType dtype;
  int64_t groups, codes, dim;
  int64_t group_stride, code_stride, stride;
};

// assign_nearest: the nearest of K codes for every row of every group, never an N×K matrix. Outputs are contiguous.
struct AssignNearest {
  TokenRows x;          // (rows, G, D)
  Codebooks codebook;   // (G, K, D)
  enum class Metric : int32_t { kL2, kCosine, kDot } metric;
  int64_t* index;   // (rows, G)
  float* distance;  // (rows, G) or null: ‖x−e‖², 1 − cos, −⟨x,e⟩
  void* codes;      // (rows, G, D) of the codebook's dtype, or null: the rows of the codebook, as they are
  void* scratch;
};
Status assign_nearest(const AssignNearest& params, const Pool& pool);
int64_t assign_nearest_scratch(const AssignNearest& params, int threads);

// assign_residual: Q rounds of the l2 search, each on what the rounds before left over. Outputs are contiguous.
struct AssignResidual {
  TokenRows x;          // (rows, 1, D)
  Codebooks codebooks;  // (Q, K, D)
  int64_t* index;       // (rows, Q)
  void* residual;       // (rows, D) of x's dtype: x minus its Q codes, rounded once
  void* scratch;
};
Status assign_residual(const AssignResidual& params, const Pool& pool);
int64_t assign_residual_scratch(const AssignResidual& params, int threads);

// accumulate_codes: how many rows chose each code, and their sum, in ascending order of rows whatever the number of threads.
struct AccumulateCodes {
  TokenRows x;           // (rows, G, D)
  const int64_t* index;  // (rows, G) contiguous; −1: this row counts nowhere; anything else outside 0…K−1 is a bad value
  int64_t groups, codes, dim;
  int64_t* counts;  // (G, K)
  float* sums;      // (G, K, D)
  void* scratch;
};
Status accumulate_codes(const AccumulateCodes& params, const Pool& pool);
int64_t accumulate_codes_scratch(const AccumulateCodes& params, int threads);

}  // namespace tk
