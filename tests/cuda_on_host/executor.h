// The executor: runs a grid on the CPU, every CUDA thread a fiber, every block resumable; what the
// host meaning of launch.cuh is made of.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
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

enum class State : uint8_t { kReady, kBarrier, kCluster, kGroup, kWarp, kWaiting, kDone };

struct Fiber;
struct Exchange;

// Sixteen bytes that pass in registers: what a kernel writes into memory of the executor would be
// checked as its own.
struct Words {
  uint64_t at[2];
};

// Those of a warp, by lane.
struct Exchanges {
  Fiber* first;
  Exchange& operator[](int lane) const;
};

// What the lanes of a warp do together; the lane that comes last does it for all.
struct Meeting {
  const char* what;
  void (*settle)(Exchanges lanes, uint32_t mask);
};

struct Asked {
  uint32_t mask;
  int lane_wanted = 0;
};

struct Exchange {
  const Meeting* meeting;  // null: the lane takes part in nothing
  Asked asked;
  Site site;
  Words value, result;      // what the lane gives, what it gets
  const void* operands[3];  // more than fits: places on the stacks of the lanes
};

// One word of shared memory, or one byte where its bytes are not alike: who wrote it, who read it
// since.
struct Cell {
  // In `write`: outside every array, never written, being copied; written by a thread, a bulk copy,
  // an atomic; told byte by byte in the parts of number `stamp`. In `read`, kGap: by nobody.
  enum Kind : uint32_t { kGap, kEmpty, kComing, kPlain, kCopied, kAtomic, kParts };
  struct Access {
    uint32_t epoch : 29, kind : 3;  // barriers of the block that were before
    uint32_t stamp;                 // of the thread's own clock
    uint32_t code;                  // the address of the instruction, from the start of the object
    uint16_t thread;                // and the rank of its block in the cluster, from bit 10 on
    uint16_t era;                   // barriers of the cluster that were before
    friend bool operator==(const Access&, const Access&) = default;
  };
  Access write, read[2];
};

constexpr int kWord = 4;  // bytes

// Bytes on their way between shared and global memory. They move as late as they may.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool take;  // else zeros
  bool committed;
  int group;
  Cell::Access access;  // of whoever asked
};

// What a group multiplies: left (64, depth) · right (columns, depth)ᵀ, by descriptors.
enum class Number : uint8_t { kBf16, kFp16, kTf32 };
struct Factors {
  Number number;
  int columns;
  bool transposed, across;  // how the right and the left operand lie
  bool add, in_registers;   // to the sums that are there; the left operand
  uint64_t left, right;
  friend bool operator==(const Factors&, const Factors&) = default;
};

struct Product {
  Factors factors;
  Site site;
  bool done;
  float* sums[128];  // of the threads of the group
  const uint32_t* left[128];
  Cell::Access waited[128];  // kGap: not yet
};

// A product that a thread has not waited for; group 0: not committed.
struct UnderWay {
  std::shared_ptr<Product> product;
  int group;
};

// Local variables of a thread that it has not touched since a fence_products.
struct Registers {
  uintptr_t begin, end;
};

struct Fiber {
  void* stack_pointer;
  char* stack;
  State state;
  Site site;  // where it waits
  Exchange exchange;
  std::vector<Copy> copies, stores;  // of its own that it has not waited for
  int copy_groups, store_groups;     // committed so far
  uint32_t fenced;                   // its own clock at the last fence_bulk
  std::vector<UnderWay> products;
  std::vector<Registers> fenced_registers;
  int product_groups;
};

inline Exchange& Exchanges::operator[](int lane) const { return first[lane].exchange; }

// What a Gate waits for, and what those who came knew.
struct GateState {
  int arrivals, missing;
  uint32_t phase;
  std::vector<Copy> copies;
  std::vector<uint32_t> clock;
};

// Threads of a group that have come to a product.
struct GroupState {
  int come;
  std::shared_ptr<Product> product;
};

constexpr int64_t kArena = 256 * 1024, kMargin = 128 * 1024, kSlot = kArena + 2 * kMargin;
constexpr int kBlocks = 64;  // resident at once, at most

struct Block;

struct Cluster {
  std::vector<Block*> blocks;
  int arrived;
  Site barrier;
};

struct Block {
  int64_t index[3];
  std::shared_ptr<Cluster> cluster;
  int rank;
  int threads, slot;
  char* arena;
  std::vector<Fiber> fibers;
  std::vector<uint16_t> ready, waiting;  // ready: a ring, of a power of two
  uint32_t next_ready, end_ready;
  std::vector<uint32_t> exchanging;  // per warp, the lanes that have come to an exchange
  int done, arrived, votes, verdict;
  Site barrier;
  uint16_t first_at_barrier;
  bool moved;
  uint32_t epoch, era;           // barriers so far, of the block and the cluster
  int width;                     // 32, or all threads once there is a gate
  std::vector<uint32_t> clocks;  // threads × width: what a thread knows of its warp, or of all
  std::vector<Cell> cells;       // one per word of the arena
  std::vector<std::array<Cell, kWord>> parts;
  std::vector<uint32_t> free_parts;
  std::vector<std::pair<int64_t, int64_t>> arrays;  // taken of the arena so far
  std::map<int64_t, GateState> gates;               // by their place in the arena
  std::vector<GroupState> groups;
  // By 16 bytes of the arena, times 8, plus the group: the last product that reads them.
  std::unordered_map<int64_t, std::shared_ptr<Product>> read_by_groups;

  uint32_t* knows(int thread) { return clocks.data() + static_cast<ptrdiff_t>(thread) * width; }
  uint32_t& clock(int thread, int other) { return knows(thread)[width == 32 ? other & 31 : other]; }
  int64_t arena_bytes() const { return static_cast<int64_t>(cells.size()) * kWord; }
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
  int threads, cluster;
  int64_t shared;
  void (*body)(void* context);
  void* context;
};

// What runs; `block` is null while no kernel does.
struct Now {
  Block* block;
  Fiber* fiber;
  int thread;
  uintptr_t arena_slot, stack;
  uintptr_t slots, stacks, object;  // where all arenas, all stacks and this object lie
  Grid grid;
  Schedule schedule;
  int64_t resident;
  bool multiplies_in_groups;  // some thread of the grid has begun to
};
extern Now now;

inline int current_thread() { return now.thread; }
inline uint32_t code_of(const void* address) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) - now.object - 1);
}

// For kernels, out of their sight: what they read themselves is checked as their memory.
int thread_here();
int threads_here();
int64_t block_here(int axis);
int64_t blocks_here();
int rank_here();
int cluster_here();

// Runs the grid to its end. Launches take all schedules in turn, unless one is set.
void run(const Grid& grid);
void set_schedule(int order, int window);  // order −1: in turn

// While a GPU of so many multiprocessors is only played, launches are noted and nothing runs: a
// line for each, "kernel blocks threads cluster shared". `play(0)` ends it and forgets them.
void play(int64_t multiprocessors);
const char* launches_noted();
bool note(const Grid& grid);  // whether it has been noted, and is not to run
int64_t multiprocessors();

int barrier(bool condition, Site site);  // how many threads of the block said yes
void cluster_barrier(Site site);
void yield(bool first, Site site);  // of wait_until; `first`: its condition is new
void park(State state, Site site);
void blame(int thread);  // is the one that runs, or is to be named
void wake(Block& block, int thread);

// One step of the warp: the fiber goes on when all lanes of the mask have come.
Words exchange(const Meeting& meeting, Asked asked, Site site, Words give);

// Memory.
enum class Use : uint8_t { kRead, kWrite, kAtomic };
// `code`: where the kernel does it.
void touch(const volatile void* address, size_t bytes, Use use, bool aligned, const void* code);
void* take_shared(int64_t at, int64_t bytes);
void open_arena(Block& block, int64_t bytes);
void know_each_other(Block& block, int warp, uint32_t mask);
void mark_shared(void* address, size_t bytes, Cell::Kind kind, const Cell::Access& access);
char* slots();
void check_copies_done();
bool is_over(const Cell::Access& access);
// A read that is checked, not remembered.
void look(int64_t at, size_t bytes);
// Bulk copies and products see what threads wrote only behind a fence of theirs.
void check_fenced(const char* what, int64_t at, size_t bytes);
void touch_registers(uintptr_t address, size_t bytes, Use use);
void check_not_read_by_groups(Block& block, int64_t at, size_t bytes);
void claim_group_products(bool yes);

inline Cell::Access access_now(const void* code) {
  Block& block = *now.block;
  const int thread = now.thread;
  return {block.epoch & 0x1fffffff,
          Cell::kPlain,
          block.clock(thread, thread),
          code_of(code),
          static_cast<uint16_t>(thread | block.rank << 10),
          static_cast<uint16_t>(block.era)};
}

// In what a kernel calls: the instruction of the kernel.
#define TK_CALLER __builtin_extract_return_addr(__builtin_return_address(0))

// Makes an access to no memory at all a fault like any other.
void catch_signals();

// Says what is wrong, where, and leaves the process.
[[noreturn]] void fault(const std::string& what, const std::string& more = "");
std::string place_of(uint32_t code);  // file:line of an instruction of this object
uintptr_t start_of_object();
std::string place_of(const Site& site);
std::string place_of_thread(const Block& block, int thread);
std::string name_of(const Block& block);

// What a faulty process ends with.
constexpr int kFaultExit = 86;

}  // namespace tk::cuda::host
