// gather_topk on the CPU: radix selection with lowest-index ties, then one pass that moves the chosen rows of every tensor.
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

using Fuse = GatherTopk::Fuse;

// Order of floats as order of integers: NaN lowest, −0 equal to +0.
TK_INLINE uint32_t ordered(float score) {
  if (score != score) return 0;
  const uint32_t bits = bits_of(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Row {
  uint32_t* keys;     // (N), ordered scores
  uint32_t* swap;     // (N), for sorting
  int64_t* selected;  // (N), the result
  int64_t* other;     // (N), for sorting
};

constexpr int64_t kRowBytes = 2 * sizeof(uint32_t) + sizeof(int64_t);

TK_INLINE Row row_of(const GatherTopk& p, int64_t task, int64_t image) {
  char* base = static_cast<char*>(p.scratch) + task * kRowBytes * p.tokens;
  int64_t* other = reinterpret_cast<int64_t*>(base);
  uint32_t* keys = reinterpret_cast<uint32_t*>(other + p.tokens);
  return {keys, keys + p.tokens, p.selected + image * p.tokens, other};
}

template <class T>
void read_keys(const GatherTopk& p, int64_t image, uint32_t* keys) {
  const T* scores = static_cast<const T*>(p.scores) + image * p.scores_batch_stride;
  for (int64_t n = 0; n < p.tokens; ++n) keys[n] = ordered(to_float(scores[n * p.scores_token_stride]));
}

// The bar that the chosen `need` of the candidates clear: all keys above `key`, and the first `ties` of those equal to it.
struct Bar {
  uint32_t key;
  int64_t ties;
};

template <class Candidate>
Bar find_bar(const uint32_t* keys, int64_t tokens, int64_t need, const Candidate& candidate) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t n = 0; n < tokens; ++n) {
      if ((keys[n] & mask) == prefix && candidate(n)) ++histogram[(keys[n] >> shift) & 255u];
    }
    uint32_t digit = 255;
    while (digit > 0 && histogram[digit] < need) need -= histogram[digit--];
    prefix |= digit << shift;
    mask |= 255u << shift;
  }
  return {prefix, need};
}

// Chosen tokens in ascending order; returns how many.
template <class Candidate, class Always>
int64_t choose(const Row& row, int64_t tokens, int64_t need, const Candidate& candidate, const Always& always) {
  const Bar bar = need > 0 ? find_bar(row.keys, tokens, need, candidate) : Bar{0xffffffffu, 0};
  int64_t count = 0, ties = bar.ties;
  for (int64_t n = 0; n < tokens; ++n) {
    bool chosen = always(n);
    if (!chosen && candidate(n)) chosen = row.keys[n] > bar.key || (row.keys[n] == bar.key && ties-- > 0);
    row.selected[count] = n;
    count += chosen;
  }
  return count;
}

int64_t choose_budget(const GatherTopk& p, const Row& row, int64_t image, int64_t budget) {
  if (p.keep == nullptr) {
    return choose(row, p.tokens, budget, [](int64_t) { return true; }, [](int64_t) { return false; });
  }
  const bool* keep = p.keep + image * p.keep_batch_stride;
  const int64_t stride = p.keep_token_stride;
  int64_t kept = 0;
  for (int64_t n = 0; n < p.tokens; ++n) kept += keep[n * stride];
  if (kept >= budget) {
    return choose(row, p.tokens, budget, [=](int64_t n) { return keep[n * stride]; }, [](int64_t) { return false; });
  }
  return choose(row, p.tokens, budget - kept, [=](int64_t n) { return !keep[n * stride]; },
                [=](int64_t n) { return keep[n * stride]; });
}

int64_t choose_threshold(const GatherTopk& p, const Row& row, int64_t image) {
  const uint32_t bar = ordered(p.threshold);
  int64_t count = 0;
  for (int64_t n = 0; n < p.tokens; ++n) {
    const bool kept = p.keep != nullptr && p.keep[image * p.keep_batch_stride + n * p.keep_token_stride];
    row.selected[count] = n;
    count += kept || (row.keys[n] >= bar && row.keys[n] != 0 && bar != 0);
  }
  return count;
}

// Stable descending radix sort of the chosen tokens by key: equal scores stay in ascending order.
void sort_by_score(const Row& row, int64_t count) {
  int64_t* from = row.selected;
  int64_t* to = row.other;
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t start[256] = {};
    for (int64_t i = 0; i < count; ++i) ++start[255u - ((row.keys[from[i]] >> shift) & 255u)];
    int64_t total = 0;
    for (int64_t& entry : start) {
      const int64_t here = entry;
      entry = total;
      total += here;
    }
    for (int64_t i = 0; i < count; ++i) to[start[255u - ((row.keys[from[i]] >> shift) & 255u)]++] = from[i];
    int64_t* swap = from;
    from = to;
    to = swap;
  }
}

TK_INLINE int64_t extra_rows(const GatherTopk& p) { return p.prefix + (p.fuse != Fuse::kNone); }

TK_INLINE int64_t chosen_count(const GatherTopk& p, int64_t image) {
  return p.offsets[image + 1] - p.offsets[image] - extra_rows(p);
}

TK_INLINE float score_at(const void* scores, DType dtype, int64_t at) {
  float value = 0;
  dispatch(dtype, [&](auto zero) { value = to_float(static_cast<const decltype(zero)*>(scores)[at]); });
  return value;
}

// The score-weighted sum of the rows that were not chosen, in channel blocks that stay in registers; ascending tokens.
template <class T>
void fuse_dropped(const GatherTopk& p, const GatherTopk::Tensor& tensor, int64_t image) {
  const int64_t* selected = p.selected + image * p.tokens;
  const int64_t count = chosen_count(p, image);
  const int64_t channels = tensor.row_bytes / static_cast<int64_t>(sizeof(T));
  T* to = static_cast<T*>(tensor.to) + (p.offsets[image + 1] - 1) * channels;
  const char* rows = static_cast<const char*>(tensor.from) + image * tensor.batch_stride + p.prefix * tensor.token_stride;
  bool* dropped = static_cast<bool*>(p.scratch) + image * p.tokens;
  std::memset(dropped, 1, static_cast<size_t>(p.tokens));
  for (int64_t i = 0; i < count; ++i) dropped[selected[i]] = false;
  constexpr int kVectors = 4;
  for (int64_t c = 0; c < channels; c += kVectors * kLanes) {
    Floats total[kVectors] = {};
    float weight = 0;
    for (int64_t n = 0; n < p.tokens; ++n) {
      if (!dropped[n]) continue;
      const float score = score_at(p.scores, p.scores_dtype, image * p.scores_batch_stride + n * p.scores_token_stride);
      const T* row = reinterpret_cast<const T*>(rows + n * tensor.token_stride);
      weight += score;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = c + v * kLanes;
        if (at < channels) total[v] += load(row + at, static_cast<int>(smaller<int64_t>(channels - at, kLanes))) * score;
      }
    }
    if (p.fuse == Fuse::kMean && weight != 0) {
      for (Floats& value : total) value /= weight;
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c + v * kLanes;
      if (at < channels) store(to + at, total[v], static_cast<int>(smaller<int64_t>(channels - at, kLanes)));
    }
  }
}

// Output rows [begin, end) of one image, counted from its first.
void copy_rows(const GatherTopk& p, const GatherTopk::Tensor& tensor, int64_t image, int64_t begin, int64_t end,
               bool streaming) {
  const int64_t* selected = p.selected + image * p.tokens;
  const char* rows = static_cast<const char*>(tensor.from) + image * tensor.batch_stride;
  char* to = static_cast<char*>(tensor.to) + p.offsets[image] * tensor.row_bytes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i < p.prefix ? i : p.prefix + selected[i - p.prefix];
    copy_row(to + i * tensor.row_bytes, rows + token * tensor.token_stride, tensor.row_bytes, streaming);
  }
}

constexpr int64_t kRowsPerTask = 64;

}  // namespace

Status gather_topk_select(const GatherTopk& p, const Pool& pool) {
  const int64_t tasks = smaller<int64_t>(pool.threads, p.batch);
  parallel_for(pool, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t image = p.batch * task / tasks; image < p.batch * (task + 1) / tasks; ++image) {
        const Row row = row_of(p, task, image);
        dispatch(p.scores_dtype, [&](auto zero) { read_keys<decltype(zero)>(p, image, row.keys); });
        const int64_t count = p.budgets ? choose_budget(p, row, image, p.budgets[image]) : choose_threshold(p, row, image);
        if (p.by_score) sort_by_score(row, count);
        p.offsets[image + 1] = count + extra_rows(p);
      }
    }
  });
  p.offsets[0] = 0;
  for (int64_t image = 0; image < p.batch; ++image) p.offsets[image + 1] += p.offsets[image];
  return Status::kOk;
}

int64_t gather_topk_select_scratch(const GatherTopk& p, int threads) { return threads * kRowBytes * p.tokens; }

Status gather_topk(const GatherTopk& p, const Pool& pool) {
  int64_t most = 0, bytes = 0;
  for (int64_t image = 0; image < p.batch; ++image) most = larger(most, chosen_count(p, image));
  for (int t = 0; t < p.tensor_count; ++t) bytes += p.offsets[p.batch] * p.tensors[t].row_bytes;
  const bool streaming = bytes > kStreamingBytes;
  const int64_t blocks = ceil_div(p.prefix + most, kRowsPerTask);
  parallel_for(pool, p.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * kRowsPerTask;
      const int64_t last = smaller(first + kRowsPerTask, p.prefix + chosen_count(p, image));
      for (int t = 0; t < p.tensor_count; ++t) copy_rows(p, p.tensors[t], image, first, last, streaming);
    }
    if (streaming) streaming_done();
  });
  for (int64_t image = 0, at = 0; image < p.batch; ++image) {
    const int64_t count = chosen_count(p, image);
    std::memcpy(p.index + at, p.selected + image * p.tokens, sizeof(int64_t) * static_cast<size_t>(count));
    at += count;
  }
  if (p.fuse == Fuse::kNone) return Status::kOk;
  parallel_for(pool, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      for (int t = 0; t < p.tensor_count; ++t) {
        dispatch(p.tensors[t].dtype, [&](auto zero) { fuse_dropped<decltype(zero)>(p, p.tensors[t], image); });
      }
    }
  });
  return Status::kOk;
}

int64_t gather_topk_scratch(const GatherTopk& p, int) { return p.fuse == Fuse::kNone ? 0 : p.batch * p.tokens; }

}  // namespace tk::TK_ISA
