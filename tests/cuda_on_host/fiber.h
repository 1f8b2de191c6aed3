// Fibers: one stack per CUDA thread and a switch between them that costs a few nanoseconds.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#error "cuda_on_host: the context switch is written for x86-64 only"
#endif

namespace tk::cuda::host {

// 64 KB, and so much that the same variable of different threads falls into different cache lines.
constexpr size_t kStack = 64 * 1024 + 1088;
constexpr int kFibers = 16384;  // resident at once, at most

// Leaves the stack in use, whose pointer is kept in *from, and goes on with the one of `to`.
extern "C" void tk_switch(void** from, void* to);

// What tk_switch leaves on a stack that waits.
struct Saved {
  uint64_t r15, r14, r13, r12, rbx, frame, resume;
};

// All stacks lie side by side, so that an address tells whose it is. Untouched pages cost nothing.
char* stacks();

// A fresh stack of the pool that will call `start`, which never returns.
void* prepare(char* stack, void (*start)());

// Whether what was written down at the end of a stack is still there.
bool intact(const char* stack);

}  // namespace tk::cuda::host
