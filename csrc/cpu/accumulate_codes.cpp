// accumulate_codes on the CPU: rows are sorted by code, each code's in ascending order, then every
// code adds up its own in registers: the same order whatever the number of threads.
#include "cpu/token_rows.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kChunkRows = 1 << 16;  // are sorted at a time: bounds the scratch
constexpr int32_t kAhead = 4;            // rows lie where no processor sees them coming
constexpr int64_t kBytesPerWork = 8;     // less is added up sooner than another thread wakes
constexpr int kBlock = 4;                // vectors of sums in registers

// The rows of one chunk that one group uses: those of code k end at ends[k], and begin where those
// of code k − 1 end.
struct Sorted {
  int32_t* ends;  // (K)
  int32_t* rows;  // (kChunkRows), counted from the chunk's first
};

struct Chunk {
  int64_t first, count;  // rows
};

TK_INLINE int64_t sorted_ints(const AccumulateCodes& p) {
  return p.codes + smaller(kChunkRows, p.x.rows);
}

TK_INLINE Sorted sorted_at(const AccumulateCodes& p, int64_t group) {
  int32_t* ends = static_cast<int32_t*>(p.scratch) + group * sorted_ints(p);
  return {ends, ends + p.codes};
}

void sort_rows(const AccumulateCodes& p, int64_t group, const Chunk& chunk) {
  const Sorted sorted = sorted_at(p, group);
  const int64_t* index = p.index + chunk.first * p.groups + group;
  std::memset(sorted.ends, 0, sizeof(int32_t) * static_cast<size_t>(p.codes));
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t code = index[i * p.groups];
    if (code >= 0) ++sorted.ends[code];
  }
  int32_t begin = 0;
  for (int64_t code = 0; code < p.codes; ++code) {
    const int32_t count = sorted.ends[code];
    sorted.ends[code] = begin;
    begin += count;
  }
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t code = index[i * p.groups];
    if (code >= 0) sorted.rows[sorted.ends[code]++] = static_cast<int32_t>(i);
  }
}

template <class T>
TK_INLINE Floats load_some(const T* from, int64_t stride, int count) {
  if (stride == 1) return load(from, count);
  Floats value{};
  for (int i = 0; i < count; ++i) value[i] = to_float(from[i * stride]);
  return value;
}

// Rows [begin, end) of a chunk's sorted ones, added to one code's sums.
template <class T, class Row>
TK_INLINE void add_rows(const Row& row, int32_t begin, int32_t end, int32_t last, int64_t stride,
                        int64_t dim, float* sums) {
  int64_t d = 0;
  for (; stride == 1 && d + kBlock * kLanes <= dim; d += kBlock * kLanes) {
    Floats totals[kBlock];
    for (int v = 0; v < kBlock; ++v) totals[v] = load(sums + d + v * kLanes);
    for (int32_t i = begin; i < end; ++i) {
      const T *from = row(i) + d, *next = row(smaller(i + kAhead, last)) + d;
      for (int v = 0; v < kBlock; ++v) {
        totals[v] += load(from + v * kLanes);
        __builtin_prefetch(next + v * kLanes);
      }
    }
    for (int v = 0; v < kBlock; ++v) store(sums + d + v * kLanes, totals[v]);
  }
  for (; d < dim; d += kLanes) {
    const int width = static_cast<int>(smaller<int64_t>(kLanes, dim - d));
    Floats total = load(sums + d, width);
    for (int32_t i = begin; i < end; ++i) total += load_some(row(i) + d * stride, stride, width);
    store(sums + d, total, width);
  }
}

// Codes [first, last) of a group.
template <class T>
void add_codes(const AccumulateCodes& p, const Chunk& chunk, int64_t group, int64_t first,
               int64_t last) {
  const Sorted sorted = sorted_at(p, group);
  const TokenRows x = p.x;
  const int64_t dim = p.dim;
  int64_t* counts = p.counts + group * p.codes;
  float* sums = p.sums + group * p.codes * dim;
  if (chunk.first == 0) {
    const auto codes = static_cast<size_t>(last - first);
    std::memset(counts + first, 0, sizeof(int64_t) * codes);
    std::memset(sums + first * dim, 0, sizeof(float) * codes * static_cast<size_t>(dim));
  }
  const auto row = [&](int32_t i) {
    return static_cast<const T*>(x.data) + offset_of(x, chunk.first + sorted.rows[i], group);
  };
  int32_t begin = first > 0 ? sorted.ends[first - 1] : 0;
  for (int64_t code = first; code < last; ++code) {
    const int32_t end = sorted.ends[code];
    if (begin == end) continue;
    counts[code] += end - begin;
    add_rows<T>(row, begin, end, sorted.ends[p.codes - 1] - 1, x.stride, dim, sums + code * dim);
    begin = end;
  }
}

bool all_valid(const AccumulateCodes& p) {
  int64_t bad = 0;
  for (int64_t i = 0; i < p.x.rows * p.groups; ++i)
    bad |= (p.index[i] < -1) | (p.index[i] >= p.codes);
  return bad == 0;
}

void add_chunk(const AccumulateCodes& p, const Chunk& chunk, const Pool& pool) {
  parallel_for(pool, p.groups, grain_of(chunk.count + p.codes), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) sort_rows(p, group, chunk);
  });
  const int64_t bytes = (chunk.count / p.codes + 1) * p.dim * int64_t{sizeof(float)};
  parallel_for(
      pool, p.groups * p.codes, grain_of(bytes / kBytesPerWork), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end;) {
          const int64_t group = item / p.codes, first = item % p.codes;
          const int64_t last = smaller(p.codes, first + end - item);
          dispatch(p.x.dtype,
                   [&](auto zero) { add_codes<decltype(zero)>(p, chunk, group, first, last); });
          item += last - first;
        }
      });
}

}  // namespace

Status accumulate_codes(const AccumulateCodes& p, const Pool& pool) {
  if (!all_valid(p)) return Status::kBadValue;
  int64_t first = 0;
  do {
    add_chunk(p, {first, smaller(kChunkRows, p.x.rows - first)}, pool);
    first += kChunkRows;
  } while (first < p.x.rows);
  return Status::kOk;
}

int64_t accumulate_codes_scratch(const AccumulateCodes& p, int) {
  return p.groups * sorted_ints(p) * int64_t{sizeof(int32_t)};
}

}  // namespace tk::TK_ISA
