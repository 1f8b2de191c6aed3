// merge_adjacent on a GPU, in one launch: blocks measure windows, place the tokens of images, and
// write rows, in an order in which nobody waits for a block that started later.
#include "cuda/look_back.cuh"
#include "cuda/merge_windows.cuh"

namespace tk {
namespace {

using cuda::MergePlan;
using cuda::WindowWalk;

constexpr int kBlocksPerProcessor = 5;  // more would read more than the second cache holds
constexpr int kSomeCounts = 256;

// Counts that the host knows, by value: a copy could not be captured.
struct SomeCounts {
  int64_t at[kSomeCounts];
};

__global__ void counts_kernel(int64_t* to, int64_t count,
                              const __grid_constant__ SomeCounts counts) {
  if (cuda::thread() < count) to[cuda::thread()] = counts.at[cuda::thread()];
}

// Σ‖û‖² over the tokens of a window, û = x / max(‖x‖, 1e-8), and what each is divided by.
template <class T, bool kVectors>
__device__ float scale_tokens(const MergeAdjacent& p, const MergePlan& s, int64_t image,
                              int64_t first, float* inverse_norm) {
  constexpr int kRows = cuda::kRowsInFlight;
  float sum = 0;
  WindowWalk at(first);
  for (int64_t member = 0; member < s.size; member += kRows) {
    const T* rows[kRows] = {};
    float squares[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (member + i >= s.size) continue;
      rows[i] = cuda::row_of_token<T>(p, image, p.prefix + at.token);
      at.next(p);
    }
    for (int64_t c = cuda::lane() * cuda::kWide<T>; c < p.channels; c += cuda::kStep<T>) {
      cuda::Piece<T> pieces[kRows] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (rows[i] != nullptr) pieces[i] = cuda::load_piece<T, kVectors>(rows[i], c, p.channels);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int w = 0; w < cuda::kWide<T>; ++w) {
          const float value = cuda::widen(pieces[i].at[w]);
          squares[i] += value * value;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float square = cuda::warp_sum(squares[i]), inverse = 1.0f / cuda::norm_of(square);
      if (member + i >= s.size) continue;
      sum += square * inverse * inverse;
      if (cuda::lane() == 0) inverse_norm[member + i] = inverse;
    }
  }
  cuda::warp_sync();
  return sum;
}

// ‖Σû‖²: the rows once more, out of the first cache.
template <class T, bool kVectors>
__device__ float squared_sum(const MergeAdjacent& p, const MergePlan& s, int64_t image,
                             int64_t first, const float* inverse_norm) {
  constexpr int kRows = cuda::kRowsInFlight;
  float square = 0;
  for (int64_t c = cuda::lane() * cuda::kWide<T>; c < p.channels; c += cuda::kStep<T>) {
    float sums[cuda::kWide<T>] = {};
    WindowWalk at(first);
    for (int64_t member = 0; member < s.size; member += kRows) {
      cuda::Piece<T> pieces[kRows] = {};
      float inverses[kRows] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (member + i >= s.size) continue;
        const T* row = cuda::row_of_token<T>(p, image, p.prefix + at.token);
        pieces[i] = cuda::load_piece<T, kVectors>(row, c, p.channels);
        inverses[i] = inverse_norm[member + i];
        at.next(p);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int w = 0; w < cuda::kWide<T>; ++w)
          sums[w] += cuda::widen(pieces[i].at[w]) * inverses[i];
      }
    }
#pragma unroll
    for (int w = 0; w < cuda::kWide<T>; ++w) square += sums[w] * sums[w];
  }
  return cuda::warp_sum(square);
}

// The mean pairwise cosines of some windows, one warp each: (‖Σû‖² − Σ‖û‖²) / (n(n−1)).
template <class T, bool kVectors>
__device__ void measure(const MergeAdjacent& p, const MergePlan& s, int64_t image, int64_t item) {
  const int64_t behind = (item + 1) * s.measure_each;
  const int64_t end = behind < s.windows ? behind : s.windows;
  const float pairs = static_cast<float>(s.size) * static_cast<float>(s.size - 1);
  uint32_t alike = 0;
  for (int64_t w = item * s.measure_each + cuda::warp(); w < end; w += cuda::kWarps) {
    const int64_t first = cuda::first_of(p, s, w);
    float* inverse_norm = s.inverse_norm + (image * s.windows + w) * s.size;
    const float squares = scale_tokens<T, kVectors>(p, s, image, first, inverse_norm);
    const float both = squared_sum<T, kVectors>(p, s, image, first, inverse_norm);
    const float similarity = (both - squares) / pairs;
    if (cuda::lane() == 0) s.similarity[image * s.windows + w] = similarity;
    alike += similarity >= p.threshold;
  }
  if (cuda::lane() == 0 && alike > 0) cuda::atomic_add(s.alike + image, alike);
  cuda::sync();
  if (cuda::thread() != 0) return;
  cuda::fence();
  cuda::atomic_add(s.done + image, 1u);
  cuda::atomic_add(s.all_done, 1u);
}

// All threads behind it see what was written before `word` became `value`.
__device__ void wait_for(const uint32_t* word, uint32_t value) {
  if (cuda::thread() == 0) cuda::wait_until([=] { return cuda::load_acquire(word) == value; });
  cuda::sync();
}

// How many windows of an image merge.
__device__ int64_t merging_of(const MergeAdjacent& p, const MergePlan& s, int64_t image) {
  if (s.given >= 0) return s.given;
  if (s.counts != nullptr) return s.counts[image];
  if (!p.uniform) return cuda::load_relaxed(s.alike + image);
  uint32_t fewest = UINT32_MAX;
  for (int64_t b = cuda::lane(); b < p.batch; b += cuda::kWarp) {
    const uint32_t alike = cuda::load_relaxed(s.alike + b);
    fewest = alike < fewest ? alike : fewest;
  }
  return cuda::reduce_min(fewest);
}

// Ascending where the similarity descends, −0 as +0, NaN behind all.
__device__ uint64_t sort_key(float similarity) {
  if (similarity != similarity) return 0xffffffffu;
  const float one_zero = similarity + 0.0f;
  uint32_t bits;
  memcpy(&bits, &one_zero, sizeof bits);
  return (bits >> 31) != 0 ? bits : ~bits & 0x7fffffffu;
}

// Which windows of an image merge, and in which place; by a block.
__device__ void rank_windows(const MergeAdjacent& p, const MergePlan& s, int64_t image,
                             int64_t merging, uint64_t* room) {
  const float* similarity = s.similarity + image * s.windows;
  int32_t* rank = s.rank + image * s.windows;
  if (s.room == 0) {
    for (int64_t w = cuda::thread(); w < s.windows; w += cuda::threads())
      rank[w] = similarity[w] >= p.threshold ? 0 : -1;
    return cuda::sync();
  }
  const bool fits = s.windows <= s.room;
  uint64_t* keys = fits ? room : s.keys + image * s.windows;
  for (int64_t w = cuda::thread(); w < s.windows; w += cuda::threads())
    keys[w] = sort_key(similarity[w]) << 32 | static_cast<uint64_t>(w);
  cuda::sync();
  fits ? cuda::sort_words(keys, s.windows) : cuda::sort_words(keys, s.windows, room, cuda::Alone());
  for (int64_t i = cuda::thread(); i < s.windows; i += cuda::threads())
    rank[keys[i] & 0xffffffffu] = i < merging ? static_cast<int32_t>(i) : -1;
  cuda::sync();
}

struct PlaceMemory {
  int64_t* before;  // rows of the images before
  uint32_t* sums;   // (warps)
  uint64_t* room;   // for sorting
};

// The output row of every token of an image, but for those that share their window's first row.
__device__ void place(const MergeAdjacent& p, const MergePlan& s, int64_t image,
                      const PlaceMemory& memory) {
  const auto items = static_cast<uint32_t>(s.measures);
  p.uniform&& p.counts == nullptr ? wait_for(s.all_done, static_cast<uint32_t>(p.batch) * items)
                                  : wait_for(s.done + image, items);
  const int64_t merging = merging_of(p, s, image), kept = s.length - merging * (s.size - 1);
  if (cuda::warp() == 0) {
    const int64_t before = cuda::look_back(s.words, image, kept);
    if (cuda::lane() == 0) {
      *memory.before = p.offsets[image] = before;
      if (image == p.batch - 1) p.offsets[p.batch] = before + kept;
    }
  }
  rank_windows(p, s, image, merging, memory.room);
  const int64_t base = (p.packed ? *memory.before : 0) + p.prefix;
  int64_t* index = p.index + image * s.length;
  for (int64_t i = cuda::thread(); i < p.prefix; i += cuda::threads())
    index[i] = base - p.prefix + i;
  int64_t next = p.by_similarity ? base + merging : base;
  for (int64_t tile = 0; tile < s.length - p.prefix; tile += cuda::kMergeThreads) {
    const int64_t token = tile + cuda::thread();
    const bool there = token < s.length - p.prefix;
    const cuda::WindowOf at = cuda::window_of(p, s, token);
    const int32_t rank = there && at.window >= 0 ? s.rank[image * s.windows + at.window] : -1;
    const bool own = there && (rank < 0 || (!p.by_similarity && at.first == token));
    uint32_t total;
    const uint32_t below = cuda::sum_below(uint32_t{own}, memory.sums, total);
    if (own) index[p.prefix + token] = next + below;
    if (rank >= 0 && p.by_similarity) index[p.prefix + token] = base + rank;
    next += total;
  }
  cuda::sync();
  if (cuda::thread() == 0) cuda::store_release(s.placed + image, 1u);
}

template <class T>
struct Members {
  const MergeAdjacent& p;
  int64_t image;
  WindowWalk at;

  __device__ const T* row() const { return cuda::row_of_token<T>(p, image, p.prefix + at.token); }
  __device__ float weight() const { return cuda::size_of_token(p, image, p.prefix + at.token); }
  __device__ void next() { at.next(p); }
};

// The window that begins at token `first`, into row `row`; by a warp.
template <class T, bool kVectors>
__device__ void merge_window(const MergeAdjacent& p, const MergePlan& s, int64_t image,
                             int64_t first, int64_t row) {
  const Members<T> start{p, image, WindowWalk(first)};
  float total = 0;
  Members<T> at = start;
  for (int64_t i = 0; i < s.size; ++i, at.next()) total += at.weight();
  if (cuda::lane() == 0) p.merged_size[row] = total;
  cuda::mean_row<T, kVectors>(static_cast<T*>(p.tokens) + row * p.channels, total, p.channels,
                              s.size, start);
}

template <class T, bool kVectors>
__device__ void keep(const MergeAdjacent& p, int64_t image, int64_t position, int64_t row) {
  cuda::copy_row<T, kVectors>(static_cast<T*>(p.tokens) + row * p.channels,
                              cuda::row_of_token<T>(p, image, position), p.channels);
  if (cuda::lane() == 0) p.merged_size[row] = cuda::size_of_token(p, image, position);
}

// Some tokens of an image, 32 at a time: a bit for each that has a row of its own, which the warps
// share out.
template <class T, bool kVectors>
__device__ void write(const MergeAdjacent& p, const MergePlan& s, int64_t image, int64_t item) {
  wait_for(s.placed + image, 1);
  int64_t* index = p.index + image * s.length;
  const int64_t base = p.packed ? 0 : p.offsets[image];
  const int64_t behind = (item + 1) * s.write_each, end = behind < s.length ? behind : s.length;
  for (int64_t some = item * s.write_each; some < end; some += cuda::kWarp) {
    const int64_t position = some + cuda::lane(), token = position - p.prefix;
    const bool there = position < end, on_grid = there && token >= 0;
    const cuda::WindowOf at = on_grid ? cuda::window_of(p, s, token) : cuda::WindowOf{-1, token};
    const bool merged = at.window >= 0 && s.rank[image * s.windows + at.window] >= 0;
    const bool leads = there && (!merged || at.first == token);
    const int64_t row = there ? index[p.prefix + (merged ? at.first : token)] : 0;
    if (merged && !leads && !p.by_similarity && cuda::warp() == 0) index[position] = row;
    const cuda::Lanes means = cuda::ballot(merged);
    int number = 0;
    for (cuda::Lanes left = cuda::ballot(leads); left != 0; left &= left - 1, ++number) {
      if (number % cuda::kWarps != cuda::warp()) continue;
      const int lane = cuda::lowest_bit(left);
      const int64_t to = base + cuda::shuffle(row, lane);
      (means >> lane & 1u) != 0 ? merge_window<T, kVectors>(p, s, image, some + lane - p.prefix, to)
                                : keep<T, kVectors>(p, image, some + lane, to);
    }
  }
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(cuda::kMergeThreads, kVectors ? 5 : 4)
    merge_adjacent_kernel(const __grid_constant__ MergeAdjacent p,
                          const __grid_constant__ MergePlan s) {
  cuda::Arena arena;
  uint32_t* slot = arena.shared<uint32_t>(1);
  const PlaceMemory memory{arena.shared<int64_t>(1), arena.shared<uint32_t>(cuda::kWarps),
                           arena.shared<uint64_t>(s.room)};
  for (int64_t ticket = cuda::ticket(s.ticket, slot); ticket < s.tickets();
       ticket = cuda::ticket(s.ticket, slot)) {
    const cuda::Item item = cuda::item_of(s, p.batch, ticket);
    if (item.what == cuda::Do::kMeasure) measure<T, kVectors>(p, s, item.image, item.number);
    if (item.what == cuda::Do::kPlace) place(p, s, item.image, memory);
    if (item.what == cuda::Do::kWrite) write<T, kVectors>(p, s, item.image, item.number);
  }
}

const char* store_counts(const MergeAdjacent& p, const MergePlan& s, void* stream) {
  const char* error = nullptr;
  for (int64_t b = 0; s.counts != nullptr && error == nullptr && b < p.batch; b += kSomeCounts) {
    const int64_t count = p.batch - b < kSomeCounts ? p.batch - b : kSomeCounts;
    SomeCounts some{};
    for (int64_t i = 0; i < count; ++i) some.at[i] = p.counts[(b + i) * p.counts_stride];
    error = cuda::launch<counts_kernel>({.blocks = 1, .threads = kSomeCounts, .stream = stream},
                                        s.counts + b, count, some);
  }
  return error;
}

}  // namespace

int64_t merge_adjacent_cuda_scratch(const MergeAdjacent& p) { return cuda::plan_of(p).bytes; }

const char* merge_adjacent_cuda(const MergeAdjacent& p, void* stream) {
  const MergePlan s = cuda::plan_of(p);
  if (p.batch == 0) return cuda::zero(p.offsets, int64_t{sizeof(int64_t)}, stream);
  const char* error = cuda::zero(s.words, s.zeroed_bytes, stream);
  if (error == nullptr) error = store_counts(p, s, stream);
  if (error != nullptr) return error;
  const cuda::Launch how{
      .blocks = cuda::blocks_for(s.tickets(), 1, kBlocksPerProcessor * cuda::multiprocessors()),
      .threads = cuda::kMergeThreads,
      .shared = cuda::shared_bytes<uint32_t>(1) + cuda::shared_bytes<int64_t>(1) +
                cuda::shared_bytes<uint32_t>(cuda::kWarps) + cuda::shared_bytes<uint64_t>(s.room),
      .stream = stream};
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    error = cuda::moves_pieces(p) ? cuda::launch<merge_adjacent_kernel<T, true>>(how, p, s)
                                  : cuda::launch<merge_adjacent_kernel<T, false>>(how, p, s);
  });
  return error;
}

}  // namespace tk
