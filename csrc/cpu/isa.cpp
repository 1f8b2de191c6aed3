// Asks the processor once which instruction set it has and sends every call to the kernels compiled
// for it.
#include "cpu/isa.h"

#include <cstring>

namespace tk {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

bool always() { return true; }

// Best first.
constexpr InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512bf16", &avx512bf16::kKernels, has_avx512bf16},
    {"avx512", &avx512::kKernels, has_avx512},
    {"avx2", &avx2::kKernels, has_avx2},
#endif
    {"baseline", &baseline::kKernels, always},
};

const InstructionSet* best() {
  for (const InstructionSet& set : kSets) {
    if (set.supported()) return &set;
  }
  return nullptr;
}

const InstructionSet* current = best();

}  // namespace

#define TK_FORWARD(op, Params)                                                                     \
  Status op(const Params& params, const Pool& pool) { return current->kernels->op(params, pool); } \
  int64_t op##_scratch(const Params& params, int threads) {                                        \
    return current->kernels->op##_scratch(params, threads);                                        \
  }
TK_CPU_KERNELS(TK_FORWARD)
#undef TK_FORWARD

const char* instruction_set() { return current->name; }

bool set_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(set.name, name) == 0 && set.supported()) {
      current = &set;
      return true;
    }
  }
  return false;
}

}  // namespace tk
