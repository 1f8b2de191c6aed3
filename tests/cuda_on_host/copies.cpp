// Copies beside the threads: what was asked for moves when somebody waits for it, not before, and
// until then nobody may touch where it goes.
#include <algorithm>
#include <cstring>

#include "cuda/launch.cuh"

namespace tk::cuda::host {
namespace {

void check_bulk(const void* shared, const void* global, size_t bytes) {
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (bytes == 0 || bytes % 16 != 0 || places % 16 != 0)
    fault("misaligned access: a bulk copy of " + std::to_string(bytes) +
          " bytes; sizes and addresses are multiples of 16");
}

void move(const Copy& copy) {
  if (copy.take)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
}

int64_t place_in_arena(const void* address) {
  return static_cast<const char*>(address) - now.block->arena;
}

GateState& gate_at(void* gate, const char* what, const void* code) {
  touch(gate, sizeof(Gate), Use::kAtomic, true, code);
  const auto found = now.block->gates.find(place_in_arena(gate));
  if (found == now.block->gates.end()) fault(std::string(what) + " at a gate without init_gate");
  return found->second;
}

// Every thread's knowledge of every other, in place of that within warps.
void widen_clocks(Block& block) {
  if (block.width == block.threads) return;
  std::vector<uint32_t> wide(static_cast<size_t>(block.threads) * block.threads);
  for (int t = 0; t < block.threads; ++t) {
    std::copy(block.knows(t), block.knows(t) + 32,
              wide.data() + static_cast<ptrdiff_t>(t) * block.threads + t / 32 * 32);
  }
  block.clocks.swap(wide);
  block.width = block.threads;
}

void join(uint32_t* to, const uint32_t* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = std::max(to[i], from[i]);
}

// Opens the gate if all have come: the copies land now.
bool settle_gate(GateState& gate) {
  if (gate.missing > 0) return false;
  for (const Copy& copy : gate.copies) {
    move(copy);
    mark_shared(copy.to, copy.bytes, Cell::kCopied, copy.access);
  }
  gate.copies.clear();
  gate.missing = gate.arrivals;
  gate.phase ^= 1;
  return true;
}

void come(GateState& gate) {
  if (gate.missing == 0) settle_gate(gate);  // nobody waited for the phase before
  Block& block = *now.block;
  const int thread = current_thread();
  join(gate.clock.data(), block.knows(thread), gate.clock.size());
  ++block.clock(thread, thread);
  --gate.missing;
}

}  // namespace

void fence_bulk() {
  const int thread = current_thread();
  now.fiber->fenced = ++now.block->clock(thread, thread);
}

void begin_copy(void* to, const void* from, size_t bytes, bool take) {
  if (take) touch(from, bytes, Use::kRead, true, TK_CALLER);
  touch(to, bytes, Use::kWrite, true, TK_CALLER);
  const Cell::Access access = access_now(TK_CALLER);
  mark_shared(to, bytes, Cell::kComing, access);
  now.fiber->copies.push_back({to, from, bytes, take, false, 0, access});
}

void begin_store(void* to, const void* from, size_t bytes) {
  check_bulk(from, to, bytes);
  touch(from, bytes, Use::kRead, false, TK_CALLER);
  touch(to, bytes, Use::kWrite, false, TK_CALLER);
  check_fenced("store_bulk", place_in_arena(from), bytes);
  now.fiber->stores.push_back({to, from, bytes, true, false, 0, access_now(TK_CALLER)});
}

void commit(bool stores) {
  Fiber& fiber = *now.fiber;
  int& groups = stores ? fiber.store_groups : fiber.copy_groups;
  ++groups;
  for (Copy& copy : stores ? fiber.stores : fiber.copies) {
    if (copy.committed) continue;
    copy.committed = true;
    copy.group = groups;
  }
}

// Waits until at most `left` of the last groups are under way.
void finish(bool stores, int left) {
  Fiber& fiber = *now.fiber;
  std::vector<Copy>& copies = stores ? fiber.stores : fiber.copies;
  const int last = (stores ? fiber.store_groups : fiber.copy_groups) - left;
  for (const Copy& copy : copies) {
    if (!copy.committed || copy.group > last) continue;
    move(copy);
    if (!stores) mark_shared(copy.to, copy.bytes, Cell::kPlain, access_now(TK_CALLER));
  }
  std::erase_if(copies, [=](const Copy& c) { return c.committed && c.group <= last; });
}

void check_copies_done() {
  const Block& block = *now.block;
  std::vector<Copy> left = now.fiber->copies;
  left.insert(left.end(), now.fiber->stores.begin(), now.fiber->stores.end());
  if (block.done + 1 == block.threads) {
    for (const auto& [at, gate] : block.gates)
      left.insert(left.end(), gate.copies.begin(), gate.copies.end());
  }
  if (!left.empty())
    fault("a thread ends, and nobody has waited for a copy that was asked for at " +
          place_of(left.front().access.code));
  if (!now.fiber->products.empty())
    fault("a thread ends, and nobody has waited for a product that was asked for at " +
          place_of(now.fiber->products.front().product->site));
}

void init_gate(void* gate, int arrivals) {
  Block& block = *now.block;
  widen_clocks(block);
  touch(gate, sizeof(Gate), Use::kWrite, true, TK_CALLER);
  block.gates[place_in_arena(gate)] = {
      arrivals, arrivals, 0, {}, std::vector<uint32_t>(static_cast<size_t>(block.threads))};
}

void arrive(void* gate) { come(gate_at(gate, "arrive", TK_CALLER)); }

void copy_at_gate(void* gate, void* to, const void* from, size_t bytes) {
  check_bulk(to, from, bytes);
  touch(from, bytes, Use::kRead, false, TK_CALLER);
  touch(to, bytes, Use::kWrite, false, TK_CALLER);
  GateState& state = gate_at(gate, "copy_bulk", TK_CALLER);
  if (state.missing == 0) settle_gate(state);
  const Cell::Access access = access_now(TK_CALLER);
  mark_shared(to, bytes, Cell::kComing, access);
  state.copies.push_back({to, from, bytes, true, true, 0, access});
  come(state);
}

void wait_gate(void* gate, uint32_t phase, Site site) {
  GateState& state = gate_at(gate, "wait_gate", TK_CALLER);
  bool first = true;
  while (state.phase == (phase & 1) && !settle_gate(state)) {
    yield(first, site);
    first = false;
  }
  Block& block = *now.block;
  join(block.knows(current_thread()), state.clock.data(), state.clock.size());
}

void* shared_of(void* mine, int rank) {
  const int64_t at = place_in_arena(mine);
  if (rank < 0 || rank >= now.grid.cluster)
    fault("shared_of: block " + std::to_string(rank) + " of a cluster of " +
          std::to_string(now.grid.cluster));
  return now.block->cluster->blocks[static_cast<size_t>(rank)]->arena + at;
}

}  // namespace tk::cuda::host
