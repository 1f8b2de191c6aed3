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

}  // namespace tk
