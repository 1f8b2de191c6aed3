// accumulate_codes on the CPU: every task owns some codes, or some columns of all codes, and walks all rows in ascending order, so
// each sum is taken in the same order whatever the number of threads; nothing is sorted and nothing is shared.
#include "cpu/token_rows.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kSliceWidth = 64;  // columns are cut no finer: four cache lines of a row

// What one task owns: codes [first, last) of a group, columns [left, right).
struct Part {
  int64_t group, first, last, left, right;
};

struct Cut {
  int64_t slices, ranges;  // columns are cut into slices first: then nobody reads a row in vain
};

TK_INLINE Cut cut_of(const AccumulateCodes& p, int threads) {
  const int64_t wanted = ceil_div(threads, p.groups);
  const int64_t slices = smaller(wanted, larger<int64_t>(1, p.dim / kSliceWidth));
  return {slices, smaller(ceil_div(wanted, slices), p.codes)};
}

TK_INLINE Part part_of(const AccumulateCodes& p, const Cut& cut, int64_t number) {
  const int64_t slice = number % cut.slices, range = number / cut.slices % cut.ranges, group = number / cut.slices / cut.ranges;
  const int64_t blocks = ceil_div(p.dim, kLanes);
  return {group, p.codes * range / cut.ranges, p.codes * (range + 1) / cut.ranges,
          smaller(p.dim, blocks * slice / cut.slices * kLanes), smaller(p.dim, blocks * (slice + 1) / cut.slices * kLanes)};
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

template <class T>
void add_part(const AccumulateCodes& p, const Part& part) {
  const int64_t width = part.right - part.left;
  float* sums = p.sums + part.group * p.codes * p.dim + part.left;
  int64_t* counts = p.counts + part.group * p.codes;
  for (int64_t code = part.first; code < part.last; ++code) {
    std::memset(sums + code * p.dim, 0, sizeof(float) * static_cast<size_t>(width));
    if (part.left == 0) counts[code] = 0;
  }
  for (int64_t row = 0; row < p.x.rows; ++row) {
    const int64_t code = p.index[row * p.groups + part.group];
    if (code < part.first || code >= part.last) continue;
    if (part.left == 0) ++counts[code];
    const T* from = static_cast<const T*>(p.x.data) + offset_of(p.x, row, part.group) + part.left * p.x.stride;
    add_row(from, p.x.stride, width, sums + code * p.dim);
  }
}

bool all_valid(const AccumulateCodes& p) {
  int64_t bad = 0;
  for (int64_t i = 0; i < p.x.rows * p.groups; ++i) bad |= (p.index[i] < -1) | (p.index[i] >= p.codes);
  return bad == 0;
}

}  // namespace

Status accumulate_codes(const AccumulateCodes& p, const Pool& pool) {
  if (!all_valid(p)) return Status::kBadValue;
  const Cut cut = cut_of(p, pool.threads);
  const int64_t parts = p.groups * cut.ranges * cut.slices;
  const int64_t cost = (p.x.rows * 4 + (p.x.rows + p.codes) * p.dim / kLanes) / larger<int64_t>(1, cut.ranges * cut.slices);
  parallel_for(pool, parts, grain_of(cost), [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const Part part = part_of(p, cut, number);
      dispatch(p.x.dtype, [&](auto zero) { add_part<decltype(zero)>(p, part); });
    }
  });
  return Status::kOk;
}

int64_t accumulate_codes_scratch(const AccumulateCodes&, int) { return 0; }

}  // namespace tk::TK_ISA
