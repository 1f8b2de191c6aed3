// The softmax of each row of score_attention without its values: highest logit and sum of
// exponentials over each split of the keys; and how the splits are joined.
#pragma once

#include "cuda/score_tiles.cuh"

namespace tk::cuda::score {

// The softmax over two sets of keys.
__device__ inline SplitSoftmax join(const SplitSoftmax& a, const SplitSoftmax& b) {
  const float peak = fmaxf(a.peak, b.peak), shift = peak == -INFINITY ? 0.0f : peak;
  return {peak, a.total * exp2_flushed(a.peak - shift) + b.total * exp2_flushed(b.peak - shift)};
}

// One line of one lane's keys, before the logits get their factor.
struct LaneSoftmax {
  float highest, total;
};

// Takes in the logits of one line: the `side`-th half of each sum.
template <int J>
__device__ void take_logits(LaneSoftmax& softmax, const float (&sums)[J][4], int half,
                            float factor) {
  const bool rising = factor > 0;
  const float none = rising ? -INFINITY : INFINITY;
  float highest = softmax.highest;
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float logit = sums[j][2 * half + side];
      highest = rising ? fmaxf(highest, logit) : fminf(highest, logit);
    }
  // Rounded as the highest before was: else what is left of it, not 0, is added up block by block.
  const float shift = highest == none ? 0.0f : rounded_product(highest, factor);
  float total = 0;
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int side = 0; side < 2; ++side)
      total += exp2_flushed(sums[j][2 * half + side] * factor - shift);
  const float before = rounded_product(softmax.highest, factor);
  softmax.total = softmax.total * exp2_flushed(before - shift) + total;
  softmax.highest = highest;
}

// Peaks and sums of a tile of lines over `blocks_each` blocks of keys. The longest rows come first.
template <class T>
__device__ void measure_tile(const ScoreJob& job) {
  constexpr int I = kWarpLines / 16, J = kWarpKeys<T> / 8;
  const ScoreAttention& p = job.p;
  const ScoreTile& tile = job.tile;
  auto number = static_cast<uint32_t>(block());
  const int split = take(number, job.splits * job.cluster);
  const int row_block = tile.row_blocks - 1 - take(number, tile.row_blocks);
  const int head_tile = take(number, tile.head_tiles);
  const int key_head = take(number, static_cast<int>(p.key_heads));
  const int64_t image = number;
  const int stride = tile_stride<T>(1 << tile.depth_shift), keys = tile.keys<T>();
  Arena arena;
  T* line_tiles = arena.shared<T>(tile.line_slots * tile.lines() * stride);
  T* key_tiles = arena.shared<T>(tile.key_slots * keys * stride);
  auto* joined = arena.shared<SplitSoftmax>(tile.lines() << tile.key_shift);

  const int length = length_of(p, image);
  const int last_row = ((row_block + 1) << tile.rows_shift) - 1;
  const int most = p.causal && p.positions == nullptr && last_row < p.rows
                       ? seen_by(p, image, last_row, length)
                       : length;
  const int first = split * job.blocks_each * keys, behind = first + job.blocks_each * keys;
  const int last = behind < most ? behind : most;
  int seen[I][2];
  LaneSoftmax softmax[I][2];
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LinePlace place =
          place_of(job, line_warp(job) * kWarpLines + 16 * i + 8 * half + lane() / 4, key_head,
                   head_tile, row_block);
      const int sees = place.here ? seen_by(p, image, place.row, length) : 0;
      seen[i][half] = sees < last ? sees : last;
      softmax[i][half] = {job.factor > 0 ? -INFINITY : INFINITY, 0.0f};
    }

  int fetch_key = first, fetch_part = 0, fetch_slot = 0;
  const auto fetch = [&](int) {
    const int line_slot = tile.line_slots == 1 ? 0 : fetch_slot;
    if (tile.line_slots > 1 || fetch_key == first)
      fetch_lines(job, line_tiles + line_slot * tile.lines() * stride, image, key_head, head_tile,
                  row_block, fetch_part);
    fetch_keys(job, key_tiles + fetch_slot * keys * stride, image, key_head, fetch_key, 0, last,
               fetch_part);
    if (++fetch_slot == tile.key_slots) fetch_slot = 0;
    if (++fetch_part < tile.chunks) return;
    fetch_part = 0;
    fetch_key += keys;
  };

  Logits<T> sums = {};
  int key = first + key_warp(job) * kWarpKeys<T>, part = 0, slot = 0;
  const int blocks = last > first ? (last - first + keys - 1) / keys : 0;
  run_steps(
      tile.stages, blocks * tile.chunks, fetch, [] {},
      [&](int) {
        const int line_slot = tile.line_slots == 1 ? 0 : slot;
        const bool some =
            any(seen[0][0] > key || seen[0][1] > key || seen[1][0] > key || seen[1][1] > key);
        if (some)
          add_logits<T>(job, sums, line_tiles + line_slot * tile.lines() * stride,
                        key_tiles + slot * keys * stride, part);
        if (++slot == tile.key_slots) slot = 0;
        if (++part < tile.chunks) return;
        part = 0;
#pragma unroll
        for (int i = 0; i < I; ++i) {
          if (!any(seen[i][0] > key || seen[i][1] > key)) continue;
          const int beyond = key + kWarpKeys<T>;
          if (any(seen[i][0] < beyond || seen[i][1] < beyond)) {
            const float none = job.factor > 0 ? -INFINITY : INFINITY;
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
              for (int v = 0; v < 4; ++v) {
                const int column = key + 8 * j + lane() % 4 * 2 + v % 2;
                if (column >= seen[i][v / 2]) sums[i][j][v] = none;
              }
          }
#pragma unroll
          for (int half = 0; half < 2; ++half)
            take_logits<J>(softmax[i][half], sums[i], half, job.factor);
        }
        clear(sums);
        key += keys;
      });

  const float none = job.factor > 0 ? -INFINITY : INFINITY;
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LaneSoftmax& mine = softmax[i][half];
      SplitSoftmax all{mine.highest == none ? -INFINITY : mine.highest * job.factor, mine.total};
      all = join(all, shuffle_xor(all, 1));
      all = join(all, shuffle_xor(all, 2));
      const int line = line_warp(job) * kWarpLines + 16 * i + 8 * half + lane() / 4;
      if (lane() % 4 == 0) joined[(line << tile.key_shift) + key_warp(job)] = all;
    }
  sync();
  const int shift = tile.key_shift;
  for (int line = thread(); line < tile.lines(); line += threads()) {
    SplitSoftmax all = joined[line << shift];
    for (int k = 1; k < 1 << shift; ++k) all = join(all, joined[(line << shift) + k]);
    joined[line << shift] = all;
  }
  if (job.cluster > 1) sync_cluster();
  const int step = threads() * job.cluster;
  for (int line = cluster_rank() * threads() + thread(); line < tile.lines(); line += step) {
    const LinePlace place = place_of(job, line, key_head, head_tile, row_block);
    if (!place.here) continue;
    SplitSoftmax shares[kMostCluster];
#pragma unroll
    for (int rank = 0; rank < kMostCluster; ++rank)
      if (rank < job.cluster) shares[rank] = shared_of(joined, rank)[line << shift];
    SplitSoftmax all = shares[0];
#pragma unroll
    for (int rank = 1; rank < kMostCluster; ++rank)
      if (rank < job.cluster) all = join(all, shares[rank]);
    job.softmax[((image * p.heads + place.head) * p.rows + place.row) * job.splits +
                split / job.cluster] = all;
  }
  if (job.cluster > 1) sync_cluster();
}

}  // namespace tk::cuda::score
