// The threads of the NumPy module: started when a call first needs them, asleep between calls.
#include "numpy/threads.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <functional>
#include <system_error>
#include <thread>

namespace tk::bind {
namespace {

constexpr int kMostThreads = 16;

// What one helper has to do; `turn` changes when there is something.
struct Post {
  std::atomic<uint32_t> turn{0};
  Pool::Body body;
  const void* context;
  int64_t begin, end;
};

// The helpers of one process. They live as long as it does: nothing waits for them at its end, and
// nobody frees what they look at.
struct Crew {
  Post posts[kMostThreads - 1];
  std::atomic<int> busy{0};
  int helpers = 0;
};

std::atomic_flag in_use = ATOMIC_FLAG_INIT;
Crew* crew = nullptr;  // touched by whoever holds `in_use`

[[noreturn]] void help(Crew& crew, Post& post) {
  for (uint32_t seen = 0;; ++seen) {
    post.turn.wait(seen, std::memory_order_acquire);
    post.body(post.context, post.begin, post.end);
    if (crew.busy.fetch_sub(1, std::memory_order_acq_rel) == 1) crew.busy.notify_one();
  }
}

// The cores that this process may run on.
int cores() {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

int thread_count() {
  static const int count = std::clamp(cores(), 1, kMostThreads);
  return count;
}

// As many helpers as the system gives.
Crew* start_crew() {
  // The threads of a process are not those of its child.
  static const int forgets = pthread_atfork(nullptr, nullptr, [] {
    crew = nullptr;
    in_use.clear();
  });
  auto* started = new Crew;
  try {
    while (forgets == 0 && started->helpers < thread_count() - 1) {
      std::thread(help, std::ref(*started), std::ref(started->posts[started->helpers])).detach();
      ++started->helpers;
    }
  } catch (const std::system_error&) {
  }
  return started;
}

// All but the first part to the helpers, the first one here.
void share(int64_t count, int64_t parts, Pool::Body body, const void* context) {
  crew->busy.store(static_cast<int>(parts) - 1, std::memory_order_relaxed);
  for (int64_t part = 1; part < parts; ++part) {
    Post& post = crew->posts[part - 1];
    post.body = body;
    post.context = context;
    post.begin = count * part / parts;
    post.end = count * (part + 1) / parts;
    post.turn.fetch_add(1, std::memory_order_release);
    post.turn.notify_one();
  }
  body(context, 0, count / parts);
  for (int left; (left = crew->busy.load(std::memory_order_acquire)) > 0;) crew->busy.wait(left);
}

// Ranges below one grain run in the caller, and so does a call that comes while another one has
// the helpers.
void run(int64_t count, int64_t grain, Pool::Body body, const void* context) {
  const int64_t wanted = std::min<int64_t>(thread_count(), (count + grain - 1) / grain);
  if (wanted <= 1 || in_use.test_and_set(std::memory_order_acquire)) return body(context, 0, count);
  if (crew == nullptr) crew = start_crew();
  share(count, std::min<int64_t>(wanted, crew->helpers + 1), body, context);
  in_use.clear(std::memory_order_release);
}

}  // namespace

Pool pool() { return {run, thread_count()}; }

}  // namespace tk::bind
