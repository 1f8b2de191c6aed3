// How score_attention is cut into tiles, splits and shares: by the shape without the batch.
#pragma once

#include "cuda/score_block.cuh"

namespace tk::cuda::score {

constexpr int64_t kMostPooled = 63;       // columns averaged in the launch that scores them
constexpr int64_t kNeverShared = 64;      // rows that are not shared out
constexpr int kMostShares = 16;           // of the rows of a block of keys
constexpr int kMostSplits = 48;           // of the keys of a tile of rows
constexpr int64_t kPlaces = 384;          // three blocks on each of 128 multiprocessors
constexpr int64_t kInOrderBelow = 40;     // elements of float32 rows: there tensor cores err more
constexpr int64_t kMostKept = 1024;       // lines that are found once
constexpr int64_t kRoomy = 75 * 1024;     // bytes of shared memory that leave room for three blocks
constexpr int64_t kMostRoom = 99 * 1024;  // that every GPU since sm_80 has

inline int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int log_of(int64_t n) {  // of the next power of two
  int log = 0;
  while (int64_t{1} << log < n) ++log;
  return log;
}

inline int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

inline int64_t lines_of(const ScoreAttention& p) {  // of the output of an image
  using Heads = ScoreAttention::Heads;
  return p.reduce_heads == Heads::kMean    ? 1
         : p.reduce_heads == Heads::kGroup ? p.key_heads
                                           : p.heads;
}

// Whether rows of a block of keys may be shared out, which takes one more launch.
inline bool may_share(const ScoreAttention& p) {
  return p.reduce_heads != ScoreAttention::Heads::kNone && p.rows > kNeverShared;
}

// What both passes share.
template <class T>
ScoreJob job_of(const ScoreAttention& p) {
  ScoreJob job{};
  job.p = p;
  job.group = static_cast<int>(p.heads / p.key_heads);
  const float factor = p.scale * kLog2E;
  job.factor = factor != 0 ? factor : 0x1p-100f;
  job.in_order = sizeof(T) == 4 && p.dim < kInOrderBelow;
  job.wide = true;
  for (int i = 0; i < 3; ++i)
    job.wide = job.wide && fetches_wide<T>(p.query, p.query_strides[i], p.dim) &&
               fetches_wide<T>(p.key, p.key_strides[i], p.dim);
  job.splits = job.cluster = job.parts = job.units = job.tiles_each = 1;
  return job;
}

// Lays rows and heads out in the lines of a tile; `one_head`: rows of one head only.
inline void lay_lines(ScoreJob& job, bool one_head, int least_rows) {
  ScoreTile& tile = job.tile;
  const int lines = tile.line_shift + kWarpLinesShift, rows = log_of(job.p.rows);
  tile.rows_shift = rows < least_rows ? least_rows : least(rows, lines);
  tile.heads = one_head ? 1 : least(int64_t{1} << (lines - tile.rows_shift), job.group);
  tile.head_tiles = static_cast<int>(quotient(job.group, tile.heads));
  tile.row_blocks = static_cast<int>(quotient(job.p.rows, int64_t{1} << tile.rows_shift));
}

template <class T>
int64_t tile_bytes(const ScoreTile& tile) {
  const int64_t stride = tile_stride<T>(1 << tile.depth_shift);
  const int64_t keys = tile.keys<T>() << tile.head_shift;
  return shared_bytes<T>(tile.line_slots * tile.lines() * stride) +
         shared_bytes<T>(tile.key_slots * keys * stride);
}

template <class T>
int64_t measure_bytes(const ScoreJob& job) {
  return tile_bytes<T>(job.tile) +
         shared_bytes<SplitSoftmax>(job.tile.lines() << job.tile.key_shift);
}

template <class T>
int64_t score_bytes(const ScoreJob& job) {
  const int keys = job.tile.keys<T>(), results = job.p.sum + job.p.max;
  return tile_bytes<T>(job.tile) + shared_bytes<Line>(line_count(job)) +
         shared_bytes<Cursor>(kMostStages) +
         shared_bytes<float>(results * joined_rows(job, keys) * keys) +
         shared_bytes<float>(stage_floats(job, keys));
}

// How much of a row goes at a time, and in how many steps it is asked for ahead: as much as leaves
// room for as many blocks as there are. float32 goes by 32 always, so that both passes add in the
// same order; else nothing of this changes a bit.
template <class T, class Bytes>
void lay_depth(ScoreJob& job, int64_t line_tiles, int64_t key_tiles, int64_t blocks,
               const Bytes& bytes) {
  constexpr int least_shift = sizeof(T) == 4 ? 3 : 4, most_shift = sizeof(T) == 4 ? 5 : 7;
  ScoreTile& tile = job.tile;
  const int whole = log_of(job.p.dim);
  const int64_t each = quotient(blocks, multiprocessors());  // on a multiprocessor
  const int64_t half = most_shared() / 2 - 1024;
  const int64_t room = each == 1 ? most_shared() : each == 2 && half > kRoomy ? half : kRoomy;
  const int64_t two = half > kMostRoom ? half : kMostRoom, most = room > two ? room : two;
  tile.depth_shift = whole < least_shift ? least_shift : least(whole, most_shift);
  for (;; --tile.depth_shift) {
    tile.chunks = static_cast<int>(quotient(job.p.dim, int64_t{1} << tile.depth_shift));
    for (tile.stages = kMostStages; tile.stages >= 2; --tile.stages) {
      tile.line_slots = line_tiles * tile.chunks > 1 ? tile.stages : 1;
      tile.key_slots = key_tiles * tile.chunks > 1 ? tile.stages : 1;
      if (bytes(job) <= (tile.stages > 2 ? room : most)) return;
    }
  }
}

// Splits the blocks of keys of a tile of lines, so that there is work for all; a cluster of blocks
// that share a split join what they found, as the second pass would have to for every tile.
inline void lay_splits(ScoreJob& job, int64_t tiles, int64_t blocks, int most_cluster) {
  const int64_t wanted = kPlaces / tiles;
  job.blocks_each = static_cast<int>(quotient(blocks, wanted < 1 ? 1 : least(wanted, kMostSplits)));
  const int64_t splits = quotient(blocks, job.blocks_each);
  const auto spare = [&] { return quotient(splits, job.cluster) * job.cluster - splits; };
  job.cluster = most_cluster;
  while (job.cluster > 1 && (job.cluster > splits || spare() > splits / 8)) job.cluster /= 2;
  job.splits = static_cast<int>(quotient(splits, job.cluster));
}

// The first pass.
template <class T>
ScoreJob measuring_of(const ScoreAttention& p, int most_cluster) {
  ScoreJob job = job_of<T>(p);
  ScoreTile& tile = job.tile;
  const int64_t folded = (int64_t{1} << log_of(p.rows)) * job.group;
  tile.line_shift = folded > 64 ? 2 : folded > 32 ? 1 : 0;
  tile.key_shift = 2 - tile.line_shift;
  while (tile.key_shift > 0 && tile.keys<T>() / 2 >= p.keys) --tile.key_shift;
  lay_lines(job, false, 0);
  const int64_t tiles = p.key_heads * tile.head_tiles * tile.row_blocks;
  lay_splits(job, tiles, quotient(p.keys, tile.keys<T>()), most_cluster);
  lay_depth<T>(job, 1, job.blocks_each, p.batch * tiles * job.splits * job.cluster,
               measure_bytes<T>);
  return job;
}

inline int64_t softmax_bytes(const ScoreJob& job) {
  const ScoreAttention& p = job.p;
  return quotient(p.batch * p.heads * p.rows * job.splits * int64_t{sizeof(SplitSoftmax)}, 16) * 16;
}

template <class T>
void lay_keys(ScoreJob& job) {
  const int64_t columns = job.p.end_column - job.p.first_column;
  job.own = job.tile.keys<T>() - 2 * job.reach;
  job.key_tiles = static_cast<int>(quotient(columns, job.own));
}

// Rows, heads and keys of a block: wide tiles of keys, but where that leaves places empty narrower
// ones, beside which more lines or more key heads find room.
template <class T>
void lay_score(ScoreJob& job) {
  using Heads = ScoreAttention::Heads;
  const ScoreAttention& p = job.p;
  ScoreTile& tile = job.tile;
  const bool apart = job.flow == ScoreFlow::kApart;
  const bool one_head = p.reduce_heads == Heads::kNone && !apart;
  const int least_rows = apart ? 1 : 0;
  const int64_t rows = int64_t{1} << log_of(p.rows > least_rows ? p.rows : 2);
  const int64_t folded = one_head ? rows : rows * job.group;
  const int64_t least_keys = p.pool <= 16 || job.reach == 0 ? 1 : 2 * p.pool;
  const bool many = p.reduce_heads == Heads::kMean && p.key_heads > 1;  // tiles of lines
  tile.line_shift = folded <= 32 ? 0 : folded > 64 && folded <= 128 && !many ? 2 : 1;
  tile.key_shift = 2 - tile.line_shift;
  for (; tile.keys<T>() < least_keys; ++tile.key_shift)
    if (tile.line_shift > 0) --tile.line_shift;
  for (;;) {
    lay_lines(job, one_head, least_rows);
    lay_keys<T>(job);
    job.units = p.reduce_heads == Heads::kMean ? 1 : static_cast<int>(p.key_heads);
    if (p.reduce_heads == Heads::kNone) job.units *= tile.head_tiles;
    const int shares = may_share(p) ? least(tile.row_blocks, kMostShares) : 1;
    const bool empty = int64_t{job.units} * job.key_tiles * shares < kPlaces * 2 / 3;
    if (!empty || tile.key_shift == 0 || tile.keys<T>() / 2 < least_keys) return;
    --tile.key_shift;
    if (folded > kWarpLines << tile.line_shift)
      ++tile.line_shift;
    else if (p.reduce_heads == Heads::kMean && p.key_heads >= 2 << tile.head_shift)
      ++tile.head_shift;
  }
}

// The second pass.
template <class T>
ScoreJob scoring_of(const ScoreAttention& p) {
  using Heads = ScoreAttention::Heads;
  ScoreJob job = job_of<T>(p);
  ScoreTile& tile = job.tile;
  const int64_t averaged = p.reduce_heads == Heads::kMean    ? p.heads
                           : p.reduce_heads == Heads::kGroup ? job.group
                                                             : 1;
  job.share = 1.0f / static_cast<float>(averaged);
  job.flow = p.max && averaged > 1                                    ? ScoreFlow::kMeanFirst
             : p.reduce_heads == Heads::kNone && p.rows <= kWarpLines ? ScoreFlow::kApart
             : p.max                                                  ? ScoreFlow::kMaxima
                                                                      : ScoreFlow::kSums;
  job.reach = p.pool <= kMostPooled ? static_cast<int>(p.pool / 2) : 0;
  lay_score<T>(job);
  job.row_blocks_each = tile.row_blocks;
  if (may_share(p)) {
    const int64_t wanted = 3 * kPlaces / (int64_t{job.units} * job.key_tiles);
    job.row_blocks_each =
        static_cast<int>(quotient(tile.row_blocks, wanted < 1 ? 1 : least(wanted, kMostShares)));
    job.parts = static_cast<int>(quotient(tile.row_blocks, job.row_blocks_each));
    if (job.parts > 1) job.reach = 0;
    lay_keys<T>(job);
  }
  const int64_t steps =
      p.reduce_heads == Heads::kMean ? quotient(p.key_heads, 1 << tile.head_shift) : 1;
  const int64_t head_tiles = p.reduce_heads == Heads::kNone ? 1 : tile.head_tiles;
  const int64_t line_tiles = steps * head_tiles * job.row_blocks_each;
  const int64_t lines = line_tiles * tile.lines();
  job.kept_lines = lines <= kMostKept ? static_cast<int>(lines) : 0;
  if (line_tiles == 1) {
    const int64_t each = int64_t{job.units} * job.key_tiles / kPlaces;
    job.tiles_each = each < 1 ? 1 : least(each, job.key_tiles);
  }
  const int64_t blocks = p.batch * job.units * job.parts * quotient(job.key_tiles, job.tiles_each);
  lay_depth<T>(job, line_tiles, steps * job.tiles_each, blocks, score_bytes<T>);
  if (job.kept_lines > 0 && tile.chunks > 1) {  // where they take the room of longer chunks
    ScoreJob other = job;
    other.kept_lines = 0;
    lay_depth<T>(other, line_tiles, steps * job.tiles_each, blocks, score_bytes<T>);
    if (other.tile.chunks < tile.chunks) return other;
  }
  return job;
}

// Whether scores are written as they are.
inline bool is_direct(const ScoreJob& job) { return job.parts == 1 && job.p.pool <= kMostPooled; }

inline int64_t share_bytes(const ScoreJob& job) {
  const ScoreAttention& p = job.p;
  return int64_t{job.parts} * (p.sum + p.max) * p.batch * lines_of(p) *
         (p.end_column - p.first_column) * int64_t{sizeof(float)};
}

}  // namespace tk::cuda::score
