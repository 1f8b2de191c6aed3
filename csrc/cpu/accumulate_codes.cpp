// accumulate_codes on the CPU: every task owns some codes and walks all rows in ascending order, so
// each sum is taken in the same order whatever the number of threads; nothing is sorted and nothing
// is shared.
#include "cpu/token_rows.h"

namespace tk::TK_ISA {
namespace {

// What one task owns: codes [first, last) of a group.
struct Part {
  int64_t group, first, last;
};

TK_INLINE int64_t ranges_of(const AccumulateCodes& p, int threads) {
  return smaller(ceil_div(threads, p.groups), p.codes);
}

TK_INLINE Part part_of(const AccumulateCodes& p, int64_t ranges, int64_t number) {
  const int64_t range = number % ranges;
  return {number / ranges, p.codes * range / ranges, p.codes * (range + 1) / ranges};
}

template <class T>
TK_INLINE void add_row(const T* from, int64_t stride, int64_t count, float* to) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) to[i] += to_float(from[i * stride]);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(to + i) + load(from + i));
  const int rest = static_cast<int>(count - i);
  if (rest > 0) store(to + i, load(to + i, rest) + load(from + i, rest), rest);
}

// Rows lie far apart for the processor to see the next one coming, the sums of its code farther.
constexpr int64_t kAhead = 8, kFarApart = 64, kBytesPerWork = 32;

TK_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(from) + at);
}

template <class T>
void add_part(const AccumulateCodes& p, const Part& part) {
  float* sums = p.sums + part.group * p.codes * p.dim;
  int64_t* counts = p.counts + part.group * p.codes;
  const auto codes = static_cast<size_t>(part.last - part.first);
  std::memset(sums + part.first * p.dim, 0, sizeof(float) * codes * static_cast<size_t>(p.dim));
  std::memset(counts + part.first, 0, sizeof(int64_t) * codes);
  const auto owned = [&](int64_t row) {
    const int64_t code = p.index[row * p.groups + part.group];
    return code >= part.first && code < part.last ? code : -1;
  };
  const auto from = [&](int64_t row) {
    return static_cast<const T*>(p.x.data) + offset_of(p.x, row, part.group);
  };
  for (int64_t row = 0; row < p.x.rows; ++row) {
    const int64_t next = p.dim >= kFarApart && row + kAhead < p.x.rows ? owned(row + kAhead) : -1;
    if (next >= 0) {
      prefetch(from(row + kAhead), p.dim * static_cast<int64_t>(sizeof(T)));
      prefetch(sums + next * p.dim, p.dim * static_cast<int64_t>(sizeof(float)));
    }
    const int64_t code = owned(row);
    if (code < 0) continue;
    ++counts[code];
    add_row(from(row), p.x.stride, p.dim, sums + code * p.dim);
  }
}

bool all_valid(const AccumulateCodes& p) {
  int64_t bad = 0;
  for (int64_t i = 0; i < p.x.rows * p.groups; ++i)
    bad |= (p.index[i] < -1) | (p.index[i] >= p.codes);
  return bad == 0;
}

}  // namespace

Status accumulate_codes(const AccumulateCodes& p, const Pool& pool) {
  if (!all_valid(p)) return Status::kBadValue;
  if (p.groups == 0) return Status::kOk;
  const int64_t ranges = ranges_of(p, pool.threads);
  // What fits the caches is added up sooner by one thread than another one wakes.
  const int64_t bytes = (p.x.rows + p.codes) * p.dim * static_cast<int64_t>(sizeof(float)) / ranges;
  const int64_t cost = bytes / kBytesPerWork;
  parallel_for(pool, p.groups * ranges, grain_of(cost), [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const Part part = part_of(p, ranges, number);
      dispatch(p.x.dtype, [&](auto zero) { add_part<decltype(zero)>(p, part); });
    }
  });
  return Status::kOk;
}

int64_t accumulate_codes_scratch(const AccumulateCodes&, int) { return 0; }

}  // namespace tk::TK_ISA
