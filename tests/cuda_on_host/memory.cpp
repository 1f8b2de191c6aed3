// Memory as kernels touch it: the compiler reports every access through the hooks of its thread
// sanitizer; what is not shared is checked by the address sanitizer if it is there.
#include <cstring>

#include "cuda_on_host/shared.h"

extern "C" {
__attribute__((weak)) void* __asan_region_is_poisoned(void* from, size_t bytes);
__attribute__((weak)) void __asan_get_shadow_mapping(size_t* scale, size_t* offset);
}

namespace tk::cuda::host {
namespace {

// The address sanitizer has a byte for every 8 of memory, 0 where all of them may be touched.
uintptr_t shadow_of_memory() {
  if (__asan_get_shadow_mapping == nullptr) return 0;
  size_t scale = 0, offset = 0;
  __asan_get_shadow_mapping(&scale, &offset);
  return scale == 3 ? offset : 0;
}

bool is_poisoned(uintptr_t address, size_t bytes) {
  static const uintptr_t shadow = shadow_of_memory();
  constexpr int kAddressBits = 47;
  if (__asan_region_is_poisoned == nullptr) return address < 65536;
  if (shadow != 0 && bytes <= 16 && address >> kAddressBits == 0) {
    const auto of = [](uintptr_t at) { return *reinterpret_cast<uint8_t*>((at >> 3) + shadow); };
    if ((of(address) | of(address + bytes / 2) | of(address + bytes - 1)) == 0) return false;
  }
  return __asan_region_is_poisoned(reinterpret_cast<void*>(address), bytes) != nullptr;
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
  if (address - now.slots < static_cast<uintptr_t>(kBlocks * kSlot))
    return touch_other_arena(address, bytes, use, code);
  if (address - now.stacks < kFibers * kStack)
    fault(std::string(verb(use)) + " of a local variable of another thread");
  if (is_poisoned(address, bytes))
    fault("out of bounds of global memory: " + std::string(verb(use)) + " of " +
          std::to_string(bytes) + " bytes");
}

void touch_at(uintptr_t address, size_t bytes, Use use, bool aligned, const void* code) {
  if (now.fiber == nullptr || bytes == 0) return;
  if (address - now.stack < kStack) {
    if (now.multiplies_in_groups) touch_registers(address, bytes, use);
    return;
  }
  if (aligned && (address & (bytes - 1)) != 0)
    fault("misaligned access: " + std::string(verb(use)) + " of " + std::to_string(bytes) +
          " bytes at an address that is " + std::to_string(address % bytes) +
          " more than a multiple");
  if (address - now.arena_slot < static_cast<uintptr_t>(kSlot))
    touch_shared(*now.block, address, bytes, use, code);
  else
    touch_other(address, bytes, use, code);
}

// Of a size that the compiler knows, past the address sanitizer: it has been asked.
void copy_word(void* to, const void* from, size_t bytes) {
  switch (bytes) {
    case 16:
      std::memcpy(to, from, 16);
      return;
    case 8:
      std::memcpy(to, from, 8);
      return;
    case 4:
      std::memcpy(to, from, 4);
      return;
    case 2:
      std::memcpy(to, from, 2);
      return;
    default:
      std::memcpy(to, from, 1);
  }
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

void touch(const volatile void* address, size_t bytes, Use use, bool aligned, const void* code) {
  touch_at(reinterpret_cast<uintptr_t>(address), bytes, use, aligned, code);
}

void read(void* to, const void* from, size_t bytes) {
  touch_at(reinterpret_cast<uintptr_t>(from), bytes, Use::kRead, true, TK_CALLER);
  copy_word(to, from, bytes);
}

void write(void* to, const void* from, size_t bytes) {
  touch_at(reinterpret_cast<uintptr_t>(to), bytes, Use::kWrite, true, TK_CALLER);
  copy_word(to, from, bytes);
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
