// assign_nearest on the CPU: packs the codebook, searches it, and looks at the winner once more for
// its distance and its code.
#include "cpu/codebook.h"

namespace tk::TK_ISA {
namespace {

// How the work is cut: an item is one tile of kRows rows of one group against one of `splits` parts
// of the codebook. A task is a range of items with scratch of its own; its tiles share passes over
// the codebook unless that is split.
struct Plan {
  int64_t tiles;   // per group
  int64_t splits;  // more than one only where there are fewer tiles than threads
  int64_t items, tasks;
};

Plan plan_of(const AssignNearest& p, int threads) {
  const int64_t tiles = ceil_div(p.x.rows, kRows), all = p.codebook.groups * tiles;
  const int64_t panels = ceil_div(p.codebook.codes, kWidth);
  const int64_t wanted = all > 0 && all < threads ? ceil_div(threads, all) : 1;
  const int64_t splits = smaller(wanted, panels);
  return {tiles, splits, all * splits, smaller<int64_t>(threads, all * splits)};
}

struct Scratch {
  float* packed;          // (G, packed_floats)
  Candidate* candidates;  // (G·tiles, kRows, splits), where the codebook is split
  char* tasks;            // (tasks, task_bytes)
};

TK_INLINE int64_t round_up(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

TK_INLINE int64_t packed_bytes(const AssignNearest& p) {
  return round_up(4 * p.codebook.groups * packed_floats(p.codebook.codes, p.codebook.dim));
}

TK_INLINE int64_t candidate_bytes(const Plan& plan) {
  return plan.splits > 1 ? round_up(plan.items * kRows * int64_t{sizeof(Candidate)}) : 0;
}

TK_INLINE int64_t best_bytes() { return kBlockTiles * int64_t{sizeof(Best)}; }

TK_INLINE int64_t task_bytes(const AssignNearest& p) {
  return best_bytes() + round_up(kBlockTiles * kRows * p.codebook.dim * 4);
}

TK_INLINE Scratch scratch_of(const AssignNearest& p, const Plan& plan) {
  char* base = static_cast<char*>(p.scratch);
  char* candidates = base + packed_bytes(p);
  return {reinterpret_cast<float*>(base), reinterpret_cast<Candidate*>(candidates),
          candidates + candidate_bytes(plan)};
}

TK_INLINE void fill_tile(const AssignNearest& p, const Packed& packed, int64_t group, int64_t tile,
                         float* to) {
  float row[kMaxDim];
  for (int r = 0; r < kRows; ++r) {
    const int64_t number = tile * kRows + r;
    if (number < p.x.rows) {
      read_row(p.x, number, group, packed.dim, row);
      put_row(packed, row, to, r);
    } else {
      put_nothing(packed, to, r);
    }
  }
}

// ‖x−e‖², 1 − cos or −⟨x,e⟩, from the values as they came. Between vectors of length 1, 1 − cos =
// ½‖x−e‖² loses no digits near 0.
float distance_of(Metric metric, float* x, float* code, int64_t dim) {
  bool differences = metric == Metric::kL2;
  float scale = 1;
  if (metric == Metric::kCosine) {
    const float x_norm = norm(x, dim), code_norm = norm(code, dim);
    for (int64_t d = 0; d < dim; ++d) x[d] /= larger(x_norm, kNormFloor);
    for (int64_t d = 0; d < dim; ++d) code[d] /= larger(code_norm, kNormFloor);
    differences = x_norm > kNormFloor && code_norm > kNormFloor;
    scale = 0.5f;
  }
  Floats total{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int count = static_cast<int>(smaller<int64_t>(kLanes, dim - d));
    const Floats a = load(x + d, count), b = load(code + d, count);
    total += differences ? (a - b) * (a - b) : a * b;
  }
  if (differences) return scale * sum(total);
  return metric == Metric::kCosine ? 1 - sum(total) : -sum(total);
}

void copy_code(const Codebooks& book, int64_t group, int64_t code, void* to) {
  const int64_t size = size_of(book.dtype);
  const char* from = static_cast<const char*>(book.data) +
                     (group * book.group_stride + code * book.code_stride) * size;
  if (book.stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(book.dim * size));
    return;
  }
  for (int64_t d = 0; d < book.dim; ++d) {
    std::memcpy(static_cast<char*>(to) + d * size, from + d * book.stride * size,
                static_cast<size_t>(size));
  }
}

TK_INLINE void write_row(const AssignNearest& p, int64_t group, int64_t row, int64_t code) {
  const int64_t at = row * p.codebook.groups + group, dim = p.codebook.dim;
  p.index[at] = code;
  if (p.codes != nullptr) {
    copy_code(p.codebook, group, code,
              static_cast<char*>(p.codes) + at * dim * size_of(p.codebook.dtype));
  }
  if (p.distance == nullptr) return;
  float x[kMaxDim], e[kMaxDim];
  read_row(p.x, row, group, dim, x);
  read_code(p.codebook, group, code, e);
  p.distance[at] = distance_of(p.metric, x, e, dim);
}

TK_INLINE void finish_tile(const AssignNearest& p, const Packed& packed, int64_t group,
                           int64_t tile, const float* values,
                           const Candidate (&candidates)[kRows]) {
  const int64_t count = smaller<int64_t>(kRows, p.x.rows - tile * kRows);
  for (int r = 0; r < count; ++r)
    write_row(p, group, tile * kRows + r, code_of(packed, values, r, candidates[r]));
}

// Tiles [first, first + count) of a group against the whole codebook.
void whole_block(const AssignNearest& p, const Packed& packed, int64_t group, int64_t first,
                 int64_t count, Best* best, float* tiles) {
  const int64_t tile_size = kRows * packed.dim;
  for (int64_t t = 0; t < count; ++t) fill_tile(p, packed, group, first + t, tiles + t * tile_size);
  search(packed, tiles, count, 0, packed.panel_count, best);
  for (int64_t t = 0; t < count; ++t) {
    Candidate candidates[kRows];
    for (int r = 0; r < kRows; ++r) candidates[r] = candidate_of(packed, best[t], r);
    finish_tile(p, packed, group, first + t, tiles + t * tile_size, candidates);
  }
}

void run_task(const AssignNearest& p, const Plan& plan, const Scratch& scratch, int64_t task) {
  char* own = scratch.tasks + task * task_bytes(p);
  Best* best = reinterpret_cast<Best*>(own);
  float* tiles = reinterpret_cast<float*>(own + best_bytes());
  const int64_t end = plan.items * (task + 1) / plan.tasks;
  for (int64_t item = plan.items * task / plan.tasks; item < end;) {
    const int64_t number = item / plan.splits, group = number / plan.tiles,
                  tile = number % plan.tiles;
    const Packed packed = packed_at(scratch.packed, p.codebook, group, p.metric);
    if (plan.splits == 1) {
      const int64_t count = smaller(smaller(kBlockTiles, plan.tiles - tile), end - item);
      whole_block(p, packed, group, tile, count, best, tiles);
      item += count;
      continue;
    }
    const int64_t split = item % plan.splits;
    fill_tile(p, packed, group, tile, tiles);
    search(packed, tiles, 1, packed.panel_count * split / plan.splits,
           packed.panel_count * (split + 1) / plan.splits, best);
    for (int r = 0; r < kRows; ++r) {
      scratch.candidates[(number * kRows + r) * plan.splits + split] =
          candidate_of(packed, best[0], r);
    }
    ++item;
  }
}

// Where the codebook was split: the best of the parts.
void join_splits(const AssignNearest& p, const Plan& plan, const Scratch& scratch) {
  float* tile = reinterpret_cast<float*>(scratch.tasks + best_bytes());
  for (int64_t number = 0; number < p.codebook.groups * plan.tiles; ++number) {
    const int64_t group = number / plan.tiles;
    const Packed packed = packed_at(scratch.packed, p.codebook, group, p.metric);
    Candidate candidates[kRows];
    for (int r = 0; r < kRows; ++r) {
      const Candidate* parts = scratch.candidates + (number * kRows + r) * plan.splits;
      candidates[r] = parts[0];
      for (int64_t split = 1; split < plan.splits; ++split) {
        if (beats(parts[split], candidates[r])) candidates[r] = parts[split];
      }
    }
    fill_tile(p, packed, group, number % plan.tiles, tile);
    finish_tile(p, packed, group, number % plan.tiles, tile, candidates);
  }
}

}  // namespace

Status assign_nearest(const AssignNearest& p, const Pool& pool) {
  const Plan plan = plan_of(p, pool.threads);
  if (plan.items == 0) return Status::kOk;
  const Scratch scratch = scratch_of(p, plan);
  pack(p.codebook, p.metric, scratch.packed, pool);
  const int64_t cost =
      plan.items / plan.tasks * kRows * p.codebook.codes * p.codebook.dim / (kLanes * plan.splits);
  parallel_for(pool, plan.tasks, grain_of(cost), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run_task(p, plan, scratch, task);
  });
  if (plan.splits > 1) join_splits(p, plan, scratch);
  return Status::kOk;
}

int64_t assign_nearest_scratch(const AssignNearest& p, int threads) {
  const Plan plan = plan_of(p, threads);
  return packed_bytes(p) + candidate_bytes(plan) + plan.tasks * task_bytes(p);
}

}  // namespace tk::TK_ISA
