// merge_adjacent on the CPU: measure how alike the tokens of each window are, place every token in
// the output, write the rows.
#include "cpu/merge.h"

namespace tk::TK_ISA {
namespace {

// What placing a token takes, as bytes that would be moved meanwhile.
constexpr int64_t kPlaceCost = 64;

// What follows from the shapes. A task is one row of windows (all windows of the last axis), or
// what is left of the grid there.
struct Windows {
  int64_t along[3];  // windows along each axis
  int64_t steps[2];  // tasks along the first two axes
  int64_t total;     // windows of an image
  int64_t tokens;    // N
  int64_t length;    // P+N
  int64_t size;      // tokens of a window
  int64_t tasks;     // per image
  bool streaming;    // the output may exceed the last-level cache
};

Windows windows_of(const MergeAdjacent& p) {
  Windows w{};
  for (int axis = 0; axis < 3; ++axis) w.along[axis] = p.grid[axis] / p.window[axis];
  for (int axis = 0; axis < 2; ++axis) w.steps[axis] = ceil_div(p.grid[axis], p.window[axis]);
  w.total = w.along[0] * w.along[1] * w.along[2];
  w.tokens = p.grid[0] * p.grid[1] * p.grid[2];
  w.length = p.prefix + w.tokens;
  w.size = p.window[0] * p.window[1] * p.window[2];
  w.tasks = w.steps[0] * w.steps[1];
  w.streaming = p.batch * w.length * p.channels * size_of(p.dtype) > kStreamingBytes;
  return w;
}

// The parts of the scratch memory.
struct Scratch {
  float* similarity;    // (B, windows)
  float* inverse_norm;  // (B, N)
  int64_t* merging;     // (B) windows that merge
  uint64_t* keys;  // (slots, 2, windows) similarity and number of a window, twice: a sort goes back
                   // and forth
  int32_t* rank;   // (slots, windows) place among the merged windows; −1: not merged
};

int64_t slots_of(const MergeAdjacent& p, int threads) {
  return larger<int64_t>(1, smaller<int64_t>(p.batch, threads));
}

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

Scratch scratch_of(const MergeAdjacent& p, const Windows& w, int64_t slots) {
  char* at = static_cast<char*>(p.scratch);
  const auto take = [&at](int64_t bytes) {
    char* part = at;
    at += aligned(bytes);
    return static_cast<void*>(part);
  };
  Scratch s{};
  s.similarity = static_cast<float*>(take(4 * p.batch * w.total));
  s.inverse_norm = static_cast<float*>(take(4 * p.batch * w.tokens));
  s.merging = static_cast<int64_t*>(take(8 * p.batch));
  s.keys = static_cast<uint64_t*>(take(16 * slots * w.total));
  s.rank = static_cast<int32_t*>(take(4 * slots * w.total));
  return s;
}

template <class T>
TK_INLINE const T* token(const MergeAdjacent& p, int64_t image, int64_t position) {
  return static_cast<const T*>(p.x) + image * p.batch_stride + position * p.token_stride;
}

// Calls visit(number) for the tokens of the window whose first token is `first`; numbers count the
// tokens of the grid.
template <class Visit>
TK_INLINE void each_token(const MergeAdjacent& p, int64_t first, const Visit& visit) {
  for (int64_t i = 0; i < p.window[0]; ++i) {
    for (int64_t j = 0; j < p.window[1]; ++j) {
      const int64_t start = first + (i * p.grid[1] + j) * p.grid[2];
      for (int64_t k = 0; k < p.window[2]; ++k) visit(start + k);
    }
  }
}

// ‖Σ û‖² over the tokens of a window, û = x / max(‖x‖, 1e-8).
template <class T>
float squared_sum(const MergeAdjacent& p, int64_t image, int64_t first, const float* inverse_norm) {
  Floats squares{};
  weighted_sum<T>(
      p.channels,
      [&](const auto& add) {
        each_token(p, first,
                   [&](int64_t t) { add(token<T>(p, image, p.prefix + t), inverse_norm[t]); });
      },
      [&](int64_t, Pair s) { squares += s.a * s.a + s.b * s.b; },
      [&](int64_t, Floats s, int) { squares += s * s; });
  return sum(squares);
}

// The mean pairwise cosines of one row of windows, without pairs: (‖Σû‖² − Σ‖û‖²) / (n(n−1)).
// The norms go first, in the order in which the tokens lie in memory.
template <class T>
void measure(const MergeAdjacent& p, const Windows& w, const Scratch& s, int64_t image,
             int64_t step0, int64_t step1) {
  if (step0 >= w.along[0] || step1 >= w.along[1]) return;
  float* inverse_norm = s.inverse_norm + image * w.tokens;
  float* similarity = s.similarity + image * w.total + (step0 * w.along[1] + step1) * w.along[2];
  for (int64_t k = 0; k < w.along[2]; ++k) similarity[k] = 0.0f;
  const int64_t first = (step0 * p.window[0] * p.grid[1] + step1 * p.window[1]) * p.grid[2];
  for (int64_t i = 0; i < p.window[0]; ++i) {
    for (int64_t j = 0; j < p.window[1]; ++j) {
      int64_t t = first + (i * p.grid[1] + j) * p.grid[2];
      for (int64_t k = 0; k < w.along[2]; ++k) {
        for (const int64_t end = t + p.window[2]; t < end; ++t) {
          const float square = sum_of_squares(token<T>(p, image, p.prefix + t), p.channels);
          const float inverse = 1.0f / larger(square_root(square), kSmallestNorm);
          inverse_norm[t] = inverse;
          similarity[k] += square * inverse * inverse;
        }
      }
    }
  }
  const float pairs = static_cast<float>(w.size) * static_cast<float>(w.size - 1);
  for (int64_t k = 0; k < w.along[2]; ++k) {
    similarity[k] =
        (squared_sum<T>(p, image, first + k * p.window[2], inverse_norm) - similarity[k]) / pairs;
  }
}

// Ascending where the similarity descends, −0 as +0, NaN behind all.
TK_INLINE uint64_t sort_key(float similarity) {
  if (similarity != similarity) return 0xffffffffu;
  const uint32_t bits = bits_of(similarity + 0.0f);
  return (bits >> 31) != 0 ? bits : ~bits & 0x7fffffffu;
}

// Window numbers (low half of each key) by descending similarity, equals by number: a radix sort of
// the high halves.
const uint64_t* sort_windows(const float* similarity, int64_t count, uint64_t* keys,
                             uint64_t* other) {
  for (int64_t i = 0; i < count; ++i)
    keys[i] = sort_key(similarity[i]) << 32 | static_cast<uint64_t>(i);
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t starts[257] = {};
    for (int64_t i = 0; i < count; ++i) ++starts[(keys[i] >> shift & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) starts[digit + 1] += starts[digit];
    for (int64_t i = 0; i < count; ++i) other[starts[keys[i] >> shift & 255]++] = keys[i];
    uint64_t* const sorted = other;
    other = keys;
    keys = sorted;
  }
  return keys;
}

// Which windows of an image merge, and in which place: rank[window], or −1.
void rank_windows(const MergeAdjacent& p, const Windows& w, const Scratch& s, int64_t image,
                  int64_t slot, int32_t* rank) {
  const float* similarity = s.similarity + image * w.total;
  if (p.counts == nullptr && !p.uniform && !p.by_similarity) {
    for (int64_t i = 0; i < w.total; ++i) rank[i] = similarity[i] >= p.threshold ? 0 : -1;
    return;
  }
  uint64_t* keys = s.keys + 2 * slot * w.total;
  const uint64_t* sorted = sort_windows(similarity, w.total, keys, keys + w.total);
  for (int64_t i = 0; i < w.total; ++i) {
    rank[sorted[i] & 0xffffffffu] = i < s.merging[image] ? static_cast<int32_t>(i) : -1;
  }
}

// The output row of every token of an image.
void place(const MergeAdjacent& p, const Windows& w, const Scratch& s, int64_t image,
           int64_t slot) {
  int32_t* rank = s.rank + slot * w.total;
  rank_windows(p, w, s, image, slot, rank);
  int64_t* index = p.index + image * w.length;
  int64_t next = p.packed ? p.offsets[image] : 0;
  for (int64_t i = 0; i < p.prefix; ++i) *index++ = next++;
  const int64_t merged = next;  // the first row of the merged windows in order of similarity
  if (p.by_similarity) next += s.merging[image];
  for (int64_t i = 0; i < p.grid[0]; ++i) {
    const int64_t step0 = i / p.window[0];
    for (int64_t j = 0; j < p.grid[1]; ++j) {
      const int64_t step1 = j / p.window[1];
      int64_t* row = index + (i * p.grid[1] + j) * p.grid[2];
      int64_t* const end = row + p.grid[2];
      if (step0 < w.along[0] && step1 < w.along[1]) {
        const int64_t corner0 = step0 * p.window[0], corner1 = step1 * p.window[1];
        const bool top = i == corner0 && j == corner1;
        const int64_t* above = index + (corner0 * p.grid[1] + corner1) * p.grid[2];
        const int32_t* ranks = rank + (step0 * w.along[1] + step1) * w.along[2];
        for (int64_t k = 0; k < w.along[2]; ++k, above += p.window[2]) {
          const bool merges = ranks[k] >= 0;
          int64_t to = *above;
          if (merges && top) to = p.by_similarity ? merged + ranks[k] : next++;
          for (int64_t n = 0; n < p.window[2]; ++n) *row++ = merges ? to : next++;
        }
      }
      while (row < end) *row++ = next++;
    }
  }
}

TK_INLINE float size_of_token(const MergeAdjacent& p, int64_t image, int64_t position) {
  return p.size == nullptr ? 1.0f
                           : p.size[image * p.size_batch_stride + position * p.size_token_stride];
}

// Token `position` of an image passes through.
template <class T>
TK_INLINE void keep(const MergeAdjacent& p, const Windows& w, int64_t image, int64_t position,
                    int64_t row) {
  copy_token(static_cast<T*>(p.tokens) + row * p.channels, token<T>(p, image, position), p.channels,
             w.streaming);
  p.merged_size[row] = size_of_token(p, image, position);
}

template <class T>
void merge_window(const MergeAdjacent& p, const Windows& w, int64_t image, int64_t first,
                  int64_t row) {
  float total = 0.0f;
  each_token(p, first, [&](int64_t t) { total += size_of_token(p, image, p.prefix + t); });
  weighted_mean(static_cast<T*>(p.tokens) + row * p.channels, total, p.channels, w.streaming,
                [&](const auto& add) {
                  each_token(p, first, [&](int64_t t) {
                    add(token<T>(p, image, p.prefix + t), size_of_token(p, image, p.prefix + t));
                  });
                });
  p.merged_size[row] = total;
}

// One row of windows, and what lies beside it, into the output. A window has merged if its first
// two tokens share a row.
template <class T>
void write(const MergeAdjacent& p, const Windows& w, int64_t image, int64_t step0, int64_t step1) {
  const int64_t* index = p.index + image * w.length;
  const int64_t base = p.packed ? 0 : p.offsets[image];
  if (step0 == 0 && step1 == 0) {
    for (int64_t i = 0; i < p.prefix; ++i) keep<T>(p, w, image, i, base + index[i]);
  }
  index += p.prefix;
  const bool windows = step0 < w.along[0] && step1 < w.along[1];
  const int64_t to_second = p.window[2] > 1   ? 1
                            : p.window[1] > 1 ? p.grid[2]
                                              : p.grid[1] * p.grid[2];
  for (int64_t i = step0 * p.window[0]; i < smaller((step0 + 1) * p.window[0], p.grid[0]); ++i) {
    for (int64_t j = step1 * p.window[1]; j < smaller((step1 + 1) * p.window[1], p.grid[1]); ++j) {
      const bool top = i == step0 * p.window[0] && j == step1 * p.window[1];
      int64_t t = (i * p.grid[1] + j) * p.grid[2];
      const int64_t end = t + p.grid[2];
      for (int64_t k = 0; windows && k < w.along[2]; ++k) {
        const int64_t first =
            (step0 * p.window[0] * p.grid[1] + step1 * p.window[1]) * p.grid[2] + k * p.window[2];
        const bool merged = index[first] == index[first + to_second];
        if (merged && top) merge_window<T>(p, w, image, first, base + index[first]);
        for (int64_t n = 0; n < p.window[2]; ++n, ++t) {
          if (!merged) keep<T>(p, w, image, p.prefix + t, base + index[t]);
        }
      }
      for (; t < end; ++t) keep<T>(p, w, image, p.prefix + t, base + index[t]);
    }
  }
}

// Calls body(image, step0, step1) for every task of the images [begin, end), on all threads.
template <class Body>
void each_task(const MergeAdjacent& p, const Windows& w, const Pool& pool, int64_t begin,
               int64_t end, const Body& body) {
  const int64_t bytes = size_of(p.dtype) * p.channels * (w.length / w.tasks + 1);
  parallel_for(pool, (end - begin) * w.tasks, 1 + kGrainBytes / (1 + bytes),
               [&](int64_t from, int64_t to) {
                 for (int64_t task = from; task < to; ++task) {
                   const int64_t step = task % w.tasks;
                   body(begin + task / w.tasks, step / w.steps[1], step % w.steps[1]);
                 }
                 streaming_done();
               });
}

template <class T>
void measure_images(const MergeAdjacent& p, const Windows& w, const Scratch& s, const Pool& pool,
                    int64_t begin, int64_t end) {
  each_task(p, w, pool, begin, end, [&](int64_t image, int64_t step0, int64_t step1) {
    measure<T>(p, w, s, image, step0, step1);
  });
}

// How many windows reach the threshold.
int64_t count_alike(const MergeAdjacent& p, const Windows& w, const Scratch& s, int64_t image) {
  const float* similarity = s.similarity + image * w.total;
  int64_t count = 0;
  for (int64_t i = 0; i < w.total; ++i) count += similarity[i] >= p.threshold;
  return count;
}

// The images [begin, end), measured, into the output.
template <class T>
void merge_images(const MergeAdjacent& p, const Windows& w, const Scratch& s, const Pool& pool,
                  int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image) {
    if (p.counts == nullptr && !p.uniform) s.merging[image] = count_alike(p, w, s, image);
    p.offsets[image + 1] = p.offsets[image] + w.length - s.merging[image] * (w.size - 1);
  }
  const int64_t slots = smaller(slots_of(p, pool.threads), end - begin);
  const int64_t places = w.length * ceil_div(end - begin, slots);
  parallel_for(pool, slots, grain_of(kPlaceCost * places), [&](int64_t from, int64_t to) {
    for (int64_t slot = from; slot < to; ++slot) {
      for (int64_t image = begin + slot; image < end; image += slots) place(p, w, s, image, slot);
    }
  });
  each_task(p, w, pool, begin, end, [&](int64_t image, int64_t step0, int64_t step1) {
    write<T>(p, w, image, step0, step1);
  });
}

template <class T>
void merge_batch(const MergeAdjacent& p, const Windows& w, const Scratch& s, const Pool& pool) {
  const bool fewest =
      p.uniform && p.counts == nullptr;  // one image decides for all: all are measured first
  if (fewest) {
    measure_images<T>(p, w, s, pool, 0, p.batch);
    int64_t count = w.total;
    for (int64_t image = 0; image < p.batch; ++image)
      count = smaller(count, count_alike(p, w, s, image));
    for (int64_t image = 0; image < p.batch; ++image) s.merging[image] = count;
  }
  const int64_t stretch =
      larger<int64_t>(1, kStretchBytes / (1 + size_of(p.dtype) * w.length * p.channels));
  for (int64_t begin = 0; begin < p.batch; begin += stretch) {
    const int64_t end = smaller(begin + stretch, p.batch);
    if (!fewest) measure_images<T>(p, w, s, pool, begin, end);
    merge_images<T>(p, w, s, pool, begin, end);
  }
}

}  // namespace

int64_t merge_adjacent_scratch(const MergeAdjacent& p, int threads) {
  const Windows w = windows_of(p);
  const int64_t slots = slots_of(p, threads);
  return aligned(4 * p.batch * w.total) + aligned(4 * p.batch * w.tokens) + aligned(8 * p.batch) +
         aligned(16 * slots * w.total) + aligned(4 * slots * w.total);
}

Status merge_adjacent(const MergeAdjacent& p, const Pool& pool) {
  const Windows w = windows_of(p);
  const Scratch s = scratch_of(p, w, slots_of(p, pool.threads));
  p.offsets[0] = 0;
  for (int64_t image = 0; p.counts != nullptr && image < p.batch; ++image) {
    s.merging[image] = p.counts[image * p.counts_stride];
    if (s.merging[image] < 0 || s.merging[image] > w.total) return Status::kBadValue;
  }
  dispatch(p.dtype, [&](auto zero) { merge_batch<decltype(zero)>(p, w, s, pool); });
  return Status::kOk;
}

}  // namespace tk::TK_ISA
