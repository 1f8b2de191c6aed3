// assign_residual on the CPU: packs all codebooks, then takes blocks of rows through all rounds,
// their residual in float32 throughout.
#include "cpu/codebook.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kBlockRows = kBlockTiles * kRows;

// One task's scratch: what a block of rows has left over, its tiles, and the best of each tile.
struct Block {
  float* residual;  // (kBlockRows, D)
  float* tiles;     // (kBlockTiles, D, kRows)
  Best* best;       // (kBlockTiles)
};

TK_INLINE int64_t block_floats(int64_t dim) { return ceil_div(kBlockRows * dim, 16) * 16; }

TK_INLINE int64_t block_bytes(int64_t dim) {
  return kBlockTiles * int64_t{sizeof(Best)} + 2 * block_floats(dim) * int64_t{sizeof(float)};
}

TK_INLINE Block block_at(char* base, int64_t dim) {
  Best* best = reinterpret_cast<Best*>(base);
  float* residual = reinterpret_cast<float*>(best + kBlockTiles);
  return {residual, residual + block_floats(dim), best};
}

TK_INLINE int64_t packed_bytes(const AssignResidual& p) {
  return p.codebooks.groups * packed_floats(p.codebooks.codes, p.codebooks.dim) *
         int64_t{sizeof(float)};
}

TK_INLINE int64_t tasks_of(const AssignResidual& p, int threads) {
  return smaller<int64_t>(threads, ceil_div(p.x.rows, kRows));
}

TK_INLINE void write_residual(const AssignResidual& p, int64_t row, const float* from) {
  dispatch(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(p.residual) + row * p.codebooks.dim;
    for (int64_t d = 0; d < p.codebooks.dim; d += kLanes) {
      const int count = static_cast<int>(smaller<int64_t>(kLanes, p.codebooks.dim - d));
      store(to + d, load(from + d, count), count);
    }
  });
}

// One round for `count` rows: search, note the codes, subtract them.
void run_round(const AssignResidual& p, int64_t round, int64_t first, int64_t count,
               const Block& block) {
  const int64_t dim = p.codebooks.dim, tiles = ceil_div(count, kRows), tile_size = kRows * dim;
  const Packed packed = packed_at(static_cast<float*>(p.scratch), p.codebooks, round, Metric::kL2);
  float row[kMaxDim];
  for (int64_t i = 0; i < tiles * kRows; ++i) {
    float* tile = block.tiles + i / kRows * tile_size;
    if (i >= count) {
      put_nothing(packed, tile, static_cast<int>(i % kRows));
      continue;
    }
    std::memcpy(row, block.residual + i * dim, sizeof(float) * static_cast<size_t>(dim));
    put_row(packed, row, tile, static_cast<int>(i % kRows));
  }
  search(packed, block.tiles, tiles, 0, packed.panel_count, block.best);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = i / kRows;
    const int r = static_cast<int>(i % kRows);
    const Candidate winner = candidate_of(packed, block.best[t], r);
    const int64_t code = code_of(packed, block.tiles + t * tile_size, r, winner);
    p.index[(first + i) * p.codebooks.groups + round] = code;
    read_code(p.codebooks, round, code, row);
    for (int64_t d = 0; d < dim; ++d) block.residual[i * dim + d] -= row[d];
  }
}

}  // namespace

Status assign_residual(const AssignResidual& p, const Pool& pool) {
  const int64_t tasks = tasks_of(p, pool.threads), dim = p.codebooks.dim;
  if (tasks == 0) return Status::kOk;
  pack(p.codebooks, Metric::kL2, static_cast<float*>(p.scratch), pool);
  const int64_t cost = p.x.rows * p.codebooks.groups * p.codebooks.codes * dim / (kLanes * tasks);
  parallel_for(pool, tasks, grain_of(cost), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Block block =
          block_at(static_cast<char*>(p.scratch) + packed_bytes(p) + task * block_bytes(dim), dim);
      const int64_t last = p.x.rows * (task + 1) / tasks;
      for (int64_t first = p.x.rows * task / tasks; first < last; first += kBlockRows) {
        const int64_t count = smaller(kBlockRows, last - first);
        for (int64_t i = 0; i < count; ++i)
          read_row(p.x, first + i, 0, dim, block.residual + i * dim);
        for (int64_t round = 0; round < p.codebooks.groups; ++round)
          run_round(p, round, first, count, block);
        for (int64_t i = 0; i < count; ++i) write_residual(p, first + i, block.residual + i * dim);
      }
    }
  });
  return Status::kOk;
}

int64_t assign_residual_scratch(const AssignResidual& p, int threads) {
  return packed_bytes(p) + tasks_of(p, threads) * block_bytes(p.codebooks.dim);
}

}  // namespace tk::TK_ISA
