// Memory as kernels touch it: the compiler reports every access through the hooks of its thread
// sanitizer; shared memory is checked byte by byte, other memory by the address sanitizer if it is
// there.
#include <sys/mman.h>

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

// Whether everyone knows that `access` is over before the current thread goes on.
bool over(const Block& block, const Cell::Access& access, int thread) {
  return access.thread == thread || access.epoch < block.epoch ||
         (access.thread / 32 == thread / 32 && block.clock(thread, access.thread) >= access.stamp);
}

[[noreturn]] void race(int64_t at, Use use, const Cell::Access& other, const char* did) {
  fault("race on shared memory: " + std::string(verb(use)) + " of byte " + std::to_string(at) +
        " of the arena, which thread " + std::to_string(other.thread) + " " + did + " at " +
        place_of(other.code) + ", no barrier in between");
}

void touch_byte(Block& block, int64_t at, size_t bytes, Use use, const Cell::Access& mine) {
  Cell& cell = block.cells[static_cast<size_t>(at)];
  if (cell.write.kind == Cell::kGap)
    fault("out of bounds of shared memory: " + std::string(verb(use)) + " of " +
          bytes_at(at, bytes) + ", outside its arrays");
  if (cell.write.kind == Cell::kEmpty && use != Use::kWrite)
    fault("uninitialised shared memory: " + std::string(verb(use)) + " of " + bytes_at(at, bytes));
  if (cell.write.kind >= Cell::kPlain && !over(block, cell.write, mine.thread) &&
      !(use == Use::kAtomic && cell.write.kind == Cell::kAtomic))
    race(at, use, cell.write, "wrote");
  if (use == Use::kRead) {
    Cell::Access& first = cell.read[0];
    const bool gone = first.kind == Cell::kGap || over(block, first, mine.thread);
    cell.read[gone ? 0 : 1] = mine;
    return;
  }
  for (Cell::Access& read : cell.read) {
    if (read.kind != Cell::kGap && !over(block, read, mine.thread)) race(at, use, read, "read");
    read.kind = Cell::kGap;
  }
  cell.write = mine;
  cell.write.kind = use == Use::kAtomic ? Cell::kAtomic : Cell::kPlain;
}

void touch_shared(int64_t at, size_t bytes, Use use, const void* code) {
  Block& block = *now.block;
  if (at < 0 || at + static_cast<int64_t>(bytes) > static_cast<int64_t>(block.cells.size()))
    fault("out of bounds of shared memory: " + std::string(verb(use)) + " of " +
          bytes_at(at, bytes) + ", which has " + std::to_string(block.cells.size()));
  const int thread = current_thread();
  const Cell::Access mine{block.epoch, block.clock(thread, thread), code_of(code),
                          static_cast<uint16_t>(thread), Cell::kPlain};
  for (size_t i = 0; i < bytes; ++i)
    touch_byte(block, at + static_cast<int64_t>(i), bytes, use, mine);
}

void touch_other(uintptr_t address, size_t bytes, Use use) {
  const uintptr_t arenas = reinterpret_cast<uintptr_t>(slots());
  if (address - arenas < static_cast<uintptr_t>(kBlocks * kSlot))
    fault("out of bounds of shared memory: " + std::string(verb(use)) +
          " in the arena of another block");
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
    touch_shared(static_cast<int64_t>(address - now.arena_slot) - kMargin, bytes, use, code);
  else
    touch_other(address, bytes, use);
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

#define TK_CALLER __builtin_extract_return_addr(__builtin_return_address(0))

void touch(const volatile void* address, size_t bytes, Use use, bool aligned) {
  touch_at(reinterpret_cast<uintptr_t>(address), bytes, use, aligned, TK_CALLER);
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

// After warp_sync every lane of the mask has seen what the others did before.
void know_each_other(Block& block, int warp, uint32_t mask) {
  uint32_t* clocks = block.clocks.data() + static_cast<ptrdiff_t>(warp) * 32 * 32;
  uint32_t joined[32] = {};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int i = 0; i < 32; ++i) {
      const uint32_t known = clocks[lane * 32 + i];
      joined[i] = known > joined[i] ? known : joined[i];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::memcpy(clocks + lane * 32, joined, sizeof joined);
    ++clocks[lane * 32 + lane];
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
