// The second pass of score_attention: one block, from its tiles to its scores.
#pragma once

#include "cuda/score_keys.cuh"

namespace tk::cuda::score {

constexpr int kStageGap = 8;  // floats that keep neighbouring lines in other banks

__host__ __device__ inline bool is_staged(ScoreFlow flow) {
  return flow == ScoreFlow::kMeanFirst || flow == ScoreFlow::kApart;
}

// Floats of shared memory in which attention of a block's lines lies, and of those in which its
// columns are joined.
__host__ __device__ inline int stage_floats(const ScoreJob& job, int keys) {
  return is_staged(job.flow) ? job.tile.lines() * (keys + kStageGap) : 0;
}

__host__ __device__ inline int joined_rows(const ScoreJob& job, int keys) {
  const int rows = job.tile.warps() * kWarp / keys;  // that share the rows of a tile, by threads
  const int warps = 1 << (job.tile.line_shift + job.tile.head_shift);
  return !is_staged(job.flow) ? warps : rows > 1 ? rows : 1;
}

// body(n, column, share): the n-th column of this thread, and which share of its rows it has.
template <class T, class Body>
__device__ void for_own_columns(int keys, const Body& body) {
  const int shift = highest_bit(static_cast<uint32_t>(keys));
#pragma unroll
  for (int n = 0; n < kWarpKeys<T> / kWarp; ++n) {
    const int at = thread() + n * threads();
    if (n == 0 || (threads() < keys && at < keys)) body(n, at & (keys - 1), at >> shift);
  }
}

// Means over heads that lie in the stage are taken into the sums and maxima of this thread's
// columns: every so many rows of every so many columns.
template <class T>
__device__ void take_means(const ScoreJob& job, const Line* lines, const float* stage, int keys,
                           int row_block, Columns<T, ScoreFlow::kMeanFirst>& columns) {
  const ScoreTile& tile = job.tile;
  const int stride = keys + kStageGap, step = joined_rows(job, keys);
  const int64_t left = job.p.rows - (int64_t{row_block} << tile.rows_shift);
  const int all = 1 << tile.rows_shift, rows = left < all ? static_cast<int>(left) : all;
  for_own_columns<T>(keys, [&](int n, int k, int share) {
    for (int row = share; row < rows; row += step) {
      float mean = 0;
      for (int apart = 0; apart < 1 << tile.head_shift; ++apart)
        for (int head = 0; head < tile.heads; ++head) {
          const int line =
              (apart << (kWarpLinesShift + tile.line_shift)) + (head << tile.rows_shift);
          mean += stage[(line + row) * stride + k];
        }
      columns.sums[n] += mean * lines[row].weight;
      columns.tops[n] = higher(columns.tops[n], mean);
    }
  });
}

// Every head of the tile for itself: sum and maximum take the place of its first two lines.
__device__ inline void write_heads(const ScoreJob& job, const ScoreUnit& unit, const Line* lines,
                                   float* stage, int keys, int first) {
  const ScoreAttention& p = job.p;
  const int stride = keys + kStageGap, shift = job.tile.rows_shift;
  const int left = job.group - unit.head_tile * job.tile.heads;
  const int heads = left < job.tile.heads ? left : job.tile.heads;
  for (int at = thread(); at < heads * keys; at += threads()) {
    const int head = at / keys, k = at - head * keys;
    float* column = stage + (head << shift) * stride + k;
    float sum = 0, top = 0;
    for (int row = 0; row < p.rows; ++row) {
      const float attention = column[row * stride];
      sum += attention * lines[(head << shift) + row].weight;
      top = higher(top, attention);
    }
    column[0] = p.sum ? sum : top;
    column[stride] = top;
  }
  sync();
  for (int head = 0; head < heads; ++head) {
    const float* row = stage + (head << shift) * stride;
    write_columns(job, unit, row, keys, first, unit.line + head, 0);
    if (p.sum && p.max) write_columns(job, unit, row + stride, keys, first, unit.line + head, 1);
  }
}

// Scores of keys that nobody sees.
__device__ inline void write_nothing(const ScoreJob& job, const ScoreUnit& unit, float* row,
                                     int keys) {
  const int left = job.group - unit.head_tile * job.tile.heads;
  const bool apart = job.flow == ScoreFlow::kApart;
  const int heads = !apart ? 1 : left < job.tile.heads ? left : job.tile.heads;
  for (int k = thread(); k < keys; k += threads()) row[k] = 0;
  sync();
  for (int key_tile = unit.key_tile; key_tile < unit.end_key_tile; ++key_tile)
    for (int head = 0; head < heads; ++head)
      for (int result = 0; result < job.p.sum + job.p.max; ++result)
        write_columns(job, unit, row, keys, first_of(job, key_tile), unit.line + head, result);
}

// Lines of which a block knows at a time what turns their logits into attention.
__host__ __device__ inline int line_count(const ScoreJob& job) {
  return job.kept_lines > 0 ? job.kept_lines : job.tile.line_slots * job.tile.lines();
}

// What a block has in shared memory.
template <class T>
struct ScoreMemory {
  T *line_tiles, *key_tiles;
  int line_tile, key_tile;  // elements of each
  Line* lines;
  Cursor* steps;  // of those under way
  float *joined, *stage;

  __device__ ScoreMemory(const ScoreJob& job, int keys) {
    const ScoreTile& tile = job.tile;
    const int stride = tile_stride<T>(1 << tile.depth_shift);
    line_tile = tile.lines() * stride;
    key_tile = (keys << tile.head_shift) * stride;
    Arena arena;
    line_tiles = arena.shared<T>(tile.line_slots * line_tile);
    key_tiles = arena.shared<T>(tile.key_slots * key_tile);
    lines = arena.shared<Line>(line_count(job));
    steps = arena.shared<Cursor>(kMostStages);
    joined = arena.shared<float>((job.p.sum + job.p.max) * joined_rows(job, keys) * keys);
    stage = arena.shared<float>(stage_floats(job, keys));
  }
};

// Asks for the tiles of a step, if they have not come with the one before, and says where they are.
template <class T>
__device__ void fetch_step(const ScoreJob& job, const ScoreUnit& unit, const ScoreMemory<T>& memory,
                           int step, Cursor& at, int& line_slot, int& key_slot) {
  const ScoreTile& tile = job.tile;
  const ScoreAttention& p = job.p;
  const int key_head = unit.key_head + (at.head_step << tile.head_shift);
  if (at.line_slot != line_slot) {
    line_slot = at.line_slot;
    fetch_lines(job, memory.line_tiles + line_slot * memory.line_tile, unit.image, key_head,
                at.head_tile, at.row_block, at.chunk);
    if (job.kept_lines == 0 && at.chunk == tile.chunks - 1 && thread() < tile.lines())
      memory.lines[line_slot * tile.lines() + thread()] =
          line_of(job, read_line(job, unit, thread(), at));
  }
  if (at.key_slot != key_slot) {
    key_slot = at.key_slot;
    const int begin = static_cast<int>(p.first_column), end = static_cast<int>(p.end_column);
    fetch_keys(job, memory.key_tiles + key_slot * memory.key_tile, unit.image, key_head,
               begin + first_of(job, at.key_tile), begin, unit.length < end ? unit.length : end,
               at.chunk);
  }
  if (thread() == 0) memory.steps[step % kMostStages] = at;
  advance(job, unit, at);
}

// Columns of which all rows have been taken: folded up, joined, written; then none.
template <class T, ScoreFlow flow>
__device__ void give_columns(const ScoreJob& job, const ScoreUnit& unit, float* joined, int keys,
                             int first, Columns<T, flow>& columns) {
  const auto add = [](float a, float b) { return a + b; };
  const auto most = [](float a, float b) { return higher(a, b); };
  const bool sum = job.p.sum, max = job.p.max;
  const int rows = joined_rows(job, keys);
  float* tops = joined + sum * rows * keys;
  if constexpr (flow == ScoreFlow::kMeanFirst) {
    for_own_columns<T>(keys, [&](int n, int k, int share) {
      if (sum) joined[share * keys + k] = columns.sums[n];
      tops[share * keys + k] = columns.tops[n];
    });
  } else {
    const int at = line_warp(job) * keys + key_warp(job) * kWarpKeys<T>;
    if (sum) fold_columns(columns.sums, joined + at, add);
    if constexpr (flow == ScoreFlow::kMaxima) fold_columns(columns.tops, tops + at, most);
  }
  sync();
  if (sum) finish_columns(job, unit, joined, rows, keys, first, 0, add);
  if (max) finish_columns(job, unit, tops, rows, keys, first, sum, most);
  columns = {};
}

// What becomes of a tile whose logits are there; `flow` is kMeanFirst for kApart too.
template <class T, ScoreFlow flow>
__device__ void take_tile(const ScoreJob& job, const ScoreUnit& unit, const ScoreMemory<T>& memory,
                          const Cursor& at, Logits<T>& sums, Columns<T, flow>& columns) {
  const ScoreTile& tile = job.tile;
  const int keys = tile.keys<T>(), first = first_of(job, at.key_tile);
  const int line = line_warp(job) * kWarpLines, key = key_warp(job) * kWarpKeys<T>;
  const int number = static_cast<int>(job.p.first_column) + first + key;
  const Line* lines = memory.lines + (job.kept_lines > 0 ? kept_lines_of(job, unit, at)
                                                         : at.line_slot * tile.lines());
  const bool last_head =
      at.head_step + 1 == unit.head_steps && at.head_tile + 1 == unit.end_head_tile;
  if constexpr (flow == ScoreFlow::kMeanFirst) {
    const bool first_head = at.head_step == 0 && at.head_tile == unit.head_tile;
    const int stride = keys + kStageGap;
    take_stage<T>(job, sums, lines + line, number, memory.stage + line * stride + key, stride,
                  !first_head);
    if (!last_head) return;
    sync();
    if (job.flow == ScoreFlow::kApart)
      return write_heads(job, unit, lines, memory.stage, keys, first);
    take_means<T>(job, lines, memory.stage, keys, at.row_block, columns);
  } else {
    take_columns<T, flow>(job, sums, lines + line, number, columns);
  }
  if (last_head && at.row_block + 1 == unit.end_row_block)
    give_columns<T, flow>(job, unit, memory.joined, keys, first, columns);
}

template <class T, ScoreFlow flow>
__device__ void score_keys(const ScoreJob& job) {
  const ScoreTile& tile = job.tile;
  const ScoreUnit unit = unit_of(job);
  const ScoreMemory<T> memory(job, tile.keys<T>());
  const int64_t column = first_of(job, unit.key_tile);
  if (job.p.first_column + (column > 0 ? column : 0) >= unit.length ||
      first_row_block(job, unit, unit.key_tile) >= unit.end_row_block)
    return write_nothing(job, unit, memory.joined, tile.keys<T>());

  int rows = 0;
  for (int key_tile = unit.key_tile; key_tile < unit.end_key_tile; ++key_tile)
    rows += unit.end_row_block - begin_rows(job, unit, key_tile);
  const int heads = unit.head_steps * (unit.end_head_tile - unit.head_tile);
  Cursor ahead{unit.key_tile, begin_rows(job, unit, unit.key_tile), 0, unit.head_tile, 0, 0, 0};
  int line_slot = -1, key_slot = -1;
  Logits<T> sums;
  Columns<T, flow> columns;
  const auto fetch = [&](int step) {
    fetch_step<T>(job, unit, memory, step, ahead, line_slot, key_slot);
  };
  const auto ready = [&] {
    if (job.kept_lines > 0) keep_lines(job, unit, memory.lines);
    clear(sums);  // here, so that no register holds them before
    columns = {};
  };
  run_steps(tile.stages, rows * heads * tile.chunks, fetch, ready, [&](int step) {
    const Cursor at = memory.steps[step % kMostStages];
    add_logits<T>(job, sums, memory.line_tiles + at.line_slot * memory.line_tile,
                  memory.key_tiles + at.key_slot * memory.key_tile, at.chunk);
    if (at.chunk + 1 < tile.chunks) return;
    take_tile<T, flow>(job, unit, memory, at, sums, columns);
    clear(sums);
  });
}

}  // namespace tk::cuda::score
