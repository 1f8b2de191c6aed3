// The kernels of one instruction set, as a table: compiled once per instruction set.
#include "cpu/isa.h"

namespace tk::TK_ISA {

#define TK_DECLARE(op, Params)                       \
  Status op(const Params& params, const Pool& pool); \
  int64_t op##_scratch(const Params& params, int threads);
TK_CPU_KERNELS(TK_DECLARE)
#undef TK_DECLARE

#define TK_ENTRY(op, Params) op, op##_scratch,
extern const Kernels kKernels = {TK_CPU_KERNELS(TK_ENTRY)};
#undef TK_ENTRY

}  // namespace tk::TK_ISA
