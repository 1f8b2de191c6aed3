// Memory as kernels touch it: the compiler reports every access through the hooks of its thread
// sanitizer; shared memory is checked byte by byte, other memory by the address sanitizer if it is
// there.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/launch.cuh"

extern "C" __attribute__((weak)) void* __asan_region_is_poisoned(void* from, size_t bytes);

namespace tk::cuda::host {
namespace {

char* slots() {
  static char* const memory =
      static_cast<char*>(mmap(nullptr, kBlocks * kSlot, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory != MAP_FAILED) return memory;
  std::fputs("cuda_on_host: no memory for the arenas\n", stderr);
  std::abort();
}

const char* verb(Use use) {
  return use == Use::kRead ? "read" : use == Use::kWrite ? "write" : "atomic";
}

std::string bytes_at(int64_t at, size_t bytes) {
  return std::to_string(bytes) + " bytes at byte " + std::to_string(at) + " of the arena";
}

// Whether `access` is known to be over by the current thread: it is its own, a barrier was in
// between, or somebody told it.
bool over(const Cell::Access& access) {
  Block& block = *now.block;
  const int me = current_thread(), thread = access.thread & 1023;
  if (access.thread >> 10 != block.rank) return access.era != block.era;
  if (thread == me || access.epoch < block.epoch) return true;
  const bool may_know = block.width > 32 || thread / 32 == me / 32;
  return may_know && block.clock(me, thread) >= access.stamp;
}

std::string thread_of(const Cell::Access& access) {
  const int rank = access.thread >> 10;
  return "thread " + std::to_string(access.thread & 1023) +
         (rank != now.block->rank ? " of block " + std::to_string(rank) + " of the cluster" : "");
}

[[noreturn]] void race(int64_t at, Use use, const Cell::Access& other, const char* did) {
  fault("race on shared memory: " + std::string(verb(use)) + " of byte " + std::to_string(at) +
        " of the arena, which " + thread_of(other) + " " + did + " at " + place_of(other.code) +
        ", no barrier in between");
}

void touch_byte(Cell& cell, int64_t at, size_t bytes, Use use, const Cell::Access& mine) {
  const Cell::Access& write = cell.write;
  if (write.kind == Cell::kGap)
    fault("out of bounds of shared memory: " + std::string(verb(use)) + " of " +
          bytes_at(at, bytes) + ", outside its arrays");
  if (write.kind == Cell::kEmpty && use != Use::kWrite)
    fault("uninitialised shared memory: " + std::string(verb(use)) + " of " + bytes_at(at, bytes));
  if (write.kind == Cell::kComing)
    fault("race on shared memory: " + std::string(verb(use)) + " of " + bytes_at(at, bytes) +
          ", where a copy is under way that nobody has waited for, asked for at " +
          place_of(write.code));
  if (write.kind >= Cell::kPlain && !over(write) &&
      !(use == Use::kAtomic && write.kind == Cell::kAtomic))
    race(at, use, write, "wrote");
  if (use == Use::kRead) {
    const bool gone = cell.read[0].kind == Cell::kGap || over(cell.read[0]);
    cell.read[gone ? 0 : 1] = mine;
    return;
  }
  for (Cell::Access& read : cell.read) {
    if (read.kind != Cell::kGap && !over(read)) race(at, use, read, "read");
    read.kind = Cell::kGap;
  }
  cell.write = mine;
  cell.write.kind = use == Use::kAtomic ? Cell::kAtomic : Cell::kPlain;
}

void touch_shared(Block& block, uintptr_t address, size_t bytes, Use use, const void* code) {
  const int64_t at = reinterpret_cast<const char*>(address) - block.arena;
  if (at < 0 || at + static_cast<int64_t>(bytes) > static_cast<int64_t>(block.cells.size()))
    fault("out of bounds of shared memory: " + std::string(verb(use)) + " of " +
          bytes_at(at, bytes) + ", which has " + std::to_string(block.cells.size()));
  const Cell::Access mine = access_now(code);
  for (size_t i = 0; i < bytes; ++i)
    touch_byte(block.cells[static_cast<size_t>(at) + i], at + static_cast<int64_t>(i), bytes, use,
               mine);
}

// The arena of another block: allowed within a cluster, while that block is there.
void touch_other_arena(uintptr_t address, size_t bytes, Use use, const void* code) {
  for (Block* block : now.block->cluster->blocks) {
    const uintptr_t slot = reinterpret_cast<uintptr_t>(block->arena) - kMargin;
    if (address - slot >= static_cast<uintptr_t>(kSlot)) continue;
    if (block->cluster != now.block->cluster || block->done == block->threads)
      fault(std::string(verb(use)) + " of the shared memory of a block that has ended");
    return touch_shared(*block, address, bytes, use, code);
  }
  fault("out of bounds of shared memory: " + std::string(verb(use)) +
        " in the arena of another block");
}

void touch_other(uintptr_t address, size_t bytes, Use use, const void* code) {
  if (address - reinterpret_cast<uintptr_t>(slots()) < static_cast<uintptr_t>(kBlocks * kSlot))
    return touch_other_arena(address, bytes, use, code);
  if (address - reinterpret_cast<uintptr_t>(stacks()) < kFibers * kStack)
    fault(std::string(verb(use)) + " of a local variable of another thread");
  const bool bad =
      __asan_region_is_poisoned != nullptr
          ? __asan_region_is_poisoned(reinterpret_cast<void*>(address), bytes) != nullptr
          : address < 65536;
  if (bad)
    fault("out of bounds of global memory: " + std::string(verb(use)) + " of " +
          std::to_string(bytes) + " bytes");
}

void touch_at(uintptr_t address, size_t bytes, Use use, bool aligned, const void* code) {
  if (now.fiber == nullptr || address - now.stack < kStack || bytes == 0) return;
  if (aligned && address % bytes != 0)
    fault("misaligned access: " + std::string(verb(use)) + " of " + std::to_string(bytes) +
          " bytes at an address that is " + std::to_string(address % bytes) +
          " more than a multiple");
  if (address - now.arena_slot < static_cast<uintptr_t>(kSlot))
    touch_shared(*now.block, address, bytes, use, code);
  else
    touch_other(address, bytes, use, code);
}

template <class T>
T changed(Change change, T old, T value, T expected) {
  switch (change) {
    case Change::kAdd:
      return static_cast<T>(old + value);
    case Change::kMin:
      return value < old ? value : old;
    case Change::kMax:
      return value > old ? value : old;
    case Change::kOr:
      return static_cast<T>(old | value);
    case Change::kStore:
      return value;
    case Change::kCompare:
      return old == expected ? value : old;
    case Change::kLoad:
      break;
  }
  return old;
}

template <class T, class Unsigned>
uint64_t change_as(void* place, Change change, uint64_t value, uint64_t expected) {
  T old;
  std::memcpy(&old, place, sizeof old);
  const T now_there =
      static_cast<T>(changed<T>(change, old, static_cast<T>(value), static_cast<T>(expected)));
  std::memcpy(place, &now_there, sizeof now_there);
  return static_cast<Unsigned>(old);
}

}  // namespace

Cell::Access access_now(const void* code) {
  Block& block = *now.block;
  const int thread = current_thread();
  return {block.epoch & 0x1fffffff,
          Cell::kPlain,
          block.clock(thread, thread),
          code_of(code),
          static_cast<uint16_t>(thread | block.rank << 10),
          static_cast<uint16_t>(block.era)};
}

void mark_shared(void* address, size_t bytes, Cell::Kind kind, const Cell::Access& access) {
  Block& block = *now.block;
  const int64_t at = static_cast<const char*>(address) - block.arena;
  for (size_t i = 0; i < bytes; ++i) {
    Cell::Access& write = block.cells[static_cast<size_t>(at) + i].write;
    write = access;
    write.kind = kind;
  }
}

void touch(const volatile void* address, size_t bytes, Use use, bool aligned, const void* code) {
  touch_at(reinterpret_cast<uintptr_t>(address), bytes, use, aligned, code);
}

void read(void* to, const void* from, size_t bytes) {
  touch_at(reinterpret_cast<uintptr_t>(from), bytes, Use::kRead, true, TK_CALLER);
  std::memcpy(to, from, bytes);
}

void write(void* to, const void* from, size_t bytes) {
  touch_at(reinterpret_cast<uintptr_t>(to), bytes, Use::kWrite, true, TK_CALLER);
  std::memcpy(to, from, bytes);
}

uint64_t atomic(void* place, size_t bytes, bool negative, Change change, uint64_t value,
                uint64_t expected) {
  touch_at(reinterpret_cast<uintptr_t>(place), bytes, Use::kAtomic, true, TK_CALLER);
  if (bytes == 4)
    return negative ? change_as<int32_t, uint32_t>(place, change, value, expected)
                    : change_as<uint32_t, uint32_t>(place, change, value, expected);
  return negative ? change_as<int64_t, uint64_t>(place, change, value, expected)
                  : change_as<uint64_t, uint64_t>(place, change, value, expected);
}

// Fresh memory holds what no kernel expects.
void open_arena(Block& block, int64_t bytes) {
  block.arena = slots() + kSlot * block.slot + kMargin;
  std::memset(block.arena, 0xff, static_cast<size_t>(bytes));
  block.cells.assign(static_cast<size_t>(bytes), Cell{});
}

void* take_shared(int64_t at, int64_t bytes) {
  Block& block = *now.block;
  if (at + bytes > static_cast<int64_t>(block.cells.size()))
    fault("shared memory: " + std::to_string(at + bytes) + " bytes wanted, the launch gave " +
          std::to_string(block.cells.size()));
  for (int64_t i = at; i < at + bytes; ++i) {
    Cell& cell = block.cells[static_cast<size_t>(i)];
    if (cell.write.kind == Cell::kGap) cell.write.kind = Cell::kEmpty;
  }
  return block.arena + at;
}

// After warp_sync every lane of the mask knows what the others knew.
void know_each_other(Block& block, int warp, uint32_t mask) {
  static std::vector<uint32_t> joined;
  const auto width = static_cast<size_t>(block.width);
  joined.assign(width, 0);
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const uint32_t* known = block.knows(warp * 32 + std::countr_zero(left));
    for (size_t i = 0; i < width; ++i) joined[i] = std::max(joined[i], known[i]);
  }
  for (uint32_t left = mask; left != 0; left &= left - 1) {
    const int thread = warp * 32 + std::countr_zero(left);
    std::copy(joined.begin(), joined.end(), block.knows(thread));
    ++block.clock(thread, thread);
  }
}

}  // namespace tk::cuda::host

// The hooks. "Unaligned" ones are accesses that the compiler knows to be less aligned than long,
// which nvcc splits.
using tk::cuda::host::touch_at;
using tk::cuda::host::Use;

#define TK_HOOKS(bytes)                                                             \
  void __tsan_read##bytes(void* a) {                                                \
    touch_at(reinterpret_cast<uintptr_t>(a), bytes, Use::kRead, true, TK_CALLER);   \
  }                                                                                 \
  void __tsan_write##bytes(void* a) {                                               \
    touch_at(reinterpret_cast<uintptr_t>(a), bytes, Use::kWrite, true, TK_CALLER);  \
  }                                                                                 \
  void __tsan_unaligned_read##bytes(void* a) {                                      \
    touch_at(reinterpret_cast<uintptr_t>(a), bytes, Use::kRead, false, TK_CALLER);  \
  }                                                                                 \
  void __tsan_unaligned_write##bytes(void* a) {                                     \
    touch_at(reinterpret_cast<uintptr_t>(a), bytes, Use::kWrite, false, TK_CALLER); \
  }

extern "C" {
void __tsan_init() {}
TK_HOOKS(1)
TK_HOOKS(2)
TK_HOOKS(4)
TK_HOOKS(8)
TK_HOOKS(16)
void __tsan_read_range(void* a, size_t bytes) {
  touch_at(reinterpret_cast<uintptr_t>(a), bytes, Use::kRead, false, TK_CALLER);
}
void __tsan_write_range(void* a, size_t bytes) {
  touch_at(reinterpret_cast<uintptr_t>(a), bytes, Use::kWrite, false, TK_CALLER);
}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void**, void*) {}
}
