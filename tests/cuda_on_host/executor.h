// The executor: runs a grid on the CPU, every CUDA thread a fiber, every block resumable; what the
// host meaning of launch.cuh is made of.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "cuda_on_host/fiber.h"

namespace tk::cuda::host {

// A line of a kernel, by the strings of the compiler: the same line is the same pointers or text.
struct Site {
  const char* file = nullptr;
  int line = 0;
  friend bool operator==(const Site& a, const Site& b);
};

#define TK_SITE ::tk::cuda::host::Site site = {__builtin_FILE(), __builtin_LINE()}

enum class State : uint8_t { kReady, kBarrier, kWarp, kWaiting, kDone };

// What the lanes of a warp do together; the lane that comes last does it for all.
struct Exchange;
using Settle = void (*)(Exchange* lanes, uint32_t mask);

struct Exchange {
  const char* what;  // null: the lane takes part in nothing
  Settle settle;
  uint32_t mask;
  Site site;
  int lane_wanted;          // what the lane asks for
  uint64_t value[2];        // what it gives
  uint64_t result[2];       // what it gets
  const void* operands[4];  // more than fits: places on the stacks of the lanes
};

struct Fiber {
  void* stack_pointer;
  char* stack;
  State state;
  Site site;  // where it waits
  Exchange exchange;
};

// One byte of shared memory: who wrote it, who read it since.
struct Cell {
  enum Kind : uint8_t { kGap, kEmpty, kPlain, kAtomic };
  struct Access {
    uint32_t epoch, stamp,
        code;  // code: the address of the instruction, from the start of the object
    uint16_t thread;
    Kind kind;
  };
  Access write, read[2];  // kind kGap in `read`: nobody; in `write`: outside every array
};

constexpr int64_t kArena = 256 * 1024, kMargin = 128 * 1024, kSlot = kArena + 2 * kMargin;
constexpr int kBlocks = 64;  // resident at once, at most

struct Block {
  int64_t number, index[3];  // number: its place in the order of admission
  int threads, slot;
  char* arena;
  std::vector<Fiber> fibers;
  std::vector<uint16_t> ready, waiting;
  int done, arrived, votes, verdict;
  Site barrier;
  uint16_t first_at_barrier;
  bool moved;
  uint32_t epoch;                // barriers so far
  std::vector<uint32_t> clocks;  // threads × 32: what a thread knows of the lanes of its warp
  std::vector<Cell> cells;       // one per byte of the arena
  uint32_t clock(int thread, int other) const { return clocks[thread * 32 + (other & 31)]; }
};

// The order in which blocks start, and how many are resident at once (0: all that fit).
enum class Order : int { kAscending, kDescending, kShuffled };
struct Schedule {
  Order order;
  int window;
};

struct Grid {
  const char* kernel;
  int64_t blocks[3];
  int threads;
  int64_t shared;
  void (*body)(void* context);
  void* context;
};

// What runs; `block` is null while no kernel does.
struct Now {
  Block* block;
  Fiber* fiber;
  uintptr_t arena_slot, stack;
  Grid grid;
  Schedule schedule;
  int64_t resident;
};
extern Now now;

inline int current_thread() { return static_cast<int>(now.fiber - now.block->fibers.data()); }

// Runs the grid to its end. Launches take all schedules in turn, unless one is set.
void run(const Grid& grid);
void set_schedule(int order, int window);  // order −1: in turn

int barrier(bool condition, Site site);  // how many threads of the block said yes
void yield(bool first, Site site);       // of wait_until; `first`: its condition is new
void park(State state, Site site);
void wake(Block& block, int thread);

// One step of the warp: the fiber goes on when all lanes of the mask have come.
Exchange& exchange(const char* what, Settle settle, uint32_t mask, Site site, const Exchange& give);

// Memory.
enum class Use : uint8_t { kRead, kWrite, kAtomic };
void touch(const volatile void* address, size_t bytes, Use use, bool aligned);
void* take_shared(int64_t at, int64_t bytes);
void open_arena(Block& block, int64_t bytes);
void know_each_other(Block& block, int warp, uint32_t mask);

// Says what is wrong, where, and leaves the process.
[[noreturn]] void fault(const std::string& what, const std::string& more = "");
std::string place_of(uint32_t code);  // file:line of an instruction of this object
uint32_t code_of(const void* address);
std::string place_of(const Site& site);
std::string place_of_thread(const Block& block, int thread);
std::string name_of(const Block& block);

// What a faulty process ends with.
constexpr int kFaultExit = 86;

}  // namespace tk::cuda::host
