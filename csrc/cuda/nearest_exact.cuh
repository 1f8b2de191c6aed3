// Tokens compared with all codes exactly, for assign_nearest: those of which the search is not
// sure, or all of them.
#pragma once

#include "cuda/nearest.cuh"

namespace tk::cuda {

constexpr int kExactThreads = 128, kExactBlocks = 2;  // on one multiprocessor

// The best of a thread's codes for a few tokens.
template <int kRows>
struct Exact {
  float score[kRows];
  int32_t at[kRows];
};

// Totals of one code and kRows tokens, which lie side by side: x[d·kRows + r].
template <bool differences, int kRows>
__device__ void add_totals(const float* x, const Numbers& code, int dim, float (&totals)[kRows]) {
#pragma unroll 1
  for (int begin = 0; begin < dim; begin += kRun) {
    float sums[kRows] = {};
#pragma unroll 1
    for (int d = begin; d < begin + kRun && d < dim; d += 8) {
      float values[8];
      code.eight(d, dim, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
          const auto tokens = load<Vector<float, 4>>(x + (d + i) * kRows + r);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[r + j] = with_term(differences, sums[r + j], tokens.at[j], values[i]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) totals[r] += sums[r];
  }
}

template <int kRows>
__device__ void compare_exactly(const NearestJob& s, int64_t group, int64_t begin, int64_t end,
                                const float* x, Exact<kRows>& best) {
  const int dim = s.packed.dim();
  for (int64_t k = begin + thread(); k < end; k += threads()) {
    const auto terms = terms_of(s.packed, group, k);
    if (!(terms.at[1] > kNever)) continue;
    const Numbers code = code_at(s.p.codebook, s.packed.wide, group, k);
    float totals[kRows] = {};
    if (s.p.metric == Metric::kL2)
      add_totals<true, kRows>(x, code, dim, totals);
    else
      add_totals<false, kRows>(x, code, dim, totals);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float score = score_of(totals[r], s.p.metric, terms.at[0]);
      if (score > best.score[r]) {
        best.score[r] = score;
        best.at[r] = static_cast<int32_t>(k);
      }
    }
  }
}

struct ExactMemory {
  float* x;          // (D, kManyRows)
  uint64_t* keys;    // (kManyRows)
  uint32_t* broken;  // (kManyRows)
  int32_t *picks, *seconds;
  int* last;

  __device__ ExactMemory(Arena& arena, int64_t dim)
      : x(arena.shared<float>(numbers(dim))),
        keys(arena.shared<uint64_t>(kManyRows)),
        broken(arena.shared<uint32_t>(kManyRows)),
        picks(arena.shared<int32_t>(kManyRows)),
        seconds(arena.shared<int32_t>(kManyRows)),
        last(arena.shared<int>(1)) {}

  static __host__ __device__ int64_t numbers(int64_t dim) { return (dim + 7) / 8 * 8 * kManyRows; }

  static int64_t bytes(int64_t dim) {
    return shared_bytes<float>(numbers(dim)) + shared_bytes<uint64_t>(kManyRows) +
           shared_bytes<uint32_t>(kManyRows) + 2 * shared_bytes<int32_t>(kManyRows) +
           shared_bytes<int>(1);
  }
};

// keys[r] = the best code of token r among [begin, end).
template <int kRows, class RowOf>
__device__ void find_keys(const NearestJob& s, int64_t group, int count, int64_t begin, int64_t end,
                          const ExactMemory& memory, const RowOf& row_of) {
  const int dim = s.packed.dim(), padded = (dim + 7) / 8 * 8;
  if (thread() < kRows) {
    memory.keys[thread()] = 0;
    memory.broken[thread()] = 0;
  }
  sync();
  for (int i = thread(); i < kRows * padded; i += threads()) {
    const int r = i / padded, d = i % padded;
    const bool there = r < count && d < dim;
    const float x = there ? token_at(s.p.x, false, row_of(r), group).one(d) : 0.0f;
    memory.x[d * kRows + r] = x;
    if (!is_finite(x)) atomic_or(memory.broken + r, 1u);
  }
  sync();
  Exact<kRows> best;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    best.score[r] = -kInfinity;
    best.at[r] = 0;
  }
  compare_exactly(s, group, begin, end, memory.x, best);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool found = best.score[r] > -kInfinity && memory.broken[r] == 0;
    const uint64_t key = warp_max(found ? key_of(best.score[r], best.at[r]) : 0);
    if (lane() == 0 && key != 0) atomic_max(memory.keys + r, key);
  }
  sync();
}

// Whether this part of the codes is the last of its chunk; then keys are those of all parts, which
// the index has held so far.
template <class RowOf>
__device__ bool join_parts(const NearestJob& s, int64_t group, int64_t chunk, int count,
                           int64_t parts, const ExactMemory& memory, const RowOf& row_of) {
  const int r = thread();
  auto* keys = reinterpret_cast<uint64_t*>(s.p.index);
  if (r < count) atomic_max(keys + s.at(group, row_of(r)), memory.keys[r]);
  fence();
  sync();
  if (r == 0) {
    const uint32_t before = atomic_add(s.done + group * s.chunks + chunk, 1u);
    *memory.last = before == static_cast<uint32_t>(parts - 1);
  }
  sync();
  if (*memory.last == 0) return false;
  fence();
  if (r < count) memory.keys[r] = load_relaxed(keys + s.at(group, row_of(r)));
  sync();
  return true;
}

// Chunks of kRows tokens of a group by parts of codes, as many as keep all blocks busy; returns
// what is left of `item` for the next group.
template <int kRows>
__device__ int64_t compare_group(const NearestJob& s, int64_t group, int64_t tokens, int64_t item,
                                 const ExactMemory& memory) {
  const int64_t codes = s.p.codebook.codes, most = (codes + kExactThreads - 1) / kExactThreads;
  const int64_t chunks = (tokens + kRows - 1) / kRows, wanted = chunks > 0 ? blocks() / chunks : 1;
  const int64_t parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
  for (; item < chunks * parts; item += blocks()) {
    const int64_t chunk = item / parts, part = item % parts, first = chunk * kRows;
    const int count = static_cast<int>(tokens - first < kRows ? tokens - first : kRows);
    const auto row_of = [&](int r) {
      return s.direct ? first + r : int64_t{s.list[group * s.p.x.rows + first + r]};
    };
    find_keys<kRows>(s, group, count, codes * part / parts, codes * (part + 1) / parts, memory,
                     row_of);
    if (parts == 1 || join_parts(s, group, chunk, count, parts, memory, row_of)) {
      if (thread() < kRows) {
        memory.picks[thread()] = static_cast<int32_t>(code_of(memory.keys[thread()]));
        memory.seconds[thread()] = -1;
      }
      sync();
      finish(s, group, count, memory.picks, memory.seconds, row_of);
    }
    sync();
  }
  return item - chunks * parts;
}

namespace {

// Listed tokens, or all of them, against all codes.
__global__ void __launch_bounds__(kExactThreads, kExactBlocks)
    exact_kernel(const __grid_constant__ NearestJob s) {
  Arena arena;
  const ExactMemory memory(arena, s.packed.dim());
  int64_t item = block();
  for (int64_t group = 0; group < s.p.codebook.groups; ++group) {
    const int64_t tokens = s.direct ? s.p.x.rows : s.listed[group];
    item = tokens < blocks() * kManyRows ? compare_group<kFewRows>(s, group, tokens, item, memory)
                                         : compare_group<kManyRows>(s, group, tokens, item, memory);
  }
}

}  // namespace
}  // namespace tk::cuda
