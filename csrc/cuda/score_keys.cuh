// How score_attention scores keys: a block owns some of them and goes through the rows that see
// them, head by head; then columns are folded up, averaged over their neighbours and written.
#pragma once

#include "cuda/score_measure.cuh"

namespace tk::cuda::score {

// attention = 2^(logit − shift) · share; `weight` in the sum; the row sees so many keys.
struct alignas(16) Line {
  float shift, share, weight;
  int seen;
};

// What a block has to do: keys, rows, heads.
struct ScoreUnit {
  int image, line;  // of the output
  int length;
  int key_head, head_steps;  // key heads, 2^head_shift at a time
  int head_tile, end_head_tile;
  int row_block, end_row_block;  // of its part
  int key_tile, end_key_tile;
  int part;
};

// A place in the order in which a block goes through its tiles.
struct Cursor {
  int key_tile, row_block, head_step, head_tile, chunk;
  int line_slot, key_slot;
};

// The column that a tile of keys begins with, below 0 where neighbours are missing.
__device__ inline int first_of(const ScoreJob& job, int key_tile) {
  return key_tile * job.own - job.reach;
}

// The first block of rows that sees a tile of keys, if any does.
__device__ inline int first_row_block(const ScoreJob& job, const ScoreUnit& unit, int key_tile) {
  const ScoreAttention& p = job.p;
  if (!p.causal || p.positions != nullptr) return unit.row_block;
  const int column = first_of(job, key_tile);
  const int64_t row = p.first_column + (column > 0 ? column : 0) + p.rows - unit.length;
  const int64_t sees = row > 0 ? row >> job.tile.rows_shift : 0;
  return sees > unit.row_block ? static_cast<int>(sees) : unit.row_block;
}

__device__ inline ScoreUnit unit_of(const ScoreJob& job) {
  using Heads = ScoreAttention::Heads;
  const ScoreAttention& p = job.p;
  const ScoreTile& tile = job.tile;
  auto number = static_cast<uint32_t>(block());
  ScoreUnit unit;
  unit.key_tile =
      take(number, (job.key_tiles + job.tiles_each - 1) / job.tiles_each) * job.tiles_each;
  unit.end_key_tile = unit.key_tile + job.tiles_each < job.key_tiles
                          ? unit.key_tile + job.tiles_each
                          : job.key_tiles;
  unit.part = take(number, job.parts);
  const int which = take(number, job.units);
  unit.image = static_cast<int>(number);
  unit.length = length_of(p, unit.image);
  unit.key_head = which;
  unit.head_steps = 1;
  unit.line = which;
  unit.head_tile = 0;
  unit.end_head_tile = tile.head_tiles;
  if (p.reduce_heads == Heads::kMean) {
    unit.head_steps = static_cast<int>((p.key_heads - 1) >> tile.head_shift) + 1;
  } else if (p.reduce_heads == Heads::kNone) {
    unit.key_head = which / tile.head_tiles;
    unit.head_tile = which - unit.key_head * tile.head_tiles;
    unit.end_head_tile = unit.head_tile + 1;
    unit.line = unit.key_head * job.group + unit.head_tile * tile.heads;
  }
  unit.row_block = unit.part * job.row_blocks_each;
  const int end = unit.row_block + job.row_blocks_each;
  unit.end_row_block = end < tile.row_blocks ? end : tile.row_blocks;
  return unit;
}

// The block of rows that a tile of keys begins with; one at least, whether it sees them or not.
__device__ inline int begin_rows(const ScoreJob& job, const ScoreUnit& unit, int key_tile) {
  const int sees = first_row_block(job, unit, key_tile);
  return sees < unit.end_row_block ? sees : unit.end_row_block - 1;
}

// One step on: all rows of a head before the next head, or all heads of a row before the next.
__device__ inline void advance(const ScoreJob& job, const ScoreUnit& unit, Cursor& at) {
  const ScoreTile& tile = job.tile;
  const Cursor old = at;
  const auto next_row = [&] {
    if (++at.row_block < unit.end_row_block) return true;
    at.row_block = begin_rows(job, unit, at.key_tile);
    return false;
  };
  const auto next_head = [&] {
    if (++at.head_tile < unit.end_head_tile) return true;
    at.head_tile = unit.head_tile;
    if (++at.head_step < unit.head_steps) return true;
    at.head_step = 0;
    return false;
  };
  if (++at.chunk == tile.chunks) {
    at.chunk = 0;
    const bool more =
        job.flow == ScoreFlow::kMeanFirst ? next_head() || next_row() : next_row() || next_head();
    if (!more && ++at.key_tile < unit.end_key_tile)
      at.row_block = begin_rows(job, unit, at.key_tile);
  }
  const bool other_head = at.head_step != old.head_step || at.chunk != old.chunk;
  if (other_head || at.head_tile != old.head_tile || at.row_block != old.row_block) {
    if (++at.line_slot == tile.line_slots) at.line_slot = 0;
  }
  if (other_head || at.key_tile != old.key_tile) {
    if (++at.key_slot == tile.key_slots) at.key_slot = 0;
  }
}

// What is read for a line: the softmax of its row over the first splits of the keys.
struct LineSource {
  static constexpr int kSplits = 4;
  SplitSoftmax splits[kSplits];
  const SplitSoftmax* others;
  float lse, weight;
  int seen;
};

__device__ inline LineSource read_line(const ScoreJob& job, const ScoreUnit& unit, int line,
                                       const Cursor& at) {
  const ScoreAttention& p = job.p;
  const int shift = kWarpLinesShift + job.tile.line_shift, apart = line >> shift;
  const int key_head = unit.key_head + (at.head_step << job.tile.head_shift) + apart;
  const LinePlace place =
      place_of(job, line - (apart << shift), key_head, at.head_tile, at.row_block);
  LineSource source{};
  if (!place.here) return source;
  source.seen = seen_by(p, unit.image, place.row, unit.length);
  source.weight = 1.0f;
  if (p.row_weights != nullptr)
    source.weight =
        p.row_weights[unit.image * p.weight_strides[0] + place.row * p.weight_strides[1]];
  if (p.lse != nullptr) {
    source.lse = p.lse[unit.image * p.lse_strides[0] + place.head * p.lse_strides[1] +
                       place.row * p.lse_strides[2]];
    return source;
  }
  const SplitSoftmax* from =
      job.softmax + ((unit.image * p.heads + place.head) * p.rows + place.row) * job.splits;
  source.others = from + LineSource::kSplits;
#pragma unroll
  for (int split = 0; split < LineSource::kSplits; ++split)
    if (split < job.splits) source.splits[split] = from[split];
  return source;
}

// What turns a line's logits into attention.
__device__ inline Line line_of(const ScoreJob& job, const LineSource& source) {
  if (source.seen == 0) return {0.0f, 0.0f, 0.0f, 0};
  if (job.p.lse != nullptr) return {kLog2E * source.lse, job.share, source.weight, source.seen};
  SplitSoftmax all = source.splits[0];
#pragma unroll
  for (int split = 1; split < LineSource::kSplits; ++split)
    if (split < job.splits) all = join(all, source.splits[split]);
  for (int split = LineSource::kSplits; split < job.splits; ++split)
    all = join(all, source.others[split - LineSource::kSplits]);
  return {all.peak == -INFINITY ? 0.0f : all.peak, job.share * (1.0f / all.total), source.weight,
          source.seen};
}

// The lines of a tile among those that are kept.
__device__ inline int kept_lines_of(const ScoreJob& job, const ScoreUnit& unit, const Cursor& at) {
  const int tile =
      at.head_step * (unit.end_head_tile - unit.head_tile) + at.head_tile - unit.head_tile;
  return (tile * job.row_blocks_each + at.row_block - unit.row_block) * job.tile.lines();
}

// All lines of a block, several per thread at a time, so that their reads overlap.
__device__ inline void keep_lines(const ScoreJob& job, const ScoreUnit& unit, Line* lines) {
  constexpr int kTogether = 4;
  const int each = job.tile.lines(), head_tiles = unit.end_head_tile - unit.head_tile;
  for (int first = thread(); first < job.kept_lines; first += kTogether * threads()) {
    LineSource sources[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = first + i * threads(), tile = at / each;
      const int head = tile / job.row_blocks_each;
      Cursor place{};
      place.row_block = unit.row_block + tile - head * job.row_blocks_each;
      place.head_step = head / head_tiles;
      place.head_tile = unit.head_tile + head - place.head_step * head_tiles;
      if (at < job.kept_lines) sources[i] = read_line(job, unit, at - tile * each, place);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i * threads() < job.kept_lines)
        lines[first + i * threads()] = line_of(job, sources[i]);
  }
}

// Attention as integers of the same order: NaN comes out on top.
__device__ inline uint32_t order_of(float attention) {
  uint32_t bits;
  memcpy(&bits, &attention, sizeof bits);
  return bits & 0x7fffffffu;
}

__device__ inline float higher(float a, float b) { return order_of(b) > order_of(a) ? b : a; }

// What a lane has of columns, where they stay in registers: of 8j + 2·(lane % 4) + side at
// 2j + side. Else of every so many columns of the block.
template <class T, ScoreFlow flow>
struct Columns {
  static constexpr bool kDirect = flow == ScoreFlow::kSums || flow == ScoreFlow::kMaxima;
  static constexpr int kSums = kWarpKeys<T> / (kDirect ? 4 : 32);
  static constexpr int kTops = flow == ScoreFlow::kSums ? 1 : kSums;
  float sums[kSums], tops[kTops];
};

// Attention of one half of the lines of 16 from their logits, in place; invisible keys get none.
// What it still lacks of a factor is given.
template <int J>
__device__ float attend(float (&sums)[J][4], int half, const Line& line, float factor, int number,
                        bool masked) {
#pragma unroll
  for (int n = 0; n < 2 * J; ++n) {
    float& logit = sums[n / 2][2 * half + n % 2];
    logit = exp2_flushed(logit * factor - line.shift);
  }
  if (!masked) return line.share;
  const int left = line.seen - number - lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < 2 * J; ++n) {
    float& attention = sums[n / 2][2 * half + n % 2];
    attention = n / 2 * 8 + n % 2 < left ? attention * line.share : 0.0f;
  }
  return 1.0f;
}

// Logits of this warp, whose keys begin with `number`, become attention and are taken into columns.
template <class T, ScoreFlow flow>
__device__ void take_columns(const ScoreJob& job, Logits<T>& sums, const Line* lines, int number,
                             Columns<T, flow>& columns) {
  constexpr int J = kWarpKeys<T> / 8;
#pragma unroll
  for (int i = 0; i < kWarpLines / 16; ++i) {
    const int sees[2] = {lines[16 * i + lane() / 4].seen, lines[16 * i + 8 + lane() / 4].seen};
    if (!any(sees[0] > number || sees[1] > number)) continue;
    const int beyond = number + kWarpKeys<T>;
    const bool masked = any(sees[0] < beyond || sees[1] < beyond);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Line line = lines[16 * i + 8 * half + lane() / 4];
      const float share = attend<J>(sums[i], half, line, job.factor, number, masked);
      const float by = share * line.weight;
#pragma unroll
      for (int n = 0; n < 2 * J; ++n) {
        const float attention = sums[i][n / 2][2 * half + n % 2];
        columns.sums[n] += attention * by;
        if constexpr (flow == ScoreFlow::kMaxima)
          columns.tops[n] = higher(columns.tops[n], attention * share);
      }
    }
  }
}

// The same into a stage of lines of keys; `add` to what is there.
template <class T>
__device__ void take_stage(const ScoreJob& job, Logits<T>& sums, const Line* lines, int number,
                           float* stage, int stride, bool add) {
  constexpr int J = kWarpKeys<T> / 8;
  using V = Vector<float, 2>;
#pragma unroll
  for (int i = 0; i < kWarpLines / 16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = 16 * i + 8 * half + lane() / 4;
      const Line line = lines[at];
      const bool masked = any(line.seen < number + kWarpKeys<T>);
      const float share = attend<J>(sums[i], half, line, job.factor, number, masked);
      float* to = stage + at * stride + lane() % 4 * 2;
#pragma unroll
      for (int j = 0; j < J; ++j) {
        V pair{{sums[i][j][2 * half] * share, sums[i][j][2 * half + 1] * share}};
        if (add) {
          const V old = load<V>(to + 8 * j);
          pair.at[0] += old.at[0];
          pair.at[1] += old.at[1];
        }
        store(to + 8 * j, pair);
      }
    }
}

// Half of the columns go to the lane on the other side of a bit, half of its come back, until each
// of the eight lanes that share N columns has N / 8 of them, from `first` on.
template <int N, int bit, class Combine>
__device__ int fold_lanes(float* values, const Combine& combine) {
  const bool upper = (lane() & bit) != 0;
#pragma unroll
  for (int n = 0; n < N / 2; ++n) {
    const float give = upper ? values[n] : values[n + N / 2];
    const float keep = upper ? values[n + N / 2] : values[n];
    values[n] = combine(keep, shuffle_xor(give, bit));
  }
  int first = upper ? N / 2 : 0;
  if constexpr (bit > 4) first += fold_lanes<N / 2, bit / 2>(values, combine);
  return first;
}

// The columns of a warp's tile, folded up, to the row of the block's columns that begins with them.
template <int N, class Combine>
__device__ void fold_columns(float (&values)[N], float* to, const Combine& combine) {
  const int first = fold_lanes<N, 16>(values, combine);
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
    to[(first + n) / 2 * 8 + lane() % 4 * 2 + (first + n) % 2] = values[n];
}

// Averages a row of columns over their neighbours and writes those that are the tile's own.
__device__ inline void write_columns(const ScoreJob& job, const ScoreUnit& unit, const float* row,
                                     int keys, int first, int64_t line, int result) {
  const ScoreAttention& p = job.p;
  const int64_t columns = p.end_column - p.first_column;
  const int64_t lines = p.reduce_heads == ScoreAttention::Heads::kMean    ? 1
                        : p.reduce_heads == ScoreAttention::Heads::kGroup ? p.key_heads
                                                                          : p.heads;
  const int64_t number = (int64_t{unit.part} * (p.sum + p.max) + result) * p.batch + unit.image;
  float* out = job.out + (number * lines + line) * columns;
  for (int k = job.reach + thread(); k < keys - job.reach; k += threads()) {
    if (first + k >= columns) break;
    float value = row[k];
    if (job.reach > 0) {
      value = 0;
      for (int d = -job.reach; d <= job.reach; ++d) {
        const int column = first + k + d;
        value += column >= 0 && column < columns ? row[k + d] : 0.0f;
      }
      value /= static_cast<float>(2 * job.reach + 1);
    }
    out[first + k] = value;
  }
}

// Joins `count` rows of partial columns in order and writes them.
template <class Combine>
__device__ void finish_columns(const ScoreJob& job, const ScoreUnit& unit, float* rows, int count,
                               int keys, int first, int result, const Combine& combine) {
  for (int k = thread(); k < keys; k += threads()) {
    float value = rows[k];
    for (int n = 1; n < count; ++n) value = combine(value, rows[n * keys + k]);
    rows[k] = value;
  }
  if (job.reach > 0) sync();
  write_columns(job, unit, rows, keys, first, unit.line, result);
}

}  // namespace tk::cuda::score
