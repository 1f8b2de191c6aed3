// merge_runs on a GPU, in one pass: blocks compare the tokens of a chunk with their predecessors,
// look back for the run that is open there, and write the runs that end in the chunk.
#include "cuda/merge.cuh"

namespace tk {
namespace {

constexpr int kChunk = 32;  // tokens: one bit each of a word
constexpr int kWarps = cuda::kThreads / cuda::kWarp;
constexpr int kSpan = kChunk / kWarps;  // tokens that a warp compares
// Resident on a multiprocessor, so that what they read twice stays in the second cache.
constexpr int blocks_each(bool vectors) { return vectors ? 3 : 2; }

constexpr uint64_t kOwn = uint64_t{1} << 62;    // what a chunk has; packed
constexpr uint64_t kWhole = uint64_t{1} << 63;  // `closed` and `open` are written

struct Chunks {
  int64_t count, per_image, max_run;
  uint64_t* words;  // (count), and the ticket
  int64_t* closed;  // (count) runs up to the last break before the chunk's end
  int64_t* open;    // (count) tokens from that break on
};

Chunks chunks_of(const MergeRuns& p) {
  Chunks s{};
  s.per_image = (p.length + kChunk - 1) / kChunk;
  s.count = p.batch * s.per_image;
  s.max_run = p.max_run < p.length ? p.max_run : p.length;
  s.words = static_cast<uint64_t*>(p.scratch);
  s.closed = reinterpret_cast<int64_t*>(s.words + s.count + 1);
  s.open = s.closed + s.count;
  return s;
}

// A stretch of tokens cut at its breaks, the tokens unlike their predecessors. A chain, from break
// to break, is cut into runs of max_run.
struct Stretch {
  int64_t lead;     // tokens before the first break
  int64_t between;  // runs between the first and the last break
  int64_t tail;     // tokens from the last break on; 0: no break
};

__device__ int64_t runs_of(int64_t tokens, int64_t max_run) {
  return (tokens + max_run - 1) / max_run;
}

__device__ Stretch join(const Stretch& a, const Stretch& b, int64_t max_run) {
  if (a.tail == 0) return {a.lead + b.lead, b.between, b.tail};
  if (b.tail == 0) return {a.lead, a.between, a.tail + b.lead};
  return {a.lead, a.between + runs_of(a.tail + b.lead, max_run) + b.between, b.tail};
}

// What a warp sees of its span: bit i for token first + i, set where it is a break.
template <class T, bool kVectors>
__device__ uint32_t breaks_of_span(const MergeRuns& p, int64_t image, int64_t first) {
  float dots[kSpan] = {}, squares[kSpan + 1] = {};
  const T* before = cuda::row_of_token<T>(p, image, first - 1);
  const bool compares = first + kSpan > p.prefix + 1 && first < p.length;
  for (int64_t c = cuda::lane() * cuda::kWide<T>; compares && c < p.channels; c += cuda::kStep<T>) {
    cuda::Piece<T> pieces[kSpan + 1] = {};
#pragma unroll
    for (int i = 0; i <= kSpan; ++i) {
      if (first - 1 + i >= p.prefix && first - 1 + i < p.length)
        pieces[i] = cuda::load_piece<T, kVectors>(before + i * p.token_stride, c, p.channels);
    }
#pragma unroll
    for (int w = 0; w < cuda::kWide<T>; ++w) {
      float last = cuda::widen(pieces[0].at[w]);
      squares[0] += last * last;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const float value = cuda::widen(pieces[i + 1].at[w]);
        dots[i] += value * last;
        squares[i + 1] += value * value;
        last = value;
      }
    }
  }
  uint32_t breaks = 0;
  float norm_before = cuda::norm_of(cuda::warp_sum(squares[0]));
#pragma unroll
  for (int i = 0; i < kSpan; ++i) {
    const float norm = cuda::norm_of(cuda::warp_sum(squares[i + 1]));
    const float cosine = cuda::warp_sum(dots[i]) / (norm * norm_before);
    if (first + i <= p.prefix || !(cosine >= p.threshold)) breaks |= 1u << i;
    norm_before = norm;
  }
  return breaks;
}

// The stretch of one chunk, from the word of its breaks.
__device__ Stretch stretch_of(uint32_t breaks, int tokens, int64_t max_run) {
  if (breaks == 0) return {tokens, 0, 0};
  const uint32_t below = breaks & cuda::lanes_below();
  int32_t runs = 0;
  if ((breaks >> cuda::lane() & 1u) != 0 && below != 0)
    runs = static_cast<int32_t>(runs_of(cuda::lane() - cuda::highest_bit(below), max_run));
  return {cuda::lowest_bit(breaks), cuda::reduce_add(runs), tokens - cuda::highest_bit(breaks)};
}

// All tokens of the batch before chunk `number`, whose own stretch is `mine`; by one warp. The
// first token of an image is a break, so that images need no borders.
__device__ Stretch look_back(const Chunks& s, int64_t number, const Stretch& mine) {
  if (cuda::lane() == 0) {
    const int64_t packed = mine.between << 16 | mine.lead << 8 | mine.tail;
    cuda::store_release(s.words + number, kOwn | static_cast<uint64_t>(packed));
  }
  Stretch before{0, 0, 0};
  for (int64_t behind = number; behind > 0; behind -= cuda::kWarp) {
    const int64_t at = behind - 1 - cuda::lane();
    uint64_t word = kOwn;
    if (at >= 0) {
      cuda::wait_until([&] {
        word = cuda::load_acquire(s.words + at);
        return word != 0;
      });
    }
    const cuda::Lanes whole = cuda::ballot(word >= kWhole);
    Stretch some{0, 0, 0};
    if (whole == 0 || cuda::lane() <= cuda::lowest_bit(whole)) {
      const auto packed = static_cast<int64_t>(word & (kOwn - 1));
      some = {packed >> 8 & 255, packed >> 16, packed & 255};
      if (word >= kWhole) some = {0, s.closed[at], s.open[at]};
    }
    for (int by = 1; by < cuda::kWarp; by *= 2) {
      const Stretch earlier{cuda::shuffle_down(some.lead, by), cuda::shuffle_down(some.between, by),
                            cuda::shuffle_down(some.tail, by)};
      if (cuda::lane() + by < cuda::kWarp) some = join(earlier, some, s.max_run);
    }
    const Stretch window{cuda::shuffle(some.lead, 0), cuda::shuffle(some.between, 0),
                         cuda::shuffle(some.tail, 0)};
    before = join(window, before, s.max_run);
    if (whole != 0) break;
  }
  if (cuda::lane() == 0) {
    const Stretch all = join(before, mine, s.max_run);
    s.closed[number] = all.between;
    s.open[number] = all.tail;
    cuda::store_release(s.words + number, kWhole);
  }
  return before;
}

// How many runs the images before have, which is known where this image begins.
__device__ int64_t runs_before_image(const Chunks& s, int64_t image) {
  const int64_t last = image * s.per_image - 1;
  if (last < 0) return 0;
  cuda::wait_until([&] { return cuda::load_acquire(s.words + last) >= kWhole; });
  return s.closed[last] + runs_of(s.open[last], s.max_run);
}

// What one warp finds out for the block.
struct Found {
  int64_t first_row;  // of the runs that end here, as they lie in `tokens`
  int64_t zero_row;   // padded: the first of `zeros` rows to clear
  int runs, zeros;
  int64_t begin[kChunk + 2];  // where each run that ends here begins; behind the last one, its end
};

// Numbers the runs of a chunk of an image; by one warp. A run is written where it ends, so that
// nobody waits for a block that started later.
__device__ void number_runs(const MergeRuns& p, const Chunks& s, int64_t number, uint32_t breaks,
                            Found& found) {
  const int64_t image = number / s.per_image, first = number % s.per_image * kChunk;
  const int64_t left = p.length - first;
  const int tokens = left < kChunk ? static_cast<int>(left) : kChunk, lane = cuda::lane();
  const Stretch before = look_back(s, number, stretch_of(breaks, tokens, s.max_run));
  const int64_t runs_before = before.between + runs_of(before.tail, s.max_run);
  const uint32_t up_to_me = breaks & (cuda::lanes_below() | 1u << lane);
  const int64_t from_break =
      up_to_me != 0 ? lane - cuda::highest_bit(up_to_me) : before.tail + lane;
  const bool begins = lane < tokens && from_break % s.max_run == 0;
  const uint32_t all = cuda::ballot(begins);
  const int below = cuda::count_bits(all & cuda::lanes_below()), many = cuda::count_bits(all);
  const int64_t base = p.padded ? runs_before_image(s, image) : 0;
  if (lane < tokens)
    p.index[image * p.length + first + lane] = runs_before - base + below + begins - 1;

  const int open = first > 0;  // a run is open where the chunk begins
  const bool last = left <= kChunk;
  if (begins) found.begin[below + open] = first + lane;
  if (lane == 0) {
    if (open) found.begin[0] = first - ((before.tail - 1) % s.max_run + 1);
    if (last) found.begin[many + open] = p.length;
    found.runs = many + open - !last;
    found.first_row = runs_before - open - base + (p.padded ? image * p.length : 0);
    found.zeros = p.padded ? tokens - many : 0;
    found.zero_row = (image + 1) * p.length - (first - (runs_before - base)) - found.zeros;
    if (first == 0) p.offsets[image] = runs_before;
    if (number == s.count - 1) p.offsets[p.batch] = runs_before + many;
  }
}

template <class T>
struct RunWalk {
  const MergeRuns& p;
  int64_t image, position;

  __device__ const T* row() const { return cuda::row_of_token<T>(p, image, position); }
  __device__ float weight() const { return cuda::size_of_token(p, image, position); }
  __device__ void next() { ++position; }
};

template <class T, bool kVectors>
__device__ void write_run(const MergeRuns& p, int64_t image, int64_t begin, int64_t end,
                          int64_t row) {
  float total = 0;
  for (int64_t i = begin + cuda::lane(); i < end; i += cuda::kWarp)
    total += cuda::size_of_token(p, image, i);
  total = cuda::warp_sum(total);
  T* to = static_cast<T*>(p.tokens) + row * p.channels;
  if (cuda::lane() == 0) p.merged_size[row] = total;
  const T* from = cuda::row_of_token<T>(p, image, begin);
  if (end - begin == 1) return cuda::copy_row<T, kVectors>(to, from, p.channels);
  cuda::mean_row<T, kVectors>(to, total, p.channels, end - begin, RunWalk<T>{p, image, begin});
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(cuda::kThreads, blocks_each(kVectors))
    merge_runs_kernel(const __grid_constant__ MergeRuns p, const __grid_constant__ Chunks s) {
  cuda::Arena arena;
  uint32_t* slot = arena.shared<uint32_t>(1);
  uint32_t* spans = arena.shared<uint32_t>(kWarps);
  Found* found = arena.shared<Found>(1);
  auto* counter = reinterpret_cast<uint32_t*>(s.words + s.count);
  for (int64_t number = cuda::ticket(counter, slot); number < s.count;
       number = cuda::ticket(counter, slot)) {
    const int64_t image = number / s.per_image, first = number % s.per_image * kChunk;
    const uint32_t mine =
        breaks_of_span<T, kVectors>(p, image, first + cuda::warp() * int64_t{kSpan});
    if (cuda::lane() == 0) spans[cuda::warp()] = mine << cuda::warp() * kSpan;
    cuda::sync();
    if (cuda::warp() == 0) {
      const uint32_t span = cuda::lane() < kWarps ? spans[cuda::lane()] : 0;
      const int64_t left = p.length - first;
      const uint32_t there = cuda::first_lanes(left < kChunk ? static_cast<int>(left) : kChunk);
      number_runs(p, s, number, cuda::reduce_or(span) & there, *found);
    }
    cuda::sync();
    for (int run = cuda::warp(); run < found->runs; run += kWarps)
      write_run<T, kVectors>(p, image, found->begin[run], found->begin[run + 1],
                             found->first_row + run);
    for (int i = cuda::warp(); i < found->zeros; i += kWarps) {
      const int64_t row = found->zero_row + i;
      cuda::copy_row<T, kVectors>(static_cast<T*>(p.tokens) + row * p.channels, nullptr,
                                  p.channels);
      if (cuda::lane() == 0) p.merged_size[row] = 0;
    }
    cuda::sync();
  }
}

}  // namespace

int64_t merge_runs_cuda_scratch(const MergeRuns& p) {
  return (3 * chunks_of(p).count + 1) * int64_t{sizeof(uint64_t)};
}

const char* merge_runs_cuda(const MergeRuns& p, void* stream) {
  const Chunks s = chunks_of(p);
  if (s.count == 0) return cuda::zero(p.offsets, (p.batch + 1) * int64_t{sizeof(int64_t)}, stream);
  const char* error = cuda::zero(s.words, (s.count + 1) * int64_t{sizeof(uint64_t)}, stream);
  if (error != nullptr) return error;
  const bool vectors = cuda::moves_pieces(p);
  const cuda::Launch how{
      .blocks = cuda::blocks_for(s.count, 1, blocks_each(vectors) * cuda::multiprocessors()),
      .threads = cuda::kThreads,
      .shared = cuda::shared_bytes<uint32_t>(1) + cuda::shared_bytes<uint32_t>(kWarps) +
                cuda::shared_bytes<Found>(1),
      .stream = stream};
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    error = vectors ? cuda::launch<merge_runs_kernel<T, true>>(how, p, s)
                    : cuda::launch<merge_runs_kernel<T, false>>(how, p, s);
  });
  return error;
}

}  // namespace tk
