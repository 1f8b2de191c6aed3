// The threads that a binding lends to a kernel, and the word a kernel sends back.
#pragma once

#include <cstdint>

namespace tk {

// The threads of whoever calls. `run` splits [0, count) into ranges of at least `grain` and calls
// body(context, begin, end) on each.
struct Pool {
  using Body = void (*)(const void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, Body body, const void* context);
  int threads;
};

// A kernel that finds a bad value in an index or length tensor says so here; the binding turns it
// into an error.
enum class Status : int32_t { kOk, kBadValue };

}  // namespace tk
