// The one list of CPU kernels. Every csrc/cpu/<op>.cpp is compiled once per instruction set into a
// namespace of its own (tk::baseline, tk::avx2, tk::avx512; some also in tk::avx512bf16); the
// processor is asked once which of them runs.
#pragma once

#include "tokenkernels.h"

// X(op, Params): defines Status op(const Params&, const Pool&) and int64_t op_scratch(const
// Params&, int threads) per namespace. Those that multiply pairs of bfloat16 where the processor
// can are compiled once more, for AVX512_BF16.
#define TK_PAIR_KERNELS(X)                              \
  X(aggregate_logits, AggregateLogits)                  \
  X(aggregate_logits_backward, AggregateLogitsBackward) \
  X(aggregate_soft, AggregateSoft)                      \
  X(aggregate_soft_backward, AggregateSoftBackward)     \
  X(merge_runs, MergeRuns)                              \
  X(score_attention, ScoreAttention)                    \
  X(slim_tokens, SlimTokens)                            \
  X(slim_tokens_backward, SlimTokensBackward)

#define TK_PLAIN_KERNELS(X)                   \
  X(accumulate_codes, AccumulateCodes)        \
  X(assign_nearest, AssignNearest)            \
  X(assign_residual, AssignResidual)          \
  X(compact_kv, CompactKv)                    \
  X(compact_kv_paged, CompactKvPaged)         \
  X(gather_topk, GatherTopk)                  \
  X(gather_topk_backward, GatherTopkBackward) \
  X(gather_topk_select, GatherTopk)           \
  X(merge_adjacent, MergeAdjacent)            \
  X(merge_backward, MergeBackward)

#define TK_CPU_KERNELS(X) TK_PAIR_KERNELS(X) TK_PLAIN_KERNELS(X)

namespace tk {

struct Kernels {
#define TK_MEMBER(op, Params)                           \
  Status (*op)(const Params& params, const Pool& pool); \
  int64_t (*op##_scratch)(const Params& params, int threads);
  TK_CPU_KERNELS(TK_MEMBER)
#undef TK_MEMBER
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {
extern const Kernels kKernels;
}

}  // namespace tk
