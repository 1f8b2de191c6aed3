// score_attention: the attention that each key receives, wave by wave. A unit is a block of rows of
// one key head; a wave is as many units as fit the scratch. Per wave: (1) scores and their
// exponentials, tile of keys by tile, each relative to its own peak; (2) one factor per row and
// tile that turns them into attention; (3) heads and rows are summed up, column by column. Who runs
// a tile or a column changes nothing in the order of any sum, nor does the batch.
#include "cpu/score_attention_plan.h"

namespace tk::TK_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLowest = -3.402823466e38f;
constexpr int kRowsAhead = 12;  // asked for while one is summed up

Status check_values(const ScoreAttention& p) {
  for (int64_t b = 0; p.key_lengths && b < p.batch; ++b) {
    const int64_t length = p.key_lengths[b * p.length_stride];
    if (length < 0 || length > p.keys) return Status::kBadValue;
  }
  for (int64_t b = 0; p.positions && b < p.batch; ++b) {
    for (int64_t t = 0; t < p.rows; ++t) {
      if (p.positions[b * p.position_strides[0] + t * p.position_strides[1]] < -1)
        return Status::kBadValue;
    }
  }
  return Status::kOk;
}

// Raw scores s of `count` visible keys become 2^(s·scale − peak), in place; gives their sum over
// lanes.
TK_INLINE Floats exponentials(float* scores, int count, float scale, float peak) {
  Floats total{};
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Floats value = exp2(load(scores + j) * scale - peak);
    store(scores + j, value);
    total += value;
  }
  if (j < count) {
    const Floats value = exp2(load(scores + j) * scale - peak);
    store(scores + j, value);
    total += select(iota() < count - j, value, Floats{});
  }
  return total;
}

TK_INLINE float peak_of(const float* scores, int count, float scale) {
  Floats peak = splat(kLowest);
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) peak = max(peak, load(scores + j) * scale);
  if (j < count)
    peak = max(peak, select(iota() < count - j, load(scores + j) * scale, splat(kLowest)));
  return max(peak);
}

// The exponentials of one unit and tile: of each row relative to the logarithm of its sum, where
// that is given, or to its peak here. All peaks come before the exponentials, so that rows overlap.
void score_tile(const ScoreAttention& p, const Plan& plan, const Unit& unit, int64_t tile) {
  const int64_t begin = tile * kTile;
  if (p.lse && (begin >= p.end_column || begin + kTile <= p.first_column)) return;
  int counts[kUnitRows], keys = 0;  // that a row sees here
  for (int t = 0; t < unit.rows; ++t) {
    const int64_t seen = visible(p, unit.image, unit.first_row + t) - begin;
    counts[t] = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(kTile, seen)));
    keys = larger(keys, counts[t]);
  }
  const int width = tile_width(plan, tile);
  float* scores = unit.scores + begin * plan.folded;
  if (keys > 0) {
    dispatch(p.dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* key = static_cast<const T*>(p.key) + unit.image * p.key_strides[0] +
                     unit.key_head * p.key_strides[1] + begin * p.key_strides[2];
      multiply_tile(plan.way, unit.queries, unit.folded, p.dim, key, p.key_strides[2], keys, scores,
                    width);
    });
  }
  const float scale = p.scale * kLog2E;
  float* peaks = unit.factors + tile * plan.lanes;
  for (int h = 0, r = 0; h < unit.heads; ++h) {
    const float* lse = p.lse + unit.image * p.lse_strides[0] +
                       (unit.first_head + h) * p.lse_strides[1] + unit.first_row * p.lse_strides[2];
    for (int t = 0; t < unit.rows; ++t, ++r) {
      peaks[r] = p.lse ? lse[t * p.lse_strides[2]] * kLog2E
                       : peak_of(scores + r * width, counts[t], scale);
    }
  }
  float* totals = unit.totals + tile * plan.lanes;
  for (int h = 0, r = 0; h < unit.heads; ++h) {
    for (int t = 0; t < unit.rows; ++t, ++r) {
      const float total = sum(exponentials(scores + r * width, counts[t], scale, peaks[r]));
      if (!p.lse) totals[r] = total;
    }
  }
}

// The share of a head in the mean.
float head_weight(const ScoreAttention& p, const Plan& plan) {
  if (p.reduce_heads == ScoreAttention::Heads::kNone) return 1.0f;
  return 1.0f /
         static_cast<float>(p.reduce_heads == ScoreAttention::Heads::kMean ? p.heads : plan.group);
}

// Peaks and sums of the tiles become the factors of their exponentials.
void find_factors(const ScoreAttention& p, const Plan& plan, const Unit& unit) {
  const Floats weight = splat(head_weight(p, plan));
  for (int64_t r = 0; r < unit.folded; r += kLanes) {
    Floats peak = splat(kLowest), total{};
    for (int64_t tile = 0; tile < plan.tiles && !p.lse; ++tile)
      peak = max(peak, load(unit.factors + tile * plan.lanes + r));
    for (int64_t tile = 0; tile < plan.tiles && !p.lse; ++tile) {
      total += load(unit.totals + tile * plan.lanes + r) *
               exp2(load(unit.factors + tile * plan.lanes + r) - peak);
    }
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      float* factor = unit.factors + tile * plan.lanes + r;
      store(factor, p.lse ? weight : exp2(load(factor) - peak) * (weight / total));
    }
  }
}

// What one image has in a wave towards one output: units first … last − 1 of the scratch, heads of
// one unit.
struct Segment {
  int64_t first, last, slots_ahead;  // slots_ahead: slot − unit
  int64_t first_head, last_head;
  bool begun, ended;  // no unit of it came in an earlier wave, none comes later
};

// attention[t][column … column + kColumns) of one row that sees `seen` keys, over the heads of a
// segment, added to `values`.
TK_INLINE void add_heads(const ScoreAttention& p, const Plan& plan, const Segment& segment,
                         int rows, int t, int64_t column, int64_t seen,
                         Floats (&values)[kColumnVectors]) {
  const int64_t tile = column / kTile, width = tile_width(plan, tile), left = seen - column;
  if (left <= 0) return;
  const float* unit = static_cast<const float*>(p.scratch) + segment.first * plan.unit_floats;
  for (int64_t slot = segment.first; slot < segment.last; ++slot, unit += plan.unit_floats) {
    const float* scores = unit + tile * kTile * plan.folded + column % kTile;
    const float* factors = unit + plan.factors_at + tile * plan.lanes;
    const int64_t end = smaller(segment.last_head, heads_of(plan, slot - segment.slots_ahead));
    for (int64_t h = segment.first_head; h < end; ++h) {
      const int64_t r = h * rows + t;
      if (left >= kColumns) {
        const float* ahead = scores + smaller(r + kRowsAhead, plan.folded - 1) * width;
        for (int v = 0; v < kColumnVectors; ++v) __builtin_prefetch(ahead + v * kLanes);
        for (int v = 0; v < kColumnVectors; ++v)
          values[v] += load(scores + r * width + v * kLanes) * factors[r];
      } else {
        const Ints last = splat_int(static_cast<int32_t>(left));
        for (int v = 0; v < kColumnVectors; ++v) {
          values[v] += select(iota() + v * kLanes < last,
                              load(scores + r * width + v * kLanes) * factors[r], Floats{});
        }
      }
    }
  }
}

// Adds (or takes the larger of) kColumns values to a row of the output; columns outside of it are
// dropped.
TK_INLINE void give(const ScoreAttention& p, const Floats (&values)[kColumnVectors], bool add,
                    int64_t column, float* out) {
  float buffer[kColumns];
  for (int v = 0; v < kColumnVectors; ++v) store(buffer + v * kLanes, values[v]);
  const int64_t begin = larger(column, p.first_column),
                end = smaller(column + kColumns, p.end_column);
  for (int64_t j = begin; j < end; ++j) {
    float& old = out[j - p.first_column];
    const float value = buffer[j - column];
    old = add ? old + value : value > old || value != value ? value : old;
  }
}

// The larger of both; a NaN stays.
TK_INLINE Floats top_of(Floats old, Floats value) {
  return select((value > old) | (value != value), value, old);
}

// Rows of one segment: Σ_t w_t Σ_h attention and max_t Σ_h attention into row `output` of the
// output.
void reduce_segment(const ScoreAttention& p, const Plan& plan, const Wave& wave,
                    const Segment& segment, int64_t outputs, int64_t output, int64_t column) {
  const Unit unit = unit_at(p, plan, wave, segment.first);
  float* carry = static_cast<float*>(p.scratch) + plan.wave_units * plan.unit_floats + column;
  const bool carried = plan.carry_floats > 0 && !segment.begun,
             carries = plan.carry_floats > 0 && !segment.ended;
  Floats sums[kColumnVectors] = {}, tops[kColumnVectors] = {};
  for (int t = 0; t < unit.rows; ++t) {
    const int64_t row = unit.first_row + t;
    const float weight =
        p.row_weights ? p.row_weights[unit.image * p.weight_strides[0] + row * p.weight_strides[1]]
                      : 1.0f;
    Floats values[kColumnVectors] = {};
    for (int v = 0; v < kColumnVectors && carried; ++v)
      values[v] = load(carry + t * plan.width + v * kLanes);
    add_heads(p, plan, segment, unit.rows, t, column, visible(p, unit.image, row), values);
    for (int v = 0; v < kColumnVectors; ++v) {
      if (carries) {
        store(carry + t * plan.width + v * kLanes, values[v]);
      } else {
        sums[v] += values[v] * weight;
        tops[v] = top_of(tops[v], values[v]);
      }
    }
  }
  if (carries) return;
  const int64_t columns = p.end_column - p.first_column, size = p.batch * outputs * columns;
  float* out = p.out + (unit.image * outputs + output) * columns;
  if (p.sum) give(p, sums, true, column, out);
  if (p.max) give(p, tops, false, column, out + (p.sum ? size : 0));
}

// kColumns columns of one image: every output that the wave contributes to, in order.
void reduce_columns(const ScoreAttention& p, const Plan& plan, const Wave& wave, int64_t image,
                    int64_t column) {
  const int64_t per_output = units_of_output(p, plan), end = wave.first_unit + wave.units;
  const int64_t slots = image * wave.units - wave.first_unit;
  for (int64_t begin = wave.first_unit; begin < end;) {
    const int64_t first = begin / per_output * per_output, last = smaller(end, first + per_output);
    Segment segment{slots + begin,
                    slots + last,
                    slots,
                    0,
                    plan.unit_heads,
                    begin == first,
                    last == first + per_output};
    const int64_t key_head = begin / plan.head_blocks % p.key_heads;
    begin = last;
    switch (p.reduce_heads) {
      case ScoreAttention::Heads::kMean:
        reduce_segment(p, plan, wave, segment, 1, 0, column);
        break;
      case ScoreAttention::Heads::kGroup:
        reduce_segment(p, plan, wave, segment, p.key_heads, key_head, column);
        break;
      case ScoreAttention::Heads::kNone: {
        const Unit unit = unit_at(p, plan, wave, segment.first);
        for (int h = 0; h < unit.heads; ++h) {
          segment.first_head = h;
          segment.last_head = h + 1;
          reduce_segment(p, plan, wave, segment, p.heads, unit.first_head + h, column);
        }
      }
    }
  }
}

void pack_queries(const ScoreAttention& p, const Plan& plan, const Unit& unit) {
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int r = 0; r < unit.folded; ++r) {
      const T* from = static_cast<const T*>(p.query) + unit.image * p.query_strides[0] +
                      (unit.first_head + r / unit.rows) * p.query_strides[1] +
                      (unit.first_row + r % unit.rows) * p.query_strides[2];
      pack_query(plan.way, from, r, unit.folded, p.dim, unit.queries);
    }
  });
}

// Many units: each is one piece of work. Few: their tiles are.
void score_units(const ScoreAttention& p, const Plan& plan, const Wave& wave, const Pool& pool) {
  const int64_t slots = wave.images * wave.units;
  const int64_t work = plan.folded * kTile * (p.dim / kLanes + 1);  // of a tile, in vectors
  const auto pack = [&](int64_t slot) { pack_queries(p, plan, unit_at(p, plan, wave, slot)); };
  const auto score = [&](int64_t slot, int64_t tile) {
    score_tile(p, plan, unit_at(p, plan, wave, slot), tile);
  };
  const auto finish = [&](int64_t slot) { find_factors(p, plan, unit_at(p, plan, wave, slot)); };
  if (slots >= 8 * pool.threads) {
    const int64_t grain = 1 + 60'000 / (work * plan.tiles);
    return parallel_for(pool, slots, grain, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        pack(slot);
        for (int64_t tile = 0; tile < plan.tiles; ++tile) score(slot, tile);
        finish(slot);
      }
    });
  }
  for (int64_t slot = 0; slot < slots; ++slot) pack(slot);
  const int64_t grain = 1 + 60'000 / work;
  parallel_for(pool, slots * plan.tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) score(i / plan.tiles, i % plan.tiles);
  });
  for (int64_t slot = 0; slot < slots; ++slot) finish(slot);
}

void run_wave(const ScoreAttention& p, const Plan& plan, const Wave& wave, const Pool& pool) {
  score_units(p, plan, wave, pool);
  const int64_t first = p.first_column / kColumns;
  const int64_t blocks = ceil_div(p.end_column, kColumns) - first;
  const int64_t grain = 1 + 4'000 / (wave.units * plan.folded * kColumnVectors * 3);
  parallel_for(pool, wave.images * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      reduce_columns(p, plan, wave, i / blocks, (first + i % blocks) * kColumns);
    }
  });
}

// One row of the output becomes the average over `pool` columns, zeros beyond both ends counted: in
// place, block by block.
void pool_row(float* row, int64_t columns, int64_t pool) {
  constexpr int kBlock = 1024;
  float window[kMaxPool + kBlock + kLanes];
  const int half = static_cast<int>(pool / 2);
  const float share = 1.0f / static_cast<float>(pool);
  std::memset(window, 0, sizeof window);
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    // window[i] holds the old value of column begin − half + i
    const int64_t ready = begin == 0 ? 0 : begin + half, end = begin + kBlock + half;
    const int old = begin == 0 ? half : 2 * half;
    if (begin > 0)
      std::memmove(window, window + kBlock, sizeof(float) * static_cast<size_t>(2 * half));
    for (int64_t j = ready; j < end; ++j) window[old + j - ready] = j < columns ? row[j] : 0.0f;
    for (int64_t j = begin; j < smaller(columns, begin + kBlock); j += kLanes) {
      Floats total{};
      for (int i = 0; i < pool; ++i) total += load(window + j - begin + i);
      store(row + j, total * share, static_cast<int>(smaller<int64_t>(kLanes, columns - j)));
    }
  }
}

}  // namespace

Status score_attention(const ScoreAttention& p, const Pool& pool) {
  if (check_values(p) != Status::kOk) return Status::kBadValue;
  const int64_t columns = p.end_column - p.first_column;
  if (p.batch == 0 || columns == 0) return Status::kOk;
  const Plan plan = plan_of(p);
  const int64_t outputs = p.reduce_heads == ScoreAttention::Heads::kMean    ? 1
                          : p.reduce_heads == ScoreAttention::Heads::kGroup ? p.key_heads
                                                                            : p.heads;
  const int64_t rows = (p.sum + p.max) * p.batch * outputs;
  std::memset(p.out, 0, sizeof(float) * static_cast<size_t>(rows * columns));
  for (int64_t image = 0; image < p.batch; image += plan.wave_images) {
    for (int64_t unit = 0; unit < plan.units; unit += plan.part_units) {
      run_wave(p, plan,
               {image, smaller(plan.wave_images, p.batch - image), unit,
                smaller(plan.part_units, plan.units - unit)},
               pool);
    }
  }
  if (p.pool == 1) return Status::kOk;
  parallel_for(pool, rows, 1 + 50'000 / (columns * p.pool / kLanes + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row)
                   pool_row(p.out + row * columns, columns, p.pool);
               });
  return Status::kOk;
}

int64_t score_attention_scratch(const ScoreAttention& p, int) {
  if (p.batch == 0 || p.end_column == p.first_column) return 0;
  const Plan plan = plan_of(p);
  return (plan.wave_units * plan.unit_floats + plan.carry_floats) *
         static_cast<int64_t>(sizeof(float));
}

}  // namespace tk::TK_ISA
