// The kernels of one instruction set, as a table: compiled once per instruction set.
#include "cpu/isa.h"

#define TK_DECLARE(op, Params)                       \
  Status op(const Params& params, const Pool& pool); \
  int64_t op##_scratch(const Params& params, int threads);

// TK_PLAIN names the instruction set whose plain kernels serve this one too.
#ifdef TK_PLAIN
namespace tk::TK_PLAIN {
TK_PLAIN_KERNELS(TK_DECLARE)
}
namespace tk::TK_ISA {
#define TK_BORROW(op, Params) \
  using TK_PLAIN::op;         \
  using TK_PLAIN::op##_scratch;
TK_PLAIN_KERNELS(TK_BORROW)
#undef TK_BORROW
}  // namespace tk::TK_ISA
#else
namespace tk::TK_ISA {
TK_PLAIN_KERNELS(TK_DECLARE)
}
#endif

namespace tk::TK_ISA {

TK_PAIR_KERNELS(TK_DECLARE)

#define TK_ENTRY(op, Params) op, op##_scratch,
extern const Kernels kKernels = {TK_CPU_KERNELS(TK_ENTRY)};
#undef TK_ENTRY
#undef TK_DECLARE

}  // namespace tk::TK_ISA
