// merge_runs on the CPU: compare every token with its predecessor, number the runs, write their
// means; one stretch after another.
#include "cpu/merge.h"

namespace tk::TK_ISA {
namespace {

template <class T>
TK_INLINE const T* token(const MergeRuns& p, int64_t image, int64_t position) {
  return static_cast<const T*>(p.x) + image * p.batch_stride + position * p.token_stride;
}

TK_INLINE float size_of_token(const MergeRuns& p, int64_t image, int64_t position) {
  return p.size == nullptr ? 1.0f
                           : p.size[image * p.size_batch_stride + position * p.size_token_stride];
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

// What kTokens consecutive rows have with the row before each.
template <int kTokens>
struct Likeness {
  float dot[kTokens];     // ⟨row, row before⟩
  float square[kTokens];  // ‖row‖²
};

// The sums of a row are added in one order, whatever its place among the rows. Several rows at once
// look like no stream to the processor, so those `ahead` elements further on are asked for in good
// time.
template <int kTokens, class T>
TK_INLINE Likeness<kTokens> compare(const T* const (&rows)[kTokens + 1], int64_t channels,
                                    int64_t ahead) {
  Floats dots[kTokens] = {}, squares[kTokens] = {};
  int64_t c = 0;
  for (; c + kPair <= channels; c += kPair) {
    Pair before = load_pair(rows[0] + c);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
      const Pair value = load_pair(rows[i + 1] + c);
      __builtin_prefetch(rows[i + 1] + c + ahead, 0, 2);
      dots[i] += value.a * before.a;
      dots[i] += value.b * before.b;
      squares[i] += value.a * value.a;
      squares[i] += value.b * value.b;
      before = value;
    }
  }
  for (; c < channels; c += kLanes) {
    const int count = lanes_left(channels, c);
    for (int i = 0; i < kTokens; ++i) {
      const Floats value = load_some(rows[i + 1] + c, count);
      dots[i] += value * load_some(rows[i] + c, count);
      squares[i] += value * value;
    }
  }
  Likeness<kTokens> like;
  for (int i = 0; i < kTokens; ++i) {
    like.dot[i] = sum(dots[i]);
    like.square[i] = sum(squares[i]);
  }
  return like;
}

TK_INLINE float norm_of(float square) { return larger(square_root(square), kSmallestNorm); }

// Says of kTokens tokens from `position` on whether they are like their predecessors, given the
// norm of the first one's.
template <int kTokens, class T>
TK_INLINE void measure_some(const MergeRuns& p, int64_t image, int64_t position, int64_t* alike,
                            float& norm_before) {
  const T* rows[kTokens + 1];
  for (int i = 0; i <= kTokens; ++i) rows[i] = token<T>(p, image, position - 1 + i);
  const Likeness<kTokens> like = compare<kTokens>(rows, p.channels, kTokens * p.token_stride);
  for (int i = 0; i < kTokens; ++i) {
    const float norm = norm_of(like.square[i]);
    alike[i] = like.dot[i] / (norm * norm_before) >= p.threshold;
    norm_before = norm;
  }
}

// index[t] becomes 1 where token t is like its predecessor, else 0; a prefix token and the one
// behind it are like nobody.
template <class T>
void measure(const MergeRuns& p, int64_t begin, int64_t end) {
  constexpr int kGroup = 4;
  for (int64_t t = begin; t < end;) {
    const int64_t image = t / p.length, position = t % p.length;
    if (position <= p.prefix) {
      p.index[t++] = 0;
      continue;
    }
    const T* before = token<T>(p, image, position - 1);
    float norm = norm_of(compare<1>({before, before}, p.channels, p.token_stride).square[0]);
    const int64_t last = smaller(end, t - position + p.length);
    for (; t + kGroup <= last; t += kGroup)
      measure_some<kGroup, T>(p, image, t - image * p.length, p.index + t, norm);
    for (; t < last; ++t) measure_some<1, T>(p, image, t - image * p.length, p.index + t, norm);
  }
}

// Where the numbering of the runs stands.
struct Progress {
  int64_t row;      // of the open run: of the batch, or within its image if padded
  int64_t members;  // tokens in the open run
  int64_t start;    // its first token
};

// index[t] becomes the output row of token t. Whether a token joins is not to be foreseen, so
// nothing branches on it.
void number(const MergeRuns& p, int64_t begin, int64_t end, Progress& open) {
  for (int64_t t = begin; t < end;) {
    const int64_t image = t / p.length, behind = (image + 1) * p.length;
    if (t == image * p.length && p.padded) open.row = -1;
    Progress run = open;
    for (const int64_t last = smaller(end, behind); t < last; ++t) {
      const int64_t joins = p.index[t] & (run.members < p.max_run);
      run.row += 1 - joins;
      run.start += (joins - 1) & (t - run.start);
      run.members = (run.members & -joins) + 1;
      p.index[t] = run.row;
    }
    open = run;
    if (t == behind)
      p.offsets[image + 1] = p.padded ? p.offsets[image] + open.row + 1 : open.row + 1;
  }
}

// The run of `count` tokens that begins at `position`, into row `row` of the output.
template <class T>
void merge_run(const MergeRuns& p, int64_t image, int64_t position, int64_t count, int64_t row,
               bool streaming) {
  T* to = static_cast<T*>(p.tokens) + row * p.channels;
  float total = 0.0f;
  for (int64_t i = position; i < position + count; ++i) total += size_of_token(p, image, i);
  p.merged_size[row] = total;
  if (count == 1) return copy_token(to, token<T>(p, image, position), p.channels, streaming);
  weighted_mean(to, total, p.channels, streaming, [&](const auto& add) {
    for (int64_t i = position; i < position + count; ++i)
      add(token<T>(p, image, i), size_of_token(p, image, i));
  });
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
  parallel_for(pool, p.batch, grain_of(p.length * bytes), [&](int64_t from, int64_t to) {
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
  const int64_t tokens = p.batch * p.length, stretch = 1 + kStretchBytes / bytes,
                grain = 1 + kGrainBytes / bytes;
  Progress open{-1, 0, 0};
  for (int64_t begin = 0; begin < tokens; begin += stretch) {
    const int64_t end = smaller(begin + stretch, tokens), unwritten = open.start;
    parallel_for(pool, end - begin, grain,
                 [&](int64_t from, int64_t to) { measure<T>(p, begin + from, begin + to); });
    number(p, begin, end, open);
    const int64_t closed = end == tokens ? end : open.start;
    parallel_for(pool, closed - unwritten, grain,
                 [&](int64_t from, int64_t to) { write<T>(p, unwritten + from, unwritten + to); });
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
