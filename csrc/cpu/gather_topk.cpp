// gather_topk on the CPU: radix selection with lowest-index ties, then one pass that moves the
// chosen rows of every tensor.
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

using Fuse = GatherTopk::Fuse;

// Scores as integers of the same order: NaN lowest, −0 equal to +0. Below and above them there is
// room for tokens that never and that always win.
constexpr int32_t kNever = INT32_MIN, kNan = INT32_MIN + 1, kAlways = INT32_MAX;

TK_INLINE int32_t ordered(float score) {
  if (score != score) return kNan;
  const auto bits = static_cast<int32_t>(bits_of(score + 0.0f));
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

// The memory of one task: keys (N, and one vector more), and what sorting needs.
struct Row {
  int32_t* keys;
  int64_t* other;
};

TK_INLINE int64_t padded(int64_t tokens) { return (tokens + 2 * kLanes - 1) / kLanes * kLanes; }

TK_INLINE int64_t row_bytes(int64_t tokens) {
  return padded(tokens) * static_cast<int64_t>(sizeof(int32_t) + sizeof(int64_t));
}

TK_INLINE Row row_of(const GatherTopk& p, int64_t task) {
  int64_t* other =
      reinterpret_cast<int64_t*>(static_cast<char*>(p.scratch) + task * row_bytes(p.tokens));
  return {reinterpret_cast<int32_t*>(other + padded(p.tokens)), other};
}

template <class T>
void read_keys(const GatherTopk& p, int64_t image, int32_t* keys) {
  const T* scores = static_cast<const T*>(p.scores) + image * p.scores_batch_stride;
  const int64_t stride = p.scores_token_stride;
  if (stride == 1) {
    for (int64_t n = 0; n < p.tokens; ++n) keys[n] = ordered(to_float(scores[n]));
  } else {
    for (int64_t n = 0; n < p.tokens; ++n) keys[n] = ordered(to_float(scores[n * stride]));
  }
  for (int64_t n = p.tokens; n < padded(p.tokens); ++n) keys[n] = kNever;
}

void read_keys(const GatherTopk& p, int64_t image, int32_t* keys) {
  dispatch(p.scores_dtype, [&](auto zero) { read_keys<decltype(zero)>(p, image, keys); });
}

// Kept tokens always win; where they are more than the budget, the others never do.
void apply_keep(const GatherTopk& p, int64_t image, int64_t budget, int32_t* keys) {
  const bool* keep = p.keep + image * p.keep_batch_stride;
  int64_t kept = 0;
  for (int64_t n = 0; n < p.tokens; ++n) kept += keep[n * p.keep_token_stride];
  for (int64_t n = 0; n < p.tokens; ++n) {
    const bool here = keep[n * p.keep_token_stride];
    if (kept < budget && here) keys[n] = kAlways;
    if (kept >= budget && !here) keys[n] = kNever;
  }
}

TK_INLINE int64_t count_from(const int32_t* keys, int64_t tokens, int32_t bar) {
  Ints found{};
  for (int64_t n = 0; n < tokens; n += kLanes) {
    Ints here;
    std::memcpy(&here, keys + n, sizeof here);
    found -= here >= bar;
  }
  return fold(found, [](Ints a, Ints b) { return a + b; });
}

// The bits in which any two keys differ: few where scores are alike or were half precision.
uint32_t differing_bits(const int32_t* keys, int64_t tokens) {
  const Ints one = splat_int(keys[0]);
  Ints found{};
  int64_t n = 0;
  for (; n + kLanes <= tokens; n += kLanes) {
    Ints here;
    std::memcpy(&here, keys + n, sizeof here);
    found |= here ^ one;
  }
  int32_t all = fold(found, [](Ints a, Ints b) { return a | b; });
  for (; n < tokens; ++n) all |= keys[n] ^ keys[0];
  return static_cast<uint32_t>(all);
}

// The highest bar that at least `need` keys reach, found bit by bit; early where exactly `need` do.
int32_t find_bar(const int32_t* keys, int64_t tokens, int64_t need) {
  const uint32_t open = differing_bits(keys, tokens);
  uint32_t bar = 0;  // counted from kNever upwards
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if ((open & bit) == 0) {
      bar |= (static_cast<uint32_t>(keys[0]) ^ 0x80000000u) & bit;
      continue;
    }
    const int64_t count = count_from(keys, tokens, static_cast<int32_t>((bar | bit) ^ 0x80000000u));
    if (count >= need) bar |= bit;
    if (count == need) break;
  }
  return static_cast<int32_t>(bar ^ 0x80000000u);
}

// How many of `need` are left to those at the bar.
TK_INLINE int64_t ties_of(const int32_t* keys, int64_t tokens, int64_t need, int32_t bar) {
  return need - (bar == kAlways ? 0 : count_from(keys, tokens, bar + 1));
}

// Chosen tokens in ascending order: all above the bar, and the first of those at it.
#if defined(__AVX512F__)
int64_t choose(const int32_t* keys, int64_t tokens, int64_t need, int64_t* selected) {
  if (need == 0) return 0;
  const int32_t bar = find_bar(keys, tokens, need);
  const __m512i bars = _mm512_set1_epi32(bar);
  int64_t ties = ties_of(keys, tokens, need, bar), count = 0;
  __m512i here = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t n = 0; count < need; n += kLanes) {
    const __m512i some = _mm512_loadu_si512(keys + n);
    uint32_t equal = ties > 0 ? _mm512_cmpeq_epi32_mask(some, bars) : 0;
    while (__builtin_popcount(equal) > ties) equal ^= 0x80000000u >> __builtin_clz(equal);
    ties -= __builtin_popcount(equal);
    const uint32_t chosen = _mm512_cmpgt_epi32_mask(some, bars) | equal;
    for (uint32_t half = 0; half < 2; ++half) {
      const auto mask = static_cast<__mmask8>(chosen >> 8 * half);
      const int found = __builtin_popcount(mask);
      _mm512_mask_storeu_epi64(selected + count, static_cast<__mmask8>((1u << found) - 1),
                               _mm512_maskz_compress_epi64(mask, here));
      count += found;
      here = _mm512_add_epi64(here, _mm512_set1_epi64(8));
    }
  }
  return count;
}
#else
int64_t choose(const int32_t* keys, int64_t tokens, int64_t need, int64_t* selected) {
  if (need == 0) return 0;
  const int32_t bar = find_bar(keys, tokens, need);
  int64_t ties = ties_of(keys, tokens, need, bar), count = 0;
  for (int64_t n = 0; count < need; ++n) {
    const bool tie = keys[n] == bar && ties > 0;
    selected[count] = n;
    count += tie || keys[n] > bar;
    ties -= tie;
  }
  return count;
}
#endif

int64_t choose_by_threshold(const GatherTopk& p, const int32_t* keys, int64_t image,
                            int64_t* selected) {
  const int32_t bar = p.threshold != p.threshold ? kAlways : ordered(p.threshold);
  int64_t count = 0;
  for (int64_t n = 0; n < p.tokens; ++n) {
    const bool kept =
        p.keep != nullptr && p.keep[image * p.keep_batch_stride + n * p.keep_token_stride];
    selected[count] = n;
    count += kept || keys[n] >= bar;
  }
  return count;
}

// Stable descending radix sort of the chosen tokens by score: equal ones stay in ascending order.
void sort_by_score(const Row& row, int64_t* selected, int64_t count) {
  int64_t* from = selected;
  int64_t* to = row.other;
  for (int shift = 0; shift < 32; shift += 8) {
    const auto digit = [&](int64_t token) {
      return 255u - (((static_cast<uint32_t>(row.keys[token]) ^ 0x80000000u) >> shift) & 255u);
    };
    int64_t start[256] = {};
    for (int64_t i = 0; i < count; ++i) ++start[digit(from[i])];
    int64_t total = 0;
    for (int64_t& entry : start) {
      const int64_t here = entry;
      entry = total;
      total += here;
    }
    for (int64_t i = 0; i < count; ++i) to[start[digit(from[i])]++] = from[i];
    int64_t* swap = from;
    from = to;
    to = swap;
  }
}

int64_t select(const GatherTopk& p, const Row& row, int64_t image) {
  int64_t* selected = p.selected + image * p.tokens;
  read_keys(p, image, row.keys);
  if (p.budgets == nullptr) {
    const int64_t count = choose_by_threshold(p, row.keys, image, selected);
    if (p.by_score) sort_by_score(row, selected, count);
    return count;
  }
  if (p.keep != nullptr) apply_keep(p, image, p.budgets[image], row.keys);
  const int64_t count = choose(row.keys, p.tokens, p.budgets[image], selected);
  if (!p.by_score) return count;
  if (p.keep != nullptr) read_keys(p, image, row.keys);
  sort_by_score(row, selected, count);
  return count;
}

TK_INLINE int64_t extra_rows(const GatherTopk& p) { return p.prefix + (p.fuse != Fuse::kNone); }

TK_INLINE int64_t chosen_count(const GatherTopk& p, int64_t image) {
  return p.offsets[image + 1] - p.offsets[image] - extra_rows(p);
}

TK_INLINE float score_at(const void* scores, DType dtype, int64_t at) {
  float value = 0;
  dispatch(dtype,
           [&](auto zero) { value = to_float(static_cast<const decltype(zero)*>(scores)[at]); });
  return value;
}

// The score-weighted sum of the rows that were not chosen, in channel blocks that stay in
// registers; ascending tokens.
template <class T>
void fuse_dropped(const GatherTopk& p, const GatherTopk::Tensor& tensor, int64_t image) {
  const int64_t* selected = p.selected + image * p.tokens;
  const int64_t count = chosen_count(p, image);
  const int64_t channels = tensor.row_bytes / static_cast<int64_t>(sizeof(T));
  T* to = static_cast<T*>(tensor.to) + (p.offsets[image + 1] - 1) * channels;
  const char* rows = static_cast<const char*>(tensor.from) + image * tensor.batch_stride +
                     p.prefix * tensor.token_stride;
  bool* dropped = static_cast<bool*>(p.scratch) + image * p.tokens;
  std::memset(dropped, 1, static_cast<size_t>(p.tokens));
  for (int64_t i = 0; i < count; ++i) dropped[selected[i]] = false;
  constexpr int kVectors = 4;
  for (int64_t c = 0; c < channels; c += kVectors * kLanes) {
    Floats total[kVectors] = {};
    float weight = 0;
    for (int64_t n = 0; n < p.tokens; ++n) {
      if (!dropped[n]) continue;
      const float score = score_at(p.scores, p.scores_dtype,
                                   image * p.scores_batch_stride + n * p.scores_token_stride);
      const T* row = reinterpret_cast<const T*>(rows + n * tensor.token_stride);
      weight += score;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = c + v * kLanes;
        if (at < channels)
          total[v] +=
              load(row + at, static_cast<int>(smaller<int64_t>(channels - at, kLanes))) * score;
      }
    }
    if (p.fuse == Fuse::kMean && weight != 0) {
      for (Floats& value : total) value /= weight;
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c + v * kLanes;
      if (at < channels)
        store(to + at, total[v], static_cast<int>(smaller<int64_t>(channels - at, kLanes)));
    }
  }
}

// Output rows [begin, end) of one image, counted from its first.
void copy_rows(const GatherTopk& p, const GatherTopk::Tensor& tensor, int64_t image, int64_t begin,
               int64_t end, bool streaming) {
  const int64_t* selected = p.selected + image * p.tokens;
  const char* rows = static_cast<const char*>(tensor.from) + image * tensor.batch_stride;
  char* to = static_cast<char*>(tensor.to) + p.offsets[image] * tensor.row_bytes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i < p.prefix ? i : p.prefix + selected[i - p.prefix];
    copy_row(to + i * tensor.row_bytes, rows + token * tensor.token_stride, tensor.row_bytes,
             streaming);
  }
}

constexpr int64_t kRowsPerTask = 64;
// What the selection of an image takes per token, as bytes that would be moved meanwhile.
constexpr int64_t kSelectCost = 64;

}  // namespace

Status gather_topk_select(const GatherTopk& p, const Pool& pool) {
  const int64_t tasks = smaller<int64_t>(pool.threads, p.batch);
  parallel_for(pool, tasks, grain_of(kSelectCost * p.tokens * p.batch / larger<int64_t>(tasks, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   for (int64_t image = p.batch * task / tasks;
                        image < p.batch * (task + 1) / tasks; ++image) {
                     p.offsets[image + 1] = select(p, row_of(p, task), image) + extra_rows(p);
                   }
                 }
               });
  p.offsets[0] = 0;
  for (int64_t image = 0; image < p.batch; ++image) p.offsets[image + 1] += p.offsets[image];
  return Status::kOk;
}

int64_t gather_topk_select_scratch(const GatherTopk& p, int threads) {
  return threads * row_bytes(p.tokens);
}

Status gather_topk(const GatherTopk& p, const Pool& pool) {
  int64_t most = 0, bytes = 0;
  for (int64_t image = 0; image < p.batch; ++image) most = larger(most, chosen_count(p, image));
  for (int t = 0; t < p.tensor_count; ++t) bytes += p.offsets[p.batch] * p.tensors[t].row_bytes;
  const bool streaming = bytes > kStreamingBytes;
  const int64_t blocks = ceil_div(p.prefix + most, kRowsPerTask), tasks = p.batch * blocks;
  parallel_for(
      pool, tasks, grain_of(bytes / larger<int64_t>(tasks, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t image = task / blocks, first = task % blocks * kRowsPerTask;
          const int64_t last = smaller(first + kRowsPerTask, p.prefix + chosen_count(p, image));
          for (int t = 0; t < p.tensor_count; ++t)
            copy_rows(p, p.tensors[t], image, first, last, streaming);
        }
        if (streaming) streaming_done();
      });
  for (int64_t image = 0, at = 0; image < p.batch; ++image) {
    const int64_t count = chosen_count(p, image);
    std::memcpy(p.index + at, p.selected + image * p.tokens,
                sizeof(int64_t) * static_cast<size_t>(count));
    at += count;
  }
  if (p.fuse == Fuse::kNone) return Status::kOk;
  parallel_for(
      pool, p.batch, grain_of(p.tokens * p.tensors[0].row_bytes), [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) {
          for (int t = 0; t < p.tensor_count; ++t) {
            dispatch(p.tensors[t].dtype,
                     [&](auto zero) { fuse_dropped<decltype(zero)>(p, p.tensors[t], image); });
          }
        }
      });
  return Status::kOk;
}

int64_t gather_topk_scratch(const GatherTopk& p, int) {
  return p.fuse == Fuse::kNone ? 0 : p.batch * p.tokens;
}

}  // namespace tk::TK_ISA
