// What the shared object says of itself, without torch: which instruction sets and which GPUs it
// carries code for.
#include "tokenkernels.h"

#define TK_EXPORT extern "C" __attribute__((visibility("default")))

#ifndef TK_CUDA_ARCHITECTURES  // the build's, separated by commas
#define TK_CUDA_ARCHITECTURES ""
#endif

TK_EXPORT const char* tokenkernels_instruction_set() { return tk::instruction_set(); }

TK_EXPORT const char* tokenkernels_cuda_architectures() { return TK_CUDA_ARCHITECTURES; }

namespace tk::bind {
bool poisoned = false;
}

TK_EXPORT void tokenkernels_poison(int on) { tk::bind::poisoned = on != 0; }

TK_EXPORT int tokenkernels_set_instruction_set(const char* name) {
  return tk::set_instruction_set(name);
}
