// merge_runs on the CPU: compare every token with its predecessor, number the runs, write their
// means; one stretch after another, each out of the second-level caches.
#include "cpu/merge.h"

namespace tk::TK_ISA {
namespace {

// What a thread measures before it writes: about half of a second-level cache.
constexpr int64_t kPartBytes = int64_t{1} << 19;

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

// What a row has with the row before it.
struct Likeness {
  float dot;     // ⟨row, row before⟩
  float square;  // ‖row‖²
};

// What is multiplied at a time: kPair elements, of which the first `count` are there.
template <class T>
TK_INLINE Pair load_piece(const T* from, int count) {
  if (count == kPair) return load_pair(from);
  return {load_some(from, smaller(count, kLanes)),
          load_some(from + kLanes, larger(count - kLanes, 0))};
}

TK_INLINE Floats add_products(Floats sum, Pair a, Pair b) {
  sum += a.a * b.a;
  sum += a.b * b.b;
  return sum;
}

#if defined(__AVX512BF16__)
// Products of bfloat16, added in float32, count what is below 2^-126 as zero: nothing beside the
// smallest norm, which such cosines are divided by.
TK_INLINE __m512bh load_piece(const BFloat16* from, int count) {
  const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(there, from));
}

TK_INLINE Floats add_products(Floats sum, __m512bh a, __m512bh b) {
  return _mm512_dpbf16_ps(sum, a, b);
}
#endif

// Rows come as one stream, each still in the first-level cache when it is the row before. What lies
// `ahead` elements further on is asked for in good time.
template <class T>
TK_INLINE Likeness compare(const T* row, const T* before, int64_t channels, int64_t ahead) {
  constexpr int kPieces = 4;
  Floats dots[kPieces] = {}, squares[kPieces] = {};
  const auto add = [&](int64_t c, int count, int piece) {
    const auto value = load_piece(row + c, count);
    for (int line = 0; line < kPair; line += static_cast<int>(64 / sizeof(T)))
      __builtin_prefetch(row + c + ahead + line, 0, 3);
    dots[piece] = add_products(dots[piece], value, load_piece(before + c, count));
    squares[piece] = add_products(squares[piece], value, value);
  };
  int64_t c = 0;
  for (; c + kPieces * kPair <= channels; c += kPieces * kPair) {
#pragma GCC unroll 8
    for (int piece = 0; piece < kPieces; ++piece) add(c + piece * kPair, kPair, piece);
  }
  for (; c + kPair <= channels; c += kPair) add(c, kPair, 0);
  if (c < channels) add(c, static_cast<int>(channels - c), 0);
  return {sum((dots[0] + dots[1]) + (dots[2] + dots[3])),
          sum((squares[0] + squares[1]) + (squares[2] + squares[3]))};
}

TK_INLINE float norm_of(float square) { return larger(square_root(square), kSmallestNorm); }

// index[t] becomes 1 where token t is like its predecessor, else 0; a prefix token and the one
// behind it are like nobody.
template <class T>
void measure(const MergeRuns& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end;) {
    const int64_t image = t / p.length, position = t % p.length;
    if (position <= p.prefix) {
      p.index[t++] = 0;
      continue;
    }
    const T* row = token<T>(p, image, position);
    const T* before = row - p.token_stride;
    float norm_before = norm_of(compare(before, before, p.channels, 0).square);
    const int64_t last = smaller(end, t - position + p.length);
    for (; t < last; ++t) {
      const Likeness like = compare(row, before, p.channels, 2 * p.token_stride);
      const float norm = norm_of(like.square);
      p.index[t] = like.dot / (norm * norm_before) >= p.threshold;
      norm_before = norm;
      before = row;
      row += p.token_stride;
    }
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

// Stretch after stretch, measured, numbered, written: every thread writes its part of one while the
// part still lies in its own cache, and in the same go measures its part of the next. A run that is
// open at the end of a stretch is written with the next one.
template <class T>
void merge_batch(const MergeRuns& p, const Pool& pool) {
  const int64_t bytes = 1 + size_of(p.dtype) * p.channels, tokens = p.batch * p.length;
  if (tokens == 0) return;
  const int64_t parts = smaller<int64_t>(pool.threads, 1 + tokens * bytes / kGrainBytes);
  const int64_t stretch = parts * (1 + kPartBytes / bytes);
  Progress open{-1, 0, 0};
  int64_t begin = 0, end = 0, unwritten = 0;
  do {
    const int64_t closed = end == tokens ? end : open.start;
    begin = end;
    end = smaller(begin + stretch, tokens);
    parallel_for(pool, parts, 1, [&](int64_t from, int64_t to) {
      const auto share = [&](int64_t first, int64_t last, int64_t part) {
        return first + (last - first) * part / parts;
      };
      write<T>(p, share(unwritten, closed, from), share(unwritten, closed, to));
      measure<T>(p, share(begin, end, from), share(begin, end, to));
    });
    unwritten = closed;
    number(p, begin, end, open);
  } while (unwritten < tokens);
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
