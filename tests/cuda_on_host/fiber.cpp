// Fibers: the context switch in assembly, and the pool of stacks.
#include "cuda_on_host/fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <new>

// Keeps what a callee must keep; the flags of the floating-point unit are the same everywhere.
asm(R"(
.text
.globl tk_switch
.hidden tk_switch
.type tk_switch, @function
tk_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tk_switch, .-tk_switch
)");

namespace tk::cuda::host {
namespace {

constexpr uint64_t kMark = 0x5ac7e11e5ac7e11e;

char* reserve() {
  void* memory = mmap(nullptr, kFibers * kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory != MAP_FAILED) return static_cast<char*>(memory);
  std::fputs("cuda_on_host: no memory for the stacks\n", stderr);
  std::abort();
}

}  // namespace

char* stacks() {
  static char* const memory = reserve();
  return memory;
}

void* prepare(char* stack, void (*start)()) {
  *reinterpret_cast<uint64_t*>(stack) = kMark;
  char* saved = stack + kStack - 24 - sizeof(Saved);  // as if called: 8 beyond a multiple of 16
  new (saved) Saved{0, 0, 0, 0, 0, 0, reinterpret_cast<uint64_t>(start)};
  *reinterpret_cast<uint64_t*>(saved + sizeof(Saved)) = 0;  // ends every walk
  return saved;
}

bool intact(const char* stack) { return *reinterpret_cast<const uint64_t*>(stack) == kMark; }

}  // namespace tk::cuda::host
