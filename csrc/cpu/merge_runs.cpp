// merge_runs on the CPU: compare every token with its predecessor, number the runs, write their means; one stretch after another.
#include "cpu/merge.h"

namespace tk::TK_ISA {
namespace {

template <class T>
TK_INLINE const T* token(const MergeRuns& p, int64_t image, int64_t position) {
  return static_cast<const T*>(p.x) + image * p.batch_stride + position * p.token_stride;
}

TK_INLINE float size_of_token(const MergeRuns& p, int64_t image, int64_t position) {
  return p.size == nullptr ? 1.0f : p.size[image * p.size_batch_stride + position * p.size_token_stride];
}

// Calls body(image, position, token) for the tokens [begin, end) of the batch.
template <class Body>
TK_INLINE void each_token(const MergeRuns& p, int64_t begin, int64_t end, const Body& body) {
  int64_t image = begin / p.length, position = begin % p.length;
  for (int64_t t = begin; t < end; ++t) {
    body(image, position, t);
    if (++position == p.length) {
      position = 0;
      ++image;
    }
  }
}

struct Likeness {
  float dot;     // ⟨row, before⟩
  float square;  // ‖row‖²
};

template <class T>
TK_INLINE Likeness compare(const T* row, const T* before, int64_t channels) {
  Floats dots[4] = {}, squares[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Floats value = load(row + c + v * kLanes);
      dots[v] += value * load(before + c + v * kLanes);
      squares[v] += value * value;
    }
  }
  for (; c < channels; c += kLanes) {
    const int count = static_cast<int>(smaller<int64_t>(kLanes, channels - c));
    const Floats value = load_some(row + c, count);
    dots[0] += value * load_some(before + c, count);
    squares[0] += value * value;
  }
  return {sum((dots[0] + dots[1]) + (dots[2] + dots[3])), sum((squares[0] + squares[1]) + (squares[2] + squares[3]))};
}

// index[t] becomes 1 where token t is like its predecessor, else 0; a prefix token and the one behind it are like nobody.
template <class T>
void measure(const MergeRuns& p, int64_t begin, int64_t end) {
  float norm_before = -1.0f;  // not known
  each_token(p, begin, end, [&](int64_t image, int64_t position, int64_t t) {
    p.index[t] = 0;
    if (position <= p.prefix) {
      norm_before = -1.0f;
      return;
    }
    const T* before = token<T>(p, image, position - 1);
    if (norm_before < 0.0f) norm_before = larger(square_root(sum_of_squares(before, p.channels)), kSmallestNorm);
    const Likeness like = compare(token<T>(p, image, position), before, p.channels);
    const float norm = larger(square_root(like.square), kSmallestNorm);
    p.index[t] = like.dot / (norm * norm_before) >= p.threshold;
    norm_before = norm;
  });
}

// Where the numbering of the runs stands.
struct Progress {
  int64_t row;      // of the open run: of the batch, or within its image if padded
  int64_t members;  // tokens in the open run
  int64_t start;    // its first token
};

// index[t] becomes the output row of token t.
void number(const MergeRuns& p, int64_t begin, int64_t end, Progress& open) {
  each_token(p, begin, end, [&](int64_t image, int64_t position, int64_t t) {
    const bool joins = p.index[t] != 0 && open.members < p.max_run;
    if (position == 0 && p.padded) open.row = -1;
    if (!joins) {
      ++open.row;
      open.members = 0;
      open.start = t;
    }
    ++open.members;
    p.index[t] = open.row;
    if (position == p.length - 1) p.offsets[image + 1] = p.padded ? p.offsets[image] + open.row + 1 : open.row + 1;
  });
}

// The run of `count` tokens that begins at `position`, into row `row` of the output.
template <class T>
void merge_run(const MergeRuns& p, int64_t image, int64_t position, int64_t count, int64_t row, bool streaming) {
  T* to = static_cast<T*>(p.tokens) + row * p.channels;
  float total = 0.0f;
  for (int64_t i = position; i < position + count; ++i) total += size_of_token(p, image, i);
  p.merged_size[row] = total;
  if (count == 1) return copy_token(to, token<T>(p, image, position), p.channels, streaming);
  weighted_sum<T>(
      p.channels,
      [&](const auto& add) {
        for (int64_t i = position; i < position + count; ++i) add(token<T>(p, image, i), size_of_token(p, image, i));
      },
      [&](int64_t c, Floats value, int lanes) { store_some(to + c, value / splat(total), lanes); });
}

// The runs that begin among the tokens [begin, end).
template <class T>
void write(const MergeRuns& p, int64_t begin, int64_t end) {
  const bool streaming = p.batch * p.length * p.channels * size_of(p.dtype) > kStreamingBytes;
  each_token(p, begin, end, [&](int64_t image, int64_t position, int64_t t) {
    const int64_t row = p.index[t];
    if (position > 0 && p.index[t - 1] == row) return;
    int64_t count = 1;
    while (position + count < p.length && p.index[t + count] == row) ++count;
    merge_run<T>(p, image, position, count, p.padded ? image * p.length + row : row, streaming);
  });
  streaming_done();
}

// Zeros behind the last run of every image.
void pad(const MergeRuns& p, const Pool& pool) {
  const int64_t bytes = size_of(p.dtype) * p.channels;
  parallel_for(pool, p.batch, 1, [&](int64_t from, int64_t to) {
    for (int64_t image = from; image < to; ++image) {
      const int64_t runs = p.offsets[image + 1] - p.offsets[image];
      const int64_t row = image * p.length + runs;
      const auto rows = static_cast<size_t>(p.length - runs);
      std::memset(static_cast<char*>(p.tokens) + row * bytes, 0, rows * static_cast<size_t>(bytes));
      std::memset(p.merged_size + row, 0, rows * sizeof(float));
    }
  });
}

// A run that is open at the end of a stretch is written with the next one.
template <class T>
void merge_batch(const MergeRuns& p, const Pool& pool) {
  const int64_t bytes = 1 + size_of(p.dtype) * p.channels;
  const int64_t tokens = p.batch * p.length, stretch = 1 + kStretchBytes / bytes, grain = 1 + kGrainBytes / bytes;
  Progress open{-1, 0, 0};
  for (int64_t begin = 0; begin < tokens; begin += stretch) {
    const int64_t end = smaller(begin + stretch, tokens), unwritten = open.start;
    parallel_for(pool, end - begin, grain, [&](int64_t from, int64_t to) { measure<T>(p, begin + from, begin + to); });
    number(p, begin, end, open);
    const int64_t closed = end == tokens ? end : open.start;
    parallel_for(pool, closed - unwritten, grain, [&](int64_t from, int64_t to) {
      write<T>(p, unwritten + from, unwritten + to);
    });
  }
  if (p.padded) pad(p, pool);
}

}  // namespace

int64_t merge_runs_scratch(const MergeRuns&, int) { return 0; }

Status merge_runs(const MergeRuns& p, const Pool& pool) {
  for (int64_t image = 0; image <= p.batch; ++image) p.offsets[image] = 0;
  dispatch(p.dtype, [&](auto zero) { merge_batch<decltype(zero)>(p, pool); });
  return Status::kOk;
}

}  // namespace tk::TK_ISA
