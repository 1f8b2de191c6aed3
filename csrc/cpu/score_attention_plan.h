// How score_attention cuts its work: an image into units (a block of rows of one key head), units
// into waves that fit the scratch. Nothing here but the number of images in a wave depends on the
// batch.
#pragma once

#include "cpu/query_key.h"

namespace tk::TK_ISA {
namespace {

constexpr int kColumnVectors = 4;
constexpr int kColumns = kColumnVectors * kLanes;  // columns summed up at once
constexpr int64_t kUnitRows = 256, kUnitFloats = int64_t{1} << 22;
// The scratch of a wave, in floats: an eighth of all scores of an image between the first two
// bounds; small images together up to the third.
constexpr int64_t kLeastWave = int64_t{1} << 16, kMostWave = int64_t{1} << 21;
constexpr int64_t kManyImages = int64_t{1} << 18;

// The cut, and where a unit keeps what in its scratch (offsets in floats).
struct Plan {
  int64_t group;                    // query heads of a key head
  int64_t tiles;                    // of keys
  int64_t width;                    // keys rounded up to kColumns
  int64_t unit_heads, head_blocks;  // query heads of a unit
  int64_t unit_rows, row_blocks;    // rows of a unit
  int64_t folded, lanes;            // unit_heads · unit_rows, rounded up to kLanes
  int64_t units;                    // of an image
  int64_t part_units;               // of them, those that a wave holds
  int64_t wave_images, wave_units;  // of a wave: several images, where it holds all units of one
  int64_t queries_at, factors_at, totals_at, unit_floats;
  int64_t carry_floats;  // head sums of unit_rows rows, where their maximum needs several waves
  Way way;
};

struct Unit {
  int64_t image, key_head, first_head, first_row;
  int heads, rows, folded;
  float *scores, *queries, *factors,
      *totals;  // [tile][folded][keys], packed, [tile][lanes], [tile][lanes]
};

struct Wave {
  int64_t first_image, images, first_unit, units;  // units first_unit … of each of its images
};

int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

// Units that make up one output: their heads are averaged.
int64_t units_of_output(const ScoreAttention& p, const Plan& plan) {
  if (p.reduce_heads == ScoreAttention::Heads::kNone) return 1;
  return plan.head_blocks * (p.reduce_heads == ScoreAttention::Heads::kMean ? p.key_heads : 1);
}

Plan plan_of(const ScoreAttention& p) {
  Plan plan{};
  plan.group = p.heads / p.key_heads;
  plan.tiles = ceil_div(p.keys, kTile);
  plan.width = round_up(p.keys, kColumns);
  const int64_t most = larger<int64_t>(1, smaller(kUnitRows, kUnitFloats / plan.width));
  plan.head_blocks = ceil_div(plan.group, smaller<int64_t>(most, 64));
  plan.unit_heads = ceil_div(plan.group, plan.head_blocks);
  plan.head_blocks = ceil_div(plan.group, plan.unit_heads);
  plan.row_blocks =
      ceil_div(p.rows, smaller<int64_t>(64, larger<int64_t>(1, most / plan.unit_heads)));
  plan.unit_rows = ceil_div(p.rows, plan.row_blocks);
  plan.row_blocks = ceil_div(p.rows, plan.unit_rows);
  plan.folded = plan.unit_heads * plan.unit_rows;
  plan.lanes = round_up(plan.folded, kLanes);
  plan.way = way_of(p.dtype, plan.folded, p.dim);
  plan.units = plan.row_blocks * p.key_heads * plan.head_blocks;
  plan.queries_at = plan.folded * plan.width;
  plan.factors_at = plan.queries_at + packed_floats(plan.folded, p.dim);
  plan.totals_at = plan.factors_at + plan.tiles * plan.lanes;
  plan.unit_floats = plan.totals_at + (p.lse ? 0 : plan.tiles * plan.lanes);
  const int64_t image_floats = plan.units * plan.unit_floats;
  const int64_t budget = smaller(kMostWave, larger(kLeastWave, image_floats / 8));
  plan.part_units = smaller(plan.units, larger<int64_t>(1, budget / plan.unit_floats));
  const bool whole = plan.part_units == plan.units;
  plan.wave_images = whole ? smaller(p.batch, larger<int64_t>(1, kManyImages / image_floats)) : 1;
  plan.wave_units = plan.part_units * plan.wave_images;
  if (p.max && !whole && units_of_output(p, plan) > 1)
    plan.carry_floats = plan.unit_rows * plan.width;
  return plan;
}

// Query heads of a unit.
TK_INLINE int64_t heads_of(const Plan& plan, int64_t unit) {
  return smaller(plan.unit_heads, plan.group - unit % plan.head_blocks * plan.unit_heads);
}

// The unit in place `slot` of the scratch of a wave.
TK_INLINE Unit unit_at(const ScoreAttention& p, const Plan& plan, const Wave& wave, int64_t slot) {
  const int64_t index = wave.first_unit + slot % wave.units, head_block = index % plan.head_blocks;
  const int64_t row_block = index / (plan.head_blocks * p.key_heads);
  Unit unit;
  unit.image = wave.first_image + slot / wave.units;
  unit.key_head = index / plan.head_blocks % p.key_heads;
  unit.first_head = unit.key_head * plan.group + head_block * plan.unit_heads;
  unit.first_row = row_block * plan.unit_rows;
  unit.heads = static_cast<int>(heads_of(plan, index));
  unit.rows = static_cast<int>(smaller(plan.unit_rows, p.rows - unit.first_row));
  unit.folded = unit.heads * unit.rows;
  unit.scores = static_cast<float*>(p.scratch) + slot * plan.unit_floats;
  unit.queries = unit.scores + plan.queries_at;
  unit.factors = unit.scores + plan.factors_at;
  unit.totals = unit.scores + plan.totals_at;
  return unit;
}

// The number of keys that a row sees: always the first ones.
TK_INLINE int64_t visible(const ScoreAttention& p, int64_t image, int64_t row) {
  const int64_t length = p.key_lengths ? p.key_lengths[image * p.length_stride] : p.keys;
  if (!p.causal) return length;
  const int64_t position =
      p.positions ? p.positions[image * p.position_strides[0] + row * p.position_strides[1]]
                  : length - p.rows + row;
  return larger<int64_t>(0, smaller(length - 1, position) + 1);
}

TK_INLINE int tile_width(const Plan& plan, int64_t tile) {
  return static_cast<int>(smaller<int64_t>(kTile, plan.width - tile * kTile));
}

}  // namespace
}  // namespace tk::TK_ISA
