// Shared memory, word by word: who touched it, and whether whoever touches it now may.
#include "cuda_on_host/shared.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tk::cuda::host {
namespace {

std::string bytes_at(int64_t at, size_t bytes) {
  return std::to_string(bytes) + " bytes at byte " + std::to_string(at) + " of the arena";
}

// An access that is under way.
struct Mine {
  Block& block;  // of the thread
  Cell::Access access;
  int64_t at;
  size_t bytes;
  Use use;
};

// Whether `access` is known to be over by the thread: it is its own, a barrier was in between, or
// somebody told it.
TK_INLINE bool over(const Cell::Access& access, const Mine& mine) {
  const unsigned different = access.thread ^ mine.access.thread;
  if (different >> 10 != 0) return access.era != mine.access.era;
  if (different == 0 || access.epoch < mine.access.epoch) return true;
  const int me = now.thread, thread = access.thread & 1023;
  const bool may_know = mine.block.width > 32 || thread / 32 == me / 32;
  return may_know && mine.block.clock(me, thread) >= access.stamp;
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

// What nobody has written yet, or a copy is about to write.
[[gnu::noinline]] void touch_unwritten(const Cell::Access& write, const Mine& mine) {
  const std::string what = std::string(verb(mine.use)) + " of " + bytes_at(mine.at, mine.bytes);
  if (write.kind == Cell::kGap)
    fault("out of bounds of shared memory: " + what + ", outside its arrays");
  if (write.kind == Cell::kEmpty && mine.use != Use::kWrite)
    fault("uninitialised shared memory: " + what);
  if (write.kind == Cell::kComing)
    fault("race on shared memory: " + what +
          ", where a copy is under way that nobody has waited for, asked for at " +
          place_of(write.code));
}

// What was last written can be read or written over.
template <Use use>
TK_INLINE void check_write(const Cell::Access& write, int64_t at, const Mine& mine) {
  if (write.kind < Cell::kPlain) {
    touch_unwritten(write, mine);
  } else if (!over(write, mine) && !(use == Use::kAtomic && write.kind == Cell::kAtomic)) {
    race(at, use, write, "wrote");
  }
}

template <Use use>
TK_INLINE void touch_cell(Cell& cell, int64_t at, const Mine& mine) {
  check_write<use>(cell.write, at, mine);
  if constexpr (use == Use::kRead) {
    const bool gone = cell.read[0].kind == Cell::kGap || over(cell.read[0], mine);
    cell.read[gone ? 0 : 1] = mine.access;
    return;
  }
  for (Cell::Access& read : cell.read) {
    if (read.kind != Cell::kGap && !over(read, mine)) race(at, use, read, "read");
    read.kind = Cell::kGap;
  }
  cell.write = mine.access;
  cell.write.kind = use == Use::kAtomic ? Cell::kAtomic : Cell::kPlain;
}

std::array<Cell, kWord>& split(Block& block, Cell& word) {
  if (word.write.kind == Cell::kParts) return block.parts[word.write.stamp];
  if (block.free_parts.empty()) {
    block.free_parts.push_back(static_cast<uint32_t>(block.parts.size()));
    block.parts.emplace_back();
  }
  const uint32_t number = block.free_parts.back();
  block.free_parts.pop_back();
  block.parts[number].fill(word);
  word.write.kind = Cell::kParts;
  word.write.stamp = number;
  return block.parts[number];
}

// Makes one of the four cells of a word where nothing is lost: accesses alike, or before the last
// barrier. Of such writes one without fence_bulk stands for all, if there is one.
void join(Block& block, Cell& word) {
  const uint32_t number = word.write.stamp;
  const std::array<Cell, kWord>& parts = block.parts[number];
  const auto is_old = [&](const Cell::Access& access) {
    return access.kind >= Cell::kPlain && access.epoch < block.epoch &&
           access.thread >> 10 == block.rank;
  };
  const auto fenced = [&](const Cell::Access& access) {
    return access.stamp < block.fibers[access.thread & 1023u].fenced;
  };
  Cell joined = parts[0];
  for (const Cell& part : parts) {
    if (part.write != joined.write) {
      if (!is_old(part.write) || !is_old(joined.write)) return;
      if (part.write.kind != Cell::kCopied && !fenced(part.write)) joined.write = part.write;
    }
    for (int i = 0; i < 2; ++i) {
      if (part.read[i] == joined.read[i]) continue;
      const auto gone = [&](const Cell::Access& read) {
        return read.kind == Cell::kGap || is_old(read);
      };
      if (!gone(part.read[i]) || !gone(joined.read[i])) return;
      joined.read[i] = {};
    }
  }
  word = joined;
  block.free_parts.push_back(number);
}

// Calls body(cell, at) for the cells of bytes `at` … `at` + `bytes` − 1.
template <class Body>
TK_INLINE void each_cell(Block& block, int64_t at, size_t bytes, const Body& body) {
  const int64_t end = at + static_cast<int64_t>(bytes);
  while (at < end) {
    Cell& word = block.cells[static_cast<size_t>(at / kWord)];
    const int64_t last = std::min(end, (at / kWord + 1) * kWord);
    const bool whole = at % kWord == 0 && last - at == kWord;
    if (whole && word.write.kind != Cell::kParts) {
      body(word, at);
      at = last;
      continue;
    }
    std::array<Cell, kWord>& parts = split(block, word);
    for (; at < last; ++at) body(parts[static_cast<size_t>(at % kWord)], at);
    if (whole) join(block, word);
  }
}

int64_t place_in(const Block& block, const void* address) {
  return static_cast<const char*>(address) - block.arena;
}

TK_INLINE void check_bounds(const Block& block, int64_t at, size_t bytes, Use use) {
  if (at < 0 || at + static_cast<int64_t>(bytes) > block.arena_bytes())
    fault("out of bounds of shared memory: " + std::string(verb(use)) + " of " +
          bytes_at(at, bytes) + ", which has " + std::to_string(block.arena_bytes()));
}

}  // namespace

char* slots() {
  static char* const memory =
      static_cast<char*>(mmap(nullptr, kBlocks * kSlot, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory != MAP_FAILED) return memory;
  std::fputs("cuda_on_host: no memory for the arenas\n", stderr);
  std::abort();
}

void touch_shared(Block& block, uintptr_t address, size_t bytes, Use use, const void* code) {
  const int64_t at = place_in(block, reinterpret_cast<const char*>(address));
  check_bounds(block, at, bytes, use);
  if (use != Use::kRead && !block.read_by_groups.empty())
    check_not_read_by_groups(block, at, bytes);
  const Mine mine{*now.block, access_now(code), at, bytes, use};
  const auto touch_as = [&]<Use kUse>() {
    each_cell(block, at, bytes,
              [&](Cell& cell, int64_t place) { touch_cell<kUse>(cell, place, mine); });
  };
  switch (use) {
    case Use::kRead:
      return touch_as.operator()<Use::kRead>();
    case Use::kWrite:
      return touch_as.operator()<Use::kWrite>();
    case Use::kAtomic:
      return touch_as.operator()<Use::kAtomic>();
  }
}

void mark_shared(void* address, size_t bytes, Cell::Kind kind, const Cell::Access& access) {
  Block& block = *now.block;
  each_cell(block, place_in(block, address), bytes, [&](Cell& cell, int64_t) {
    cell.write = access;
    cell.write.kind = kind;
  });
}

bool is_over(const Cell::Access& access) {
  return over(access, {*now.block, access_now(nullptr), 0, 0, Use::kWrite});
}

void look(int64_t at, size_t bytes) {
  Block& block = *now.block;
  check_bounds(block, at, bytes, Use::kRead);
  const Mine mine{block, access_now(nullptr), at, bytes, Use::kRead};
  each_cell(block, at, bytes, [&](const Cell& cell, int64_t place) {
    check_write<Use::kRead>(cell.write, place, mine);
  });
}

void check_fenced(const char* what, int64_t at, size_t bytes) {
  Block& block = *now.block;
  each_cell(block, at, bytes, [&](const Cell& cell, int64_t) {
    const Cell::Access& write = cell.write;
    const int thread = write.thread & 1023;
    const bool fenced = write.stamp < block.fibers[static_cast<size_t>(thread)].fenced;
    if (write.kind != Cell::kCopied && !fenced)
      fault(std::string(what) + " of what thread " + std::to_string(thread) + " wrote at " +
            place_of(write.code) + ", no fence_bulk of that thread in between");
  });
}

// Fresh memory holds what no kernel expects.
void open_arena(Block& block, int64_t bytes) {
  block.arena = slots() + kSlot * block.slot + kMargin;
  std::memset(block.arena, 0xff, static_cast<size_t>(bytes));
  block.cells.assign(static_cast<size_t>((bytes + kWord - 1) / kWord), Cell{});
  block.parts.clear();
  block.free_parts.clear();
  block.arrays.clear();
}

void* take_shared(int64_t at, int64_t bytes) {
  Block& block = *now.block;
  if (at + bytes > block.arena_bytes())
    fault("shared memory: " + std::to_string(at + bytes) + " bytes wanted, the launch gave " +
          std::to_string(block.arena_bytes()));
  const std::pair<int64_t, int64_t> array{at, bytes};
  if (std::find(block.arrays.begin(), block.arrays.end(), array) == block.arrays.end()) {
    block.arrays.push_back(array);
    each_cell(block, at, static_cast<size_t>(bytes), [](Cell& cell, int64_t) {
      if (cell.write.kind == Cell::kGap) cell.write.kind = Cell::kEmpty;
    });
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
