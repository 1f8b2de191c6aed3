// How a kernel deals out its scratch, and its tasks to the workers of a pool.
#pragma once

#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

// Hands out consecutive pieces of the scratch, each aligned to a cache line; from address 0 it only
// counts what would be `used`.
struct Arena {
  uintptr_t base;
  int64_t used = 0;

  TK_INLINE explicit Arena(uintptr_t address) : base(address) {}
  TK_INLINE explicit Arena(const void* memory) : base(reinterpret_cast<uintptr_t>(memory)) {}

  TK_INLINE char* bytes(int64_t count) {
    const uintptr_t piece = base + static_cast<uintptr_t>(used);
    used += ceil_div(count, 64) * 64;
    return reinterpret_cast<char*>(piece);
  }

  TK_INLINE float* floats(int64_t count) {
    return reinterpret_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float))));
  }
};

// `workers` threads take the tasks one by one: body(task, worker). Which worker meets which task
// changes no result.
template <class Body>
TK_INLINE void share_tasks(const Pool& pool, int64_t tasks, int64_t workers, const Body& body) {
  int64_t next = 0;
  parallel_for(pool, smaller(tasks, workers), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;)
        body(task, worker);
    }
  });
}

}  // namespace
}  // namespace tk::TK_ISA
