// The executor: admits blocks, resumes their threads in turn, and knows when nothing can move.
#include "cuda_on_host/executor.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>

namespace tk::cuda::host {

Now now;

bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

namespace {

void* scheduler_stack;
int fixed_order = -1, fixed_window = 0;
int64_t played;  // multiprocessors, 0 where kernels run
std::string noted;
unsigned launches;

// The next thread of the block that can move takes over, or, if there is none, the scheduler.
void switch_away(void** keep) {
  Block& block = *now.block;
  if (block.next_ready == block.end_ready) return tk_switch(keep, scheduler_stack);
  const int thread = block.ready[block.next_ready++ & (block.ready.size() - 1)];
  blame(thread);
  now.stack = reinterpret_cast<uintptr_t>(now.fiber->stack);
  tk_switch(keep, now.fiber->stack_pointer);
}

void start() {
  now.grid.body(now.grid.context);
  check_copies_done();
  if (!intact(now.fiber->stack)) fault("a thread needs more than 64 KB of stack");
  now.fiber->state = State::kDone;
  ++now.block->done;
  now.block->moved = true;
  void* never;
  switch_away(&never);
}

// Lanes that a waiting lane counts on and that will not come.
void explain_warp(Block& block, int thread) {
  const Exchange& mine = block.fibers[static_cast<size_t>(thread)].exchange;
  const int first = thread / 32 * 32;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mine.asked.mask >> lane & 1)) continue;
    const bool there = first + lane < block.threads;
    const Fiber* other = there ? &block.fibers[static_cast<size_t>(first + lane)] : nullptr;
    const Exchange* its = there && other->state == State::kWarp ? &other->exchange : nullptr;
    if (its && its->meeting == mine.meeting && its->asked.mask == mine.asked.mask &&
        its->site == mine.site)
      continue;
    blame(thread);
    std::string why =
        !there                            ? "does not exist"
        : other->state == State::kDone    ? "has ended"
        : other->state == State::kBarrier ? "waits at the barrier of " + place_of(other->site)
        : its == nullptr
            ? "waits at " + place_of(other->site)
            : std::string("is at the ") + its->meeting->what + " of " + place_of(its->site);
    fault(std::string(mine.meeting->what) + " with an inactive lane: lane " + std::to_string(lane) +
          " is in its mask but " + why);
  }
}

// A thread of the same group that does not come to the product at which this one waits.
void explain_group(Block& block, int thread) {
  const int first = thread / 128 * 128;
  for (int t = first; t < first + 128; ++t) {
    const Fiber& other = block.fibers[static_cast<size_t>(t)];
    if (other.state == State::kGroup) continue;
    blame(thread);
    fault("multiply_add_group with a missing warp: warp " + std::to_string(t / 32) + " of its " +
          "group " +
          (other.state == State::kDone ? "has ended" : "waits at " + place_of(other.site)));
  }
}

// Threads wait and nothing will wake them: a warp or a group that is not complete, or a barrier.
void explain(Block& block) {
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kCluster) return;  // it is for other blocks to move
  }
  for (int t = 0; t < block.threads; ++t) {
    if (block.fibers[static_cast<size_t>(t)].state == State::kWarp) explain_warp(block, t);
  }
  for (int t = 0; t < block.threads; ++t) {
    if (block.fibers[static_cast<size_t>(t)].state == State::kGroup) explain_group(block, t);
  }
  for (int t = 0; t < block.threads; ++t) {
    if (block.fibers[static_cast<size_t>(t)].state != State::kBarrier) continue;
    blame(t);
    const auto ended = std::find_if(block.fibers.begin(), block.fibers.end(),
                                    [](const Fiber& f) { return f.state == State::kDone; });
    fault("barrier divergence: " + std::to_string(block.arrived) + " of " +
          std::to_string(block.threads) + " threads wait, thread " +
          std::to_string(ended - block.fibers.begin()) + " has ended");
  }
}

// Resumes all threads that can move; whether any did.
bool turn(Block& block) {
  now.block = &block;
  now.arena_slot = reinterpret_cast<uintptr_t>(block.arena) - kMargin;
  block.moved = false;
  for (const uint16_t thread : block.waiting) wake(block, thread);
  block.waiting.clear();
  if (block.next_ready != block.end_ready) switch_away(&scheduler_stack);
  if (block.waiting.empty() && block.done < block.threads) explain(block);
  return block.moved;
}

class Run {
 public:
  explicit Run(std::mt19937& random) : random_(random) {
    const Grid& grid = now.grid;
    total_ = grid.blocks[0] * grid.blocks[1] * grid.blocks[2] / grid.cluster;
    order_.resize(static_cast<size_t>(total_));
    for (int64_t i = 0; i < total_; ++i) order_[static_cast<size_t>(i)] = i;
    if (now.schedule.order == Order::kDescending) std::reverse(order_.begin(), order_.end());
    if (now.schedule.order == Order::kShuffled) std::shuffle(order_.begin(), order_.end(), random_);
    const int64_t wanted = now.schedule.window > 0 ? now.schedule.window : kBlocks;
    window_ = std::max<int64_t>(grid.cluster,
                                std::min<int64_t>({wanted, kBlocks, kFibers / grid.threads}));
  }

  void whole() {
    while (admitted_ < total_ || !resident_.empty()) {
      bool moved = false;
      while (admitted_ < total_ &&
             static_cast<int64_t>(resident_.size()) + now.grid.cluster <= window_) {
        admit();
        moved = true;
      }
      now.resident = static_cast<int64_t>(resident_.size());
      for (size_t i = 0; i < resident_.size();) {
        moved |= turn(*resident_[i]);
        if (resident_[i]->done < resident_[i]->threads) {
          ++i;
          continue;
        }
        moved = true;
        free_.push_back(resident_[i]);
        resident_.erase(resident_.begin() + static_cast<int64_t>(i));
      }
      if (!moved) deadlock();
    }
  }

 private:
  // The blocks of one cluster.
  void admit() {
    const auto cluster = std::make_shared<Cluster>();
    const int64_t first = order_[static_cast<size_t>(admitted_++)] * now.grid.cluster;
    for (int rank = 0; rank < now.grid.cluster; ++rank) {
      Block* block = find_room();
      const int64_t place = first + rank;
      block->index[0] = place % now.grid.blocks[0];
      block->index[1] = place / now.grid.blocks[0] % now.grid.blocks[1];
      block->index[2] = place / now.grid.blocks[0] / now.grid.blocks[1];
      block->rank = rank;
      block->cluster = cluster;
      cluster->blocks.push_back(block);
      reset(*block);
      resident_.push_back(block);
    }
  }

  Block* find_room() {
    static std::vector<std::unique_ptr<Block>> pool;
    if (!free_.empty()) {
      Block* block = free_.back();
      free_.pop_back();
      return block;
    }
    if (slots_ == pool.size()) pool.push_back(std::make_unique<Block>());
    pool[slots_]->slot = static_cast<int>(slots_);
    return pool[slots_++].get();
  }

  void reset(Block& block) {
    const int threads = now.grid.threads;
    block.threads = threads;
    block.done = block.arrived = block.votes = block.verdict = 0;
    block.epoch = block.era = 0;
    block.gates.clear();
    block.groups.assign(static_cast<size_t>((threads + 127) / 128), {});
    block.read_by_groups.clear();
    block.waiting.clear();
    block.exchanging.assign(static_cast<size_t>(threads / 32), 0);
    block.ready.resize(std::bit_ceil(static_cast<size_t>(threads)));
    block.next_ready = 0;
    block.end_ready = static_cast<uint32_t>(threads);
    block.fibers.resize(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = block.fibers[static_cast<size_t>(t)];
      fiber.stack = stacks() + kStack * static_cast<size_t>(block.slot * threads + t);
      fiber.stack_pointer = prepare(fiber.stack, &start);
      fiber.state = State::kReady;
      fiber.exchange.meeting = nullptr;
      fiber.copy_groups = fiber.store_groups = 0;
      fiber.fenced = 0;
      fiber.product_groups = 0;
      fiber.fenced_registers.clear();
      block.ready[static_cast<size_t>(t)] = static_cast<uint16_t>(t);
    }
    const auto end = block.ready.begin() + threads;
    if (now.schedule.order == Order::kDescending) std::reverse(block.ready.begin(), end);
    if (now.schedule.order == Order::kShuffled) std::shuffle(block.ready.begin(), end, random_);
    block.width = 32;
    block.clocks.assign(static_cast<size_t>(threads) * 32, 0);
    for (int t = 0; t < threads; ++t) block.clock(t, t) = 1;
    open_arena(block, now.grid.shared);
  }

  // The first thread that has not ended: what its block waits for.
  static int waiting_thread(const Block& block) {
    const auto found = std::find_if(block.fibers.begin(), block.fibers.end(),
                                    [](const Fiber& f) { return f.state != State::kDone; });
    return static_cast<int>(found - block.fibers.begin());
  }

  [[noreturn]] void deadlock() {
    std::string more;
    for (const Block* block : resident_) {
      const int t = waiting_thread(*block);
      more += "  " + name_of(*block) + ", thread " + std::to_string(t) + " waits at " +
              place_of_thread(*block, t) + "\n";
    }
    const int64_t outside = (total_ - admitted_) * now.grid.cluster;
    now.block = resident_.front();
    blame(waiting_thread(*now.block));
    fault("deadlock: " + std::to_string(resident_.size()) + " resident blocks wait for each other" +
              (outside > 0 ? " or for one of the " + std::to_string(outside) + " that find no room"
                           : ""),
          more);
  }

  std::mt19937& random_;
  std::vector<int64_t> order_;
  std::vector<Block*> resident_, free_;
  int64_t total_ = 0, admitted_ = 0;  // clusters
  int64_t window_ = 0;                // blocks
  size_t slots_ = 0;
};

}  // namespace

int thread_here() { return current_thread(); }
int threads_here() { return now.block->threads; }
int64_t block_here(int axis) { return now.block->index[axis]; }
int64_t blocks_here() { return now.grid.blocks[0]; }
int rank_here() { return now.block->rank; }
int cluster_here() { return now.grid.cluster; }

void blame(int thread) {
  now.thread = thread;
  now.fiber = &now.block->fibers[static_cast<size_t>(thread)];
}

void park(State state, Site site) {
  Fiber& fiber = *now.fiber;
  if (reinterpret_cast<uintptr_t>(&state) - now.stack >= kStack)
    fault("a thread needs more than 64 KB of stack");
  fiber.state = state;
  fiber.site = site;
  now.block->moved |= state != State::kWaiting;
  switch_away(&fiber.stack_pointer);
}

void wake(Block& block, int thread) {
  block.fibers[static_cast<size_t>(thread)].state = State::kReady;
  block.ready[block.end_ready++ & (block.ready.size() - 1)] = static_cast<uint16_t>(thread);
}

void yield(bool first, Site site) {
  now.block->moved |= first;
  now.block->waiting.push_back(static_cast<uint16_t>(current_thread()));
  park(State::kWaiting, site);
}

int barrier(bool condition, Site site) {
  Block& block = *now.block;
  if (block.arrived == 0) {
    block.barrier = site;
    block.first_at_barrier = static_cast<uint16_t>(current_thread());
    block.votes = 0;
  } else if (!(site == block.barrier)) {
    fault("barrier divergence: thread " + std::to_string(block.first_at_barrier) +
          " waits at another barrier, " + place_of(block.barrier));
  }
  block.votes += condition;
  if (++block.arrived < block.threads) {
    park(State::kBarrier, site);
    return block.verdict;
  }
  block.arrived = 0;
  block.verdict = block.votes;
  ++block.epoch;
  for (int t = 0; t < block.threads; ++t) {
    if (t != current_thread()) wake(block, t);
  }
  return block.verdict;
}

void cluster_barrier(Site site) {
  Cluster& cluster = *now.block->cluster;
  if (cluster.arrived == 0) {
    cluster.barrier = site;
  } else if (!(site == cluster.barrier)) {
    fault("barrier divergence: others wait at another barrier of the cluster, " +
          place_of(cluster.barrier));
  }
  if (++cluster.arrived < now.grid.cluster * now.grid.threads) return park(State::kCluster, site);
  cluster.arrived = 0;
  for (Block* block : cluster.blocks) {
    ++block->epoch;
    ++block->era;
    for (int t = 0; t < block->threads; ++t) {
      if (block->fibers[static_cast<size_t>(t)].state == State::kCluster) wake(*block, t);
    }
  }
}

void set_schedule(int order, int window) {
  fixed_order = order;
  fixed_window = window;
}

void play(int64_t multiprocessors) {
  played = multiprocessors;
  noted.clear();
}

const char* launches_noted() { return noted.c_str(); }

bool note(const Grid& grid) {
  if (played == 0) return false;
  const int64_t blocks = grid.blocks[0] * grid.blocks[1] * grid.blocks[2];
  noted += std::string(grid.kernel) + '\t' + std::to_string(blocks);
  for (const int64_t value : {int64_t{grid.threads}, int64_t{grid.cluster}, grid.shared})
    noted += '\t' + std::to_string(value);
  noted += '\n';
  return true;
}

// Few where kernels run: a persistent grid comes round often.
int64_t multiprocessors() { return played > 0 ? played : 3; }

void run(const Grid& grid) {
  if (note(grid)) return;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  constexpr int kWindows[] = {0, 1, 2};
  const unsigned turn_of = launches++;
  now.grid = grid;
  now.multiplies_in_groups = false;
  now.schedule = fixed_order >= 0
                     ? Schedule{static_cast<Order>(fixed_order), fixed_window}
                     : Schedule{static_cast<Order>(turn_of % 3), kWindows[turn_of / 3 % 3]};
  now.slots = reinterpret_cast<uintptr_t>(slots());
  now.stacks = reinterpret_cast<uintptr_t>(stacks());
  now.object = start_of_object();
  catch_signals();
  std::mt19937 random(turn_of);
  Run(random).whole();
  now.block = nullptr;
  now.fiber = nullptr;
}

}  // namespace tk::cuda::host
