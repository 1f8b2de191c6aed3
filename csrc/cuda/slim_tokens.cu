// slim_tokens on a GPU, in two launches: what each tile of tokens gives to the softmax, then the
// weighted sums.
//
// The first takes a tile from layer norm to logits without leaving the chip (only `projected` is
// written where it is wanted) and writes their exponentials, below the tile's own maximum, in the
// dtype of x: as the second multiplies them. That one joins the tiles' maxima and totals and sums
// tokens.
#include "cuda/slim_hidden.cuh"

namespace tk {
namespace {

constexpr int64_t kScratch = int64_t{32} << 20;  // more than this, and the output, in turns

constexpr int kGatherSlots = 64;
template <class T>
constexpr int kGatherChannels = 256 / sizeof(T);
constexpr int kGatherDown = 2, kGatherAcross = 4;  // warps

struct WeighJob {
  cuda::Slim slim;
  void* parts;     // (B, N, width)
  float* highest;  // (B, tiles, M)
  float* total;    // likewise
  float* projected;
  int64_t width;
  int64_t shares, each;  // blocks of a tile, and the slots of each
  bool twice;            // as many slots at a time, of 16 bits
};

// Exponentials of one slot, in place of its logits, and their maximum and total over the tile.
template <int I>
__device__ void exponentials(float (&logits)[I][2], int rows, float scale, float& highest,
                             float& total) {
#pragma unroll
  for (int i = 0; i < 2 * I; ++i) {
    float& logit = logits[i / 2][i % 2];
    logit = cuda::lane() / 4 + 8 * i < rows ? cuda::rounded_product(logit, scale) : -INFINITY;
  }
  highest = cuda::over_tokens<I>(logits, cuda::maximum);
  const float shift = highest == -INFINITY ? 0.0f : highest;
#pragma unroll
  for (int i = 0; i < 2 * I; ++i) {
    float& part = logits[i / 2][i % 2];
    part = exp2f((part - shift) * cuda::kLog2E);
  }
  total = cuda::over_tokens<I>(logits, [](float a, float b) { return a + b; });
}

// What a tile gives to a warp's slots from `slot` on.
template <class T, int J, int I>
__device__ void store_parts(float (&logits)[I][J][4], const WeighJob& job,
                            const cuda::Tile<T>& tile, int64_t number, int64_t slot, float scale) {
  const int64_t slots = job.slim.slots;
  T* parts = static_cast<T*>(job.parts) +
             (tile.image * job.slim.tokens + tile.first + cuda::lane() / 4) * job.width;
  const int rows = tile.rows - cuda::lane() / 4;
#pragma unroll
  for (int j = 0; j < J; ++j) {
    const int64_t s = slot + 8 * j + cuda::lane() % 4 * 2;
    float pair[2][I][2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int i = 0; i < 2 * I; ++i) pair[v][i / 2][i % 2] = logits[i / 2][j][i % 2 * 2 + v];
      float highest, total;
      exponentials<I>(pair[v], tile.rows, scale, highest, total);
      if (cuda::lane() < 4 && s + v < slots) {
        job.highest[number * slots + s + v] = highest;
        job.total[number * slots + s + v] = total;
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * I; ++i) {
      const cuda::Vector<T, 2> both = {cuda::narrow<T>(pair[0][i / 2][i % 2]),
                                       cuda::narrow<T>(pair[1][i / 2][i % 2])};
      if (8 * i < rows && s < job.width) cuda::store(parts + 8 * i * job.width + s, both);
    }
  }
}

template <class T, int J>
__device__ void weigh(const WeighJob& job) {
  const cuda::Slim& p = job.slim;
  cuda::Arena arena;
  const cuda::HiddenMemory<T> memory(arena, p);
  const int64_t number = cuda::block() / job.shares, share = cuda::block() % job.shares;
  const cuda::Tile<T> tile(p, number, p.x.stride);
  const cuda::Statistics statistics = cuda::statistics_of(p, tile);
  const float scale = cuda::scale_of(p);
  float* projected = job.projected == nullptr || share != 0
                         ? nullptr
                         : job.projected + (tile.image * p.tokens + tile.first) * p.hidden;
  const auto hidden = static_cast<int>(p.hidden);
  const auto make = [&](int64_t first, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += p.group) {
      const auto here = static_cast<int>(count - begin < p.group ? count - begin : p.group);
      cuda::project(p, tile, statistics, memory, first + begin, here,
                    [&](int row, int channel, float value, bool there) {
                      if (projected != nullptr && there && row < tile.rows)
                        projected[first + begin + (row * hidden + channel)] = value;
                      cuda::put(memory.hidden + row * memory.stride + begin + channel, memory.part,
                                there ? cuda::gelu(value) : 0.0f);
                    });
    }
  };
  const int64_t begin = share * job.each;
  const int64_t end = begin + job.each < p.slots ? begin + job.each : p.slots;
  cuda::for_logits<T, J>(p, memory, begin, end, make, [&](auto& sums, int64_t first) {
    const int64_t slot = first + cuda::warp() * 8 * J;
    if (slot < job.width) store_parts<T, J>(sums, job, tile, number, slot, scale);
  });
}

template <class T>
__global__ void __launch_bounds__(cuda::kSlimThreads, 2)
    weigh_kernel(const __grid_constant__ WeighJob job) {
  if constexpr (sizeof(T) == 2) {
    if (job.twice) return weigh<T, 2>(job);
  }
  weigh<T, 1>(job);
}

struct GatherJob {
  WeighJob weighed;
  cuda::Operand parts;
  void* out;  // (B, M, C)
  float* lse;
  int64_t down, across;  // blocks of an image
};

// What a tile's sums are multiplied by, of the slot whose common maximum is `highest`.
__device__ float factor_of(float some, float highest) {
  return exp2f((some - (highest == -INFINITY ? 0.0f : highest)) * cuda::kLog2E);
}

// Maxima and totals of the block's slots, over all tiles, into shared memory.
__device__ void join_tiles(const GatherJob& job, int64_t image, int64_t slot, bool first,
                           float* highest, float* total) {
  const cuda::Slim& p = job.weighed.slim;
  if (cuda::thread() >= kGatherSlots) return;
  float most = -INFINITY, sum = 0;
  const int64_t mine = slot + cuda::thread();
  if (mine < p.slots) {
    const int64_t place = image * p.tiles * p.slots + mine;
    const float *maxima = job.weighed.highest + place, *totals = job.weighed.total + place;
#pragma unroll 4
    for (int64_t t = 0; t < p.tiles; ++t) most = cuda::maximum(most, maxima[t * p.slots]);
#pragma unroll 4
    for (int64_t t = 0; t < p.tiles; ++t)
      sum += factor_of(maxima[t * p.slots], most) * totals[t * p.slots];
    if (first) job.lse[image * p.slots + mine] = most + logf(sum);
  }
  highest[cuda::thread()] = most;
  total[cuda::thread()] = sum;
}

// Some slots and channels of one image: the tiles' sums, shrunk to the common maximum.
template <class T>
__global__ void __launch_bounds__(cuda::kSlimThreads, 2)
    gather_kernel(const __grid_constant__ GatherJob job) {
  constexpr int kTokens = cuda::kTileTokens;
  constexpr int left_stride = cuda::tile_stride<T>(kGatherSlots);
  constexpr int right_stride = cuda::tile_stride<T>(kGatherChannels<T>);
  constexpr int I = kGatherSlots / 16 / kGatherDown, J = kGatherChannels<T> / 8 / kGatherAcross;
  const cuda::Slim& p = job.weighed.slim;
  const int64_t across = cuda::block() % job.across, down = cuda::block() / job.across % job.down;
  const int64_t image = cuda::block() / (job.across * job.down);
  const int64_t slot = down * kGatherSlots, channel = across * kGatherChannels<T>;
  cuda::Arena arena;
  T* left = arena.shared<T>(cuda::kStages * kTokens * left_stride);
  T* right = arena.shared<T>(cuda::kStages * kTokens * right_stride);
  auto* highest = arena.shared<float>(kGatherSlots);
  auto* total = arena.shared<float>(kGatherSlots);
  const auto fetch_chunk = [&](int i, int stage) {
    const int64_t token = int64_t{i} * kTokens, rows = p.tokens - token;
    cuda::fetch<T, kTokens, kGatherSlots>(left + stage * kTokens * left_stride, job.parts,
                                          (image * p.tokens + token) * job.parts.stride + slot,
                                          rows, job.weighed.width - slot);
    cuda::fetch<T, kTokens, kGatherChannels<T>>(right + stage * kTokens * right_stride, p.x,
                                                image * p.x_batch + token * p.x.stride + channel,
                                                rows, p.channels - channel);
  };
  const auto tiles = static_cast<int>(p.tiles);
  cuda::begin_chunks(tiles, fetch_chunk);
  join_tiles(job, image, slot, across == 0, highest, total);
  const int row = cuda::warp() / kGatherAcross * 16 * I;
  const int column = cuda::warp() % kGatherAcross * 8 * J;
  const bool busy = slot + row < p.slots && channel + column < p.channels;
  float sums[I][J][4] = {};
  cuda::for_chunks(tiles, fetch_chunk, [&](int i, int stage) {
    if (!busy) return;
    float fresh[I][J][4] = {};
    cuda::add_product<T, cuda::kAcross, cuda::kAcross>(
        fresh, left + stage * kTokens * left_stride + row, left_stride,
        right + stage * kTokens * right_stride + column, right_stride, kTokens);
    const float* some = job.weighed.highest + (image * p.tiles + i) * p.slots;
#pragma unroll
    for (int r = 0; r < 2 * I; ++r) {
      const int at = row + cuda::lane() / 4 + 8 * r;
      const float factor = slot + at < p.slots ? factor_of(some[slot + at], highest[at]) : 0.0f;
#pragma unroll
      for (int j = 0; j < J; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v)
          sums[r / 2][j][r % 2 * 2 + v] += fresh[r / 2][j][r % 2 * 2 + v] * factor;
      }
    }
  });
  if (!busy) return;
  T* out = static_cast<T*>(job.out) + (image * p.slots + slot) * p.channels + channel;
  cuda::for_sums(sums, [&](float sum, int r, int c) {
    if (slot + row + r < p.slots && channel + column + c < p.channels)
      out[(row + r) * p.channels + column + c] = cuda::narrow<T>(sum / total[row + r]);
  });
}

template <class T>
constexpr int64_t gather_shared() {
  constexpr int64_t rows = cuda::kStages * cuda::kTileTokens;
  return cuda::shared_bytes<T>(rows * cuda::tile_stride<T>(kGatherSlots)) +
         cuda::shared_bytes<T>(rows * cuda::tile_stride<T>(kGatherChannels<T>)) +
         2 * cuda::shared_bytes<float>(kGatherSlots);
}

int64_t width_of(const SlimTokens& p) {
  return cuda::parts_of(p.slots, cuda::kSlotPad) * cuda::kSlotPad;
}

// Images that go together.
int64_t step_of(const SlimTokens& p) {
  const int64_t size = size_of(p.dtype), out = p.batch * p.slots * p.channels * size;
  const int64_t each = p.tokens * width_of(p) * size;
  if (each == 0) return 1;
  const int64_t step = (out > kScratch ? out : kScratch) / each;
  return step < 1 ? 1 : step < p.batch ? step : p.batch;
}

template <class T>
const char* launch_some(WeighJob job, const SlimTokens& all, int64_t first, int64_t images,
                        void* stream) {
  cuda::Slim& p = job.slim;
  p.x.data = static_cast<const T*>(p.x.data) + first * p.x_batch;
  if (job.projected != nullptr) job.projected += first * p.tokens * p.hidden;
  cuda::hold<T>(p);
  job.twice = cuda::holds_all(p) && p.slots > cuda::kSlotBlock;
  job.each = cuda::holds_all(p) ? p.slots : cuda::kSlotBlock;
  job.shares = cuda::parts_of(p.slots, job.each);
  const char* error = cuda::launch<weigh_kernel<T>>({.blocks = images * p.tiles * job.shares,
                                                     .threads = cuda::kSlimThreads,
                                                     .shared = cuda::HiddenMemory<T>::bytes(p),
                                                     .stream = stream},
                                                    job);
  if (error != nullptr) return error;
  GatherJob gather{};
  gather.weighed = job;
  gather.parts = cuda::operand(job.parts, all.dtype, job.width, job.width);
  gather.out = static_cast<T*>(all.out) + first * p.slots * p.channels;
  gather.lse = all.lse + first * p.slots;
  gather.down = cuda::parts_of(p.slots, kGatherSlots);
  gather.across = cuda::parts_of(p.channels, kGatherChannels<T>);
  return cuda::launch<gather_kernel<T>>({.blocks = images * gather.down * gather.across,
                                         .threads = cuda::kSlimThreads,
                                         .shared = gather_shared<T>(),
                                         .stream = stream},
                                        gather);
}

}  // namespace

int64_t slim_tokens_cuda_scratch(const SlimTokens& p) {
  const int64_t tiles = cuda::parts_of(p.tokens, cuda::kTileTokens);
  return step_of(p) * (p.tokens * width_of(p) * size_of(p.dtype) + tiles * p.slots * 8);
}

const char* slim_tokens_cuda(const SlimTokens& p, void* stream) {
  WeighJob job{};
  dispatch(p.dtype, [&](auto zero) { job.slim = cuda::slim_of<decltype(zero)>(p); });
  job.width = width_of(p);
  job.projected = p.projected;
  const int64_t step = step_of(p);
  job.parts = p.scratch;
  job.highest = reinterpret_cast<float*>(static_cast<char*>(p.scratch) +
                                         step * p.tokens * job.width * size_of(p.dtype));
  job.total = job.highest + step * job.slim.tiles * p.slots;
  const char* error = nullptr;
  for (int64_t first = 0; first < p.batch && error == nullptr; first += step) {
    const int64_t images = p.batch - first < step ? p.batch - first : step;
    dispatch(p.dtype, [&](auto zero) {
      error = launch_some<decltype(zero)>(job, p, first, images, stream);
    });
  }
  return error;
}

}  // namespace tk
