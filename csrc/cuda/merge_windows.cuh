// How merge_adjacent on a GPU divides its work: what follows from the shapes, where a token lies,
// and the order in which blocks take what is to be done.
#pragma once

#include "cuda/merge.cuh"
#include "cuda/sort.cuh"

namespace tk::cuda {

constexpr int64_t kStretchBytes = int64_t{8} << 20;  // two of them stay in the second cache
constexpr int64_t kMeasureBytes = int64_t{64} << 10;
constexpr int64_t kWriteBytes = int64_t{32} << 10;
constexpr int kMergeThreads = 128;  // small blocks: registers for 20 warps, 40 KB in flight
constexpr int kWarps = kMergeThreads / kWarp;

// Images go in stretches. Of every stretch the windows are measured, then each image placed, and
// written while the next stretch is measured: x is still in the second cache.
struct MergePlan {
  int64_t along[3], windows, length, size;  // windows along the axes and in all; P+N; n
  int64_t stretch, stretches;               // images of one
  int64_t measures, measure_each;           // items of an image; windows of an item
  int64_t writes, write_each;               // items of an image; tokens of an item
  int64_t given;    // windows to merge in every image; −1: as `counts` or the threshold say
  int64_t* counts;  // (B) where they differ, or null
  int64_t room;     // words of shared memory for sorting
  uint64_t* words;  // (B) look-back; from here to `zeroed_bytes` all is cleared
  uint32_t *done, *alike,
      *placed;  // (B) measured items; windows that reach the threshold; 1: placed
  uint32_t *all_done, *ticket;
  int64_t zeroed_bytes;
  float* similarity;    // (B, windows)
  float* inverse_norm;  // (B, windows, n)
  int32_t* rank;        // (B, windows) place among the merged ones; −1: not merged
  uint64_t* keys;       // (B, windows) where they find no room in shared memory
  int64_t bytes;

  __host__ __device__ int64_t tickets() const { return stretches * round(); }
  __host__ __device__ int64_t round() const { return stretch * (measures + 1 + writes); }
};

// Parts of the scratch memory, each at a multiple of 16 bytes.
class Parts {
 public:
  explicit Parts(void* base) : base_(static_cast<char*>(base)) {}

  template <class V>
  V* take(int64_t count) {
    V* part = reinterpret_cast<V*>(base_ + at_);
    at_ += (count * int64_t{sizeof(V)} + 15) / 16 * 16;
    return part;
  }
  int64_t bytes() const { return at_; }

 private:
  char* base_;
  int64_t at_ = 0;
};

inline int64_t parts_of(int64_t all, int64_t each) { return (all + each - 1) / each; }

inline MergePlan plan_of(const MergeAdjacent& p) {
  MergePlan s{};
  for (int axis = 0; axis < 3; ++axis) s.along[axis] = p.grid[axis] / p.window[axis];
  s.windows = s.along[0] * s.along[1] * s.along[2];
  s.size = p.window[0] * p.window[1] * p.window[2];
  const int64_t tokens = p.grid[0] * p.grid[1] * p.grid[2];
  s.length = p.prefix + tokens;
  const int64_t row = p.channels * size_of(p.dtype) + 1;
  const int64_t images = kStretchBytes / (row * s.length) + 1;
  s.stretch = (p.uniform && p.counts == nullptr) || images > p.batch ? p.batch : images;
  s.stretches = p.batch > 0 ? parts_of(p.batch, s.stretch) : 0;
  s.measure_each = (s.windows > 0 ? kMeasureBytes / (row * s.size) / kWarps + 1 : 1) * kWarps;
  s.measures = parts_of(s.windows, s.measure_each);
  s.write_each = (kWriteBytes / (row * kWarp) + 1) * kWarp;
  s.writes = parts_of(s.length, s.write_each);
  const bool ranked = p.counts != nullptr || p.uniform || p.by_similarity;
  s.room = !ranked ? 0 : s.windows < kSortRoom ? s.windows : kSortRoom;
  s.given = p.counts != nullptr && p.counts_stride == 0 ? p.counts[0] : -1;
  Parts parts(p.scratch);
  s.words = parts.take<uint64_t>(p.batch);
  s.done = parts.take<uint32_t>(p.batch);
  s.alike = parts.take<uint32_t>(p.batch);
  s.placed = parts.take<uint32_t>(p.batch);
  s.all_done = parts.take<uint32_t>(1);
  s.ticket = parts.take<uint32_t>(1);
  s.zeroed_bytes = parts.bytes();
  s.similarity = parts.take<float>(p.batch * s.windows);
  s.inverse_norm = parts.take<float>(p.batch * s.windows * s.size);
  s.rank = parts.take<int32_t>(p.batch * s.windows);
  s.keys = parts.take<uint64_t>(s.windows > s.room ? p.batch * s.windows : 0);
  s.counts = parts.take<int64_t>(p.counts_stride != 0 ? p.batch : 0);
  if (p.counts == nullptr || p.counts_stride == 0) s.counts = nullptr;
  s.bytes = parts.bytes();
  return s;
}

enum class Do { kNothing, kMeasure, kPlace, kWrite };

struct Item {
  Do what;
  int64_t image, number;
};

// In every round a stretch is measured and placed, and the one before it written; tickets that
// would have nothing to do in the first and the last round are left out.
__device__ inline Item item_of(const MergePlan& s, int64_t batch, int64_t ticket) {
  const int64_t measured = s.stretch * s.measures, placed = measured + s.stretch;
  int64_t at = ticket < placed ? ticket : ticket + s.stretch * s.writes;
  if (at >= s.stretches * s.round()) at += placed;
  const int64_t round = at / s.round(), rest = at % s.round();
  Item item{Do::kWrite, 0, 0};
  if (rest < measured) {
    item = {Do::kMeasure, round * s.stretch + rest / s.measures, rest % s.measures};
  } else if (rest < placed) {
    item = {Do::kPlace, round * s.stretch + rest - measured, 0};
  } else {
    const int64_t write = rest - placed;
    item = {Do::kWrite, (round - 1) * s.stretch + write / s.writes, write % s.writes};
  }
  if (item.image >= batch) item.what = Do::kNothing;
  return item;
}

// The window of a token of the grid, −1 at the far edges, and the window's first token.
struct WindowOf {
  int64_t window, first;
};

__device__ inline WindowOf window_of(const MergeAdjacent& p, const MergePlan& s, int64_t token) {
  const int64_t line = token / p.grid[2], plane = line / p.grid[1];
  const int64_t a = plane / p.window[0], b = (line - plane * p.grid[1]) / p.window[1];
  const int64_t c = (token - line * p.grid[2]) / p.window[2];
  if (a >= s.along[0] || b >= s.along[1] || c >= s.along[2]) return {-1, token};
  return {(a * s.along[1] + b) * s.along[2] + c,
          (a * p.window[0] * p.grid[1] + b * p.window[1]) * p.grid[2] + c * p.window[2]};
}

__device__ inline int64_t first_of(const MergeAdjacent& p, const MergePlan& s, int64_t window) {
  const int64_t line = window / s.along[2], a = line / s.along[1];
  const int64_t b = line - a * s.along[1], c = window - line * s.along[2];
  return (a * p.window[0] * p.grid[1] + b * p.window[1]) * p.grid[2] + c * p.window[2];
}

// From token to token of a window, in raster order.
struct WindowWalk {
  int64_t token, j, k;

  __device__ explicit WindowWalk(int64_t first) : token(first), j(0), k(0) {}

  __device__ void next(const MergeAdjacent& p) {
    ++token;
    if (++k < p.window[2]) return;
    k = 0;
    token += p.grid[2] - p.window[2];
    if (++j < p.window[1]) return;
    j = 0;
    token += (p.grid[1] - p.window[1]) * p.grid[2];
  }
};

}  // namespace tk::cuda
