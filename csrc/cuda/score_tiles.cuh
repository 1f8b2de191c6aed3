// What both passes of score_attention share: how rows and keys lie in tiles, what each row sees,
// how tiles are fetched and multiplied.
//
// A warp multiplies 32 lines, rows of one or several heads that read the same key head, with
// kWarpKeys keys; its block has so many warps along the lines, along the keys and along key heads.
// Rows are the left operand in both passes, and terms are added in the same order, so that both
// compute the same logits to the last bit: a row that sees one key gives it exactly 1.
#pragma once

#include "cuda/product.cuh"

namespace tk::cuda::score {

constexpr int kWarpLinesShift = 5, kWarpLines = 1 << kWarpLinesShift;
constexpr int kScoreWarps = 4;  // of a block, at most
constexpr int kMostStages = 4, kMostCluster = 8;
constexpr float kLog2E = 1.44269504088896341f;

template <class T>
constexpr int kWarpKeysShift = sizeof(T) == 2 ? 6 : 5;
template <class T>
constexpr int kWarpKeys = 1 << kWarpKeysShift<T>;

// The logits of a warp's tile, as product.cuh lays them out.
template <class T>
using Logits = float[kWarpLines / 16][kWarpKeys<T> / 8][4];

template <int I, int J>
__device__ void clear(float (&sums)[I][J][4]) {
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int v = 0; v < 4; ++v) sums[i][j][v] = 0;
}

// How a block is laid out.
struct ScoreTile {
  int line_shift, head_shift, key_shift;  // 2^line_shift warps along the lines, and so on
  int rows_shift;                         // a tile has 2^rows_shift rows
  int heads;                              // of each of so many heads of a group
  int head_tiles, row_blocks;
  int depth_shift, chunks;  // 2^depth_shift elements of a row at a time, in so many chunks
  int stages, line_slots, key_slots;

  __host__ __device__ int warps() const { return 1 << (line_shift + head_shift + key_shift); }
  __host__ __device__ int lines() const { return kWarpLines << (line_shift + head_shift); }
  template <class T>
  __host__ __device__ int keys() const {  // of each key head
    return kWarpKeys<T> << key_shift;
  }
};

// The softmax of a row over one split of the keys: its highest logit, to base 2, and the sum of the
// exponentials relative to it.
struct SplitSoftmax {
  float peak, total;
};

// How a block comes from attention to columns.
enum class ScoreFlow : int32_t {
  kSums,       // in registers
  kMaxima,     // these too, of single heads
  kMeanFirst,  // heads are averaged in shared memory before a maximum
  kApart       // several heads lie in a warp, each with results of its own
};

struct ScoreJob {
  ScoreAttention p;
  ScoreTile tile;
  int group;
  float factor;           // of the logits, to base 2; not zero, so that infinity stays infinite
  bool in_order;          // float32 is summed up as it lies: where tensor cores err more
  bool wide;              // rows can be fetched 16 bytes at a time
  SplitSoftmax* softmax;  // (B, H, R, splits)
  int splits, blocks_each;
  int cluster;  // blocks that join their shares of a split
  // Of the second pass:
  ScoreFlow flow;
  float share;  // of a head in its mean
  int units, parts, row_blocks_each;
  int reach;  // keys on either side that are scored for the average of others
  int own, key_tiles, tiles_each;
  int kept_lines;  // what turns logits into attention is found once for so many lines, or per tile
  float* out;      // (parts, results, B, lines, columns)
};

// Where this warp's tile lies among those of its block: along the keys, and along the lines of all
// its key heads.
__device__ inline int key_warp(const ScoreJob& job) {
  return warp() & ((1 << job.tile.key_shift) - 1);
}
__device__ inline int line_warp(const ScoreJob& job) { return warp() >> job.tile.key_shift; }

// The keys that an image has; none where its length is not allowed.
__device__ inline int length_of(const ScoreAttention& p, int64_t image) {
  if (p.key_lengths == nullptr) return static_cast<int>(p.keys);
  const int64_t given = p.key_lengths[image * p.length_stride];
  return given >= 0 && given <= p.keys ? static_cast<int>(given) : 0;
}

// The keys that a row sees: always the first ones.
__device__ inline int seen_by(const ScoreAttention& p, int64_t image, int row, int length) {
  if (!p.causal) return length;
  const int64_t position =
      p.positions == nullptr
          ? length - p.rows + row
          : p.positions[image * p.position_strides[0] + row * p.position_strides[1]];
  if (position < 0) return 0;
  return position < length ? static_cast<int>(position) + 1 : length;
}

// Divides `number` by `by`, and gives the rest.
__device__ inline int take(uint32_t& number, int by) {
  const uint32_t whole = number / static_cast<uint32_t>(by);
  const int rest = static_cast<int>(number - whole * static_cast<uint32_t>(by));
  number = whole;
  return rest;
}

// Which row of which head a line is; whether there is one.
struct LinePlace {
  int64_t head;
  int row;
  bool here;
};

__device__ inline LinePlace place_of(const ScoreJob& job, int line, int key_head, int head_tile,
                                     int row_block) {
  const int of_tile = line >> job.tile.rows_shift;
  const int of_group = head_tile * job.tile.heads + of_tile;
  const int row = (row_block << job.tile.rows_shift) + (line & ((1 << job.tile.rows_shift) - 1));
  const bool here = of_tile < job.tile.heads && of_group < job.group && row < job.p.rows &&
                    key_head < job.p.key_heads;
  return {static_cast<int64_t>(key_head) * job.group + of_group, row, here};
}

// Asks for one chunk of a row at a time, element by element: row(r) gives its address, or null for
// zeros; `columns` of it are there.
template <class T, class Row>
__device__ void fetch_narrow(const ScoreJob& job, T* tile, int rows, int64_t columns,
                             const Row& row) {
  const int shift = job.tile.depth_shift, stride = tile_stride<T>(1 << shift);
  for (int at = thread(); at < rows << shift; at += threads()) {
    const int r = at >> shift, c = at & ((1 << shift) - 1);
    const T* from = row(r);
    const bool there = from != nullptr && c < columns;
    if constexpr (sizeof(T) == 4)
      copy_async<4>(tile + r * stride + c, there ? from + c : job.p.key, there);
    else
      tile[r * stride + c] = there ? from[c] : T{};
  }
}

// Which 16 bytes of which rows of a chunk a thread asks for: of every `step`-th from `row` on.
template <class T>
struct WideShare {
  int column, row, step;
  bool there;

  __device__ WideShare(const ScoreJob& job, int64_t columns) {
    const int across = job.tile.depth_shift - (sizeof(T) == 2 ? 3 : 2);
    column = (thread() & ((1 << across) - 1)) * (16 / static_cast<int>(sizeof(T)));
    row = thread() >> across;
    step = threads() >> across;
    there = column < columns;
  }
};

// The lines of a tile, from chunk `chunk` on, into a slot. Their addresses are walked along, as
// much of the arithmetic of a step would else be theirs.
template <class T>
__device__ void fetch_lines(const ScoreJob& job, T* slot, int64_t image, int key_head,
                            int head_tile, int row_block, int chunk) {
  const ScoreAttention& p = job.p;
  const int64_t of_head = p.query_strides[1], of_row = p.query_strides[2];
  const int at = chunk << job.tile.depth_shift, each = kWarpLines << job.tile.line_shift;
  const int shift = job.tile.rows_shift, mask = (1 << shift) - 1;
  const T* query = static_cast<const T*>(p.query) + image * p.query_strides[0] + at;
  if (!job.wide) {
    return fetch_narrow(job, slot, job.tile.lines(), p.dim - at, [&](int line) -> const T* {
      const int apart = line >> (kWarpLinesShift + job.tile.line_shift);
      const LinePlace place =
          place_of(job, line & (each - 1), key_head + apart, head_tile, row_block);
      return place.here ? query + place.head * of_head + place.row * of_row : nullptr;
    });
  }
  const WideShare<T> share(job, p.dim - at);
  const int stride = tile_stride<T>(1 << job.tile.depth_shift);
  const bool along = share.step <= mask;  // rows before heads
  const int64_t step = along ? share.step * of_row : (share.step >> shift) * of_head;
  const int64_t wrap = of_head - (int64_t{1} << shift) * of_row;
  const int64_t rows_left = p.rows - (int64_t{row_block} << shift);
  const int left = job.group - head_tile * job.tile.heads;
  for (int apart = 0; apart < 1 << job.tile.head_shift; ++apart, ++key_head) {
    const bool there = share.there && key_head < p.key_heads;
    const int heads = !there ? 0 : left < job.tile.heads ? left : job.tile.heads;
    const int64_t head = int64_t{key_head} * job.group + head_tile * job.tile.heads;
    const T* from = query + (head + (share.row >> shift)) * of_head +
                    ((int64_t{row_block} << shift) + (share.row & mask)) * of_row + share.column;
    T* to = slot + (apart * each + share.row) * stride + share.column;
    for (int line = share.row; line < each; line += share.step, to += share.step * stride) {
      const bool here = line >> shift < heads && (line & mask) < rows_left;
      copy_async<16>(to, here ? from : query, here);
      from += step;
      if (along && (line & mask) + share.step > mask) from += wrap;
    }
  }
}

// The keys [first, first + …) of each of 2^head_shift key heads, as far as they are in [begin,
// end).
template <class T>
__device__ void fetch_keys(const ScoreJob& job, T* slot, int64_t image, int key_head, int first,
                           int begin, int end, int chunk) {
  const ScoreAttention& p = job.p;
  const int64_t of_head = p.key_strides[1], of_key = p.key_strides[2];
  const int at = chunk << job.tile.depth_shift, each = job.tile.keys<T>();
  const T* key = static_cast<const T*>(p.key) + image * p.key_strides[0] + at;
  if (!job.wide) {
    const int shift = kWarpKeysShift<T> + job.tile.key_shift;
    return fetch_narrow(job, slot, each << job.tile.head_shift, p.dim - at, [&](int r) -> const T* {
      const int apart = r >> shift, number = first + (r & (each - 1)), head = key_head + apart;
      const bool there = number >= begin && number < end && head < p.key_heads;
      return there ? key + head * of_head + number * of_key : nullptr;
    });
  }
  const WideShare<T> share(job, p.dim - at);
  const int stride = tile_stride<T>(1 << job.tile.depth_shift);
  const int64_t step = share.step * of_key;
  for (int apart = 0; apart < 1 << job.tile.head_shift; ++apart, ++key_head) {
    const int last = share.there && key_head < p.key_heads ? end : begin;
    const T* from = key + key_head * of_head + (int64_t{first} + share.row) * of_key + share.column;
    T* to = slot + (apart * each + share.row) * stride + share.column;
    for (int r = share.row; r < each; r += share.step, to += share.step * stride, from += step) {
      const bool here = first + r >= begin && first + r < last;
      copy_async<16>(to, here ? from : key, here);
    }
  }
}

// sums += lines · keysᵀ on the cores that round as float32 does, term by term.
template <int I, int J>
__device__ void add_product_in_order(float (&sums)[I][J][4], const float* lines, const float* keys,
                                     int stride, int depth) {
  using V = Vector<float, 4>;
  lines += lane() / 4 * stride;
  keys += lane() % 4 * 2 * stride;
#pragma unroll 1
  for (int term = 0; term < depth; term += 4) {
    V left[I][2];
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        left[i][half] = load<V>(lines + (16 * i + 8 * half) * stride + term);
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const V right = load<V>(keys + (8 * j + side) * stride + term);
#pragma unroll
        for (int i = 0; i < I; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < 4; ++k)
              sums[i][j][2 * half + side] += left[i][half].at[k] * right.at[k];
      }
  }
}

// The products of this warp's lines and keys, of one chunk.
template <class T>
__device__ void add_logits(const ScoreJob& job, Logits<T>& sums, const T* lines, const T* keys,
                           int chunk) {
  const int stride = tile_stride<T>(1 << job.tile.depth_shift);
  const int64_t left = job.p.dim - (chunk << job.tile.depth_shift);
  const int depth =
      left >> job.tile.depth_shift > 0 ? 1 << job.tile.depth_shift : static_cast<int>(left);
  lines += line_warp(job) * kWarpLines * stride;
  keys += ((line_warp(job) >> job.tile.line_shift << job.tile.key_shift) + key_warp(job)) *
          kWarpKeys<T> * stride;
  if constexpr (sizeof(T) == 4) {
    if (job.in_order) return add_product_in_order(sums, lines, keys, stride, (depth + 3) / 4 * 4);
  }
  add_product<T>(sums, lines, stride, keys, stride,
                 (depth + kDepth<T> - 1) / kDepth<T> * kDepth<T>);
}

// Until all copies have come but those of the last stages − 2 steps.
__device__ inline void wait_stage(int stages) {
  if (stages == 2) return wait_copies<0>();
  if (stages == 3) return wait_copies<1>();
  wait_copies<2>();
}

// Runs use(step) for `steps` steps, each after a sync, fetch(step) being called stages − 1 ahead;
// between the first fetches and the first use, ready().
template <class Fetch, class Ready, class Use>
__device__ void run_steps(int stages, int steps, const Fetch& fetch, const Ready& ready,
                          const Use& use) {
  for (int step = 1 - stages; step < steps; ++step) {
    if (step >= 0) {
      wait_stage(stages);
      sync();
    }
    if (step + stages - 1 < steps) fetch(step + stages - 1);
    commit_copies();
    if (step == -1) ready();
    if (step >= 0) use(step);
  }
}

}  // namespace tk::cuda::score
