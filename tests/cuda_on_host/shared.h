// Shared memory as the executor sees it: where it lies, and how accesses to it are told in words.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda::host {

inline const char* verb(Use use) {
  return use == Use::kRead ? "read" : use == Use::kWrite ? "write" : "atomic";
}

void touch_shared(Block& block, uintptr_t address, size_t bytes, Use use, const void* code);

}  // namespace tk::cuda::host
