// aggregate_logits on a GPU: a block streams tokens past 64 slots × 256 channels (128 of float32),
// logits as they lie, with the softmax carried along. Where that leaves most of a GPU idle they have
// 64 channels each, which changes no bit; every block repeats the softmax.
//
// Of every tile of tokens a warp owns the softmax of eight slots: exponentials take the place of
// the logits in shared memory, whence all warps multiply them with their share of the channels.
// Where there are many tokens they are split, and a second launch joins the sums. Exponentials are
// made again for every block of channels: they cost less than an exchange.
#include "cuda/aggregate.cuh"

namespace tk {
namespace {

using cuda::kSlots;
using cuda::kThreads;
using cuda::Rows;
using cuda::Shown;

constexpr int kWarps = kThreads / cuda::kWarp;
static_assert(kSlots == 8 * kWarps);

template <class T>
constexpr int kTile = sizeof(T) == 4 ? 32 : 64;  // tokens
template <class T>
constexpr int kWide = sizeof(T) == 4 ? 128 : 256;  // channels of a block
constexpr int kNarrow = 64;                        // the same where blocks are few
template <class T>
constexpr int kLogits = kTile<T> * cuda::tile_stride<T>(kSlots);
template <class T, int columns>
constexpr int kValues = kTile<T> * cuda::tile_stride<T>(columns);

constexpr int kTerms = 32;  // a longer loop unrolled takes more registers than there are

struct LogitsJob {
  AggregateLogits p;
  cuda::Partial partial;  // of one split nothing
  uint32_t across, down;  // blocks of channels, of slots
};

// What a lane knows of the softmax of two slots.
struct Pair {
  float highest[2] = {cuda::kNothing, cuda::kNothing};
  float total[2] = {};  // this lane's share
};

// Logits of a tile become exponentials; what older sums shrink by goes to `shrink`.
template <class T>
__device__ void rank_tile(T* tile, int first, const Shown& shown, Pair& pair, float* shrink) {
  constexpr int stride = cuda::tile_stride<T>(kSlots), each = kTile<T> / 8;
  const int slot = cuda::warp() * 8 + cuda::lane() % 4 * 2, row = cuda::lane() / 4;
  float top[2] = {pair.highest[0], pair.highest[1]}, shift[2];
  cuda::Vector<T, 2> scores[each];
#pragma unroll
  for (int i = 0; i < each; ++i) {
    scores[i] = cuda::load<cuda::Vector<T, 2>>(tile + (8 * i + row) * stride + slot);
    if (!shown(first + 8 * i + row))
      scores[i].at[0] = scores[i].at[1] = cuda::narrow<T>(cuda::kNothing);
#pragma unroll
    for (int s = 0; s < 2; ++s) top[s] = fmaxf(top[s], cuda::widen(scores[i].at[s]));
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    for (int step = 4; step < cuda::kWarp; step *= 2)
      top[s] = fmaxf(top[s], cuda::shuffle_xor(top[s], step));
    shift[s] = cuda::shift_of(top[s]);
    const float shrunk = cuda::exponential(pair.highest[s], shift[s]);
    if (row == 0) shrink[slot + s] = shrunk;
    pair.total[s] *= shrunk;
    pair.highest[s] = top[s];
  }
#pragma unroll
  for (int i = 0; i < each; ++i) {
    for (int s = 0; s < 2; ++s) {
      const float part = cuda::exponential(cuda::widen(scores[i].at[s]), shift[s]);
      pair.total[s] += part;
      scores[i].at[s] = cuda::narrow<T>(part);
    }
    cuda::store(tile + (8 * i + row) * stride + slot, scores[i]);
  }
}

template <class T, int I, int J>
__device__ void shrink_sums(float (&sums)[I][J][4], const float* shrink) {
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float factor = shrink[16 * i + cuda::lane() / 4 + v / 2 * 8];
#pragma unroll
      for (int j = 0; j < J; ++j) sums[i][j][v] *= factor;
    }
}

template <class T, int columns>
__global__ void __launch_bounds__(kThreads, 2)
    aggregate_logits_kernel(const __grid_constant__ LogitsJob job) {
  constexpr int tile = kTile<T>, per_warp = columns / kWarps;
  const AggregateLogits& p = job.p;
  auto number = static_cast<uint32_t>(cuda::block());
  const uint32_t part = number % job.across;
  number /= job.across;
  const int64_t first_slot = int64_t{number % job.down} * kSlots;
  number /= job.down;
  const uint32_t split = number % static_cast<uint32_t>(job.partial.splits);
  const int64_t image = number / static_cast<uint32_t>(job.partial.splits);
  const int64_t begin = split * job.partial.span, column = int64_t{part} * columns;
  const int count =
      static_cast<int>(begin + job.partial.span < p.N ? job.partial.span : p.N - begin);
  const int own = cuda::warp() * per_warp;

  cuda::Arena arena;
  T* logits_tiles = arena.shared<T>(2 * kLogits<T>);
  T* value_tiles = arena.shared<T>(2 * kValues<T, columns>);
  auto* shrink = arena.shared<float>(kSlots);
  auto* inverses = arena.shared<float>(kSlots);
  Rows<T> logits, values;
  Shown shown;
  logits.set(p.logits, image, begin, p.M, first_slot);
  values.set(p.value, image, begin, p.C, column);
  shown.set(p.mask, image, begin, count);
  const auto fetch = [&](int first) {
    if (first < count) {
      const int half = first / tile % 2;
      cuda::fetch_some<T, tile, kSlots>(logits_tiles + half * kLogits<T>, logits, first, 0, shown);
      cuda::fetch_some<T, tile, columns>(value_tiles + half * kValues<T, columns>, values, first, 0,
                                         shown);
    }
    cuda::commit_copies();
  };

  Pair pair;
  float sums[kSlots / 16][per_warp / 8][4] = {};
  fetch(0);
  for (int first = 0; first < count; first += tile) {
    cuda::wait_copies<0>();
    cuda::sync();
    fetch(first + tile);
    T* mine = logits_tiles + first / tile % 2 * kLogits<T>;
    rank_tile<T>(mine, first, shown, pair, shrink);
    cuda::sync();
    if (own < values.columns) {
      shrink_sums<T>(sums, shrink);
      const T* right = value_tiles + first / tile % 2 * kValues<T, columns> + own;
#pragma unroll 1
      for (int term = 0; term < tile; term += kTerms) {
        cuda::add_product<T, cuda::kAcross, cuda::kAcross>(
            sums, mine + term * cuda::tile_stride<T>(kSlots), cuda::tile_stride<T>(kSlots),
            right + term * cuda::tile_stride<T>(columns), cuda::tile_stride<T>(columns), kTerms);
      }
    }
  }

  const bool whole = job.partial.splits == 1;
  const int64_t rows = (image * job.partial.splits + split) * p.M + first_slot;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    float total = pair.total[s];
    for (int step = 4; step < cuda::kWarp; step *= 2) total += cuda::shuffle_xor(total, step);
    const int slot = cuda::warp() * 8 + cuda::lane() * 2 + s;
    if (cuda::lane() >= 4) continue;
    inverses[slot] = cuda::inverse(total);
    if (part != 0 || first_slot + slot >= p.M) continue;
    if (whole) {
      p.lse[rows + slot] = cuda::logarithm(pair.highest[s], total);
    } else {
      job.partial.highest[rows + slot] = pair.highest[s];
      job.partial.total[rows + slot] = total;
    }
  }
  cuda::sync();
  const bool even = p.C % 2 == 0;
  cuda::for_pairs(sums, [&](float one, float two, int slot, int at) {
    if (first_slot + slot >= p.M) return;
    const int64_t to = (rows + slot) * p.C + column + own + at;
    const int left = values.columns - own - at;
    if (whole)
      cuda::store_pair(static_cast<T*>(p.out) + to, cuda::scaled(one, inverses[slot]),
                       cuda::scaled(two, inverses[slot]), left, even);
    else
      cuda::store_pair(job.partial.sums + to, one, two, left, even);
  });
}

int64_t up(int64_t count, int64_t each) { return (count + each - 1) / each; }

// In how many pieces of at least 512 tokens an image is summed: as many as keep a GPU busy with
// one image, while partial sums move no more than half of what the inputs do.
int64_t splits_of(const AggregateLogits& p) {
  if (p.N < 1024) return 1;
  const int64_t columns = p.dtype == DType::kFloat32 ? kWide<float> : kWide<BFloat16>;
  const int64_t blocks = up(p.M, kSlots) * up(p.C, columns);
  const int64_t moved = p.N * (p.M + p.C) * size_of(p.dtype) / (16 * p.M * p.C + 1);
  int64_t splits = up(p.N, 512);
  for (const int64_t most : {int64_t{cuda::kMostSplits}, 128 / (blocks + 1), moved})
    splits = splits < most ? splits : most;
  return splits < 1 ? 1 : splits;
}

int64_t across(const AggregateLogits& p, int64_t columns) { return p.C > 0 ? up(p.C, columns) : 1; }

template <class T, int columns>
const char* launch_logits(LogitsJob& job, void* stream) {
  const AggregateLogits& p = job.p;
  job.across = static_cast<uint32_t>(across(p, columns));
  const int64_t shared = 2 * cuda::shared_bytes<T>(kLogits<T> + kValues<T, columns>) +
                         2 * cuda::shared_bytes<float>(kSlots);
  return cuda::launch<aggregate_logits_kernel<T, columns>>(
      {.blocks = p.B * job.partial.splits * job.down * job.across,
       .threads = kThreads,
       .shared = shared,
       .stream = stream},
      job);
}

template <class T>
const char* run(const AggregateLogits& p, void* stream) {
  LogitsJob job{};
  job.p = p;
  job.down = static_cast<uint32_t>(up(p.M, kSlots));
  const int64_t wanted = splits_of(p), span = up(up(p.N, wanted), kTile<T>) * kTile<T>;
  const int64_t splits = p.N > 0 ? up(p.N, span) : 1;
  job.partial =
      cuda::partial_in(p.scratch, p.B * splits * p.M, p.C, static_cast<int>(splits), span);
  const bool few = 2 * p.B * splits * job.down * across(p, kWide<T>) < cuda::multiprocessors();
  const char* error =
      few ? launch_logits<T, kNarrow>(job, stream) : launch_logits<T, kWide<T>>(job, stream);
  if (error != nullptr || splits == 1) return error;
  return cuda::launch_join<T>({job.partial, p.B, p.M, p.N, p.C, p.out, p.lse, nullptr}, stream);
}

}  // namespace

int64_t aggregate_logits_cuda_scratch(const AggregateLogits& p) {
  const int64_t splits = splits_of(p);
  return splits == 1 ? 0 : cuda::partial_bytes(p.B * splits * p.M, p.C);
}

const char* aggregate_logits_cuda(const AggregateLogits& p, void* stream) {
  const char* error = nullptr;
  dispatch(p.dtype, [&](auto zero) { error = run<decltype(zero)>(p, stream); });
  return error;
}

}  // namespace tk
