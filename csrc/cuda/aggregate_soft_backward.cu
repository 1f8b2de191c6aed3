// aggregate_soft_backward on a GPU: what lies by token in one launch, the gradient of the queries
// by slot in a second, sums of both apart in a third.
//
// The second makes the slopes of a piece of tokens × 64 slots again and multiplies them with the
// keys, block after block; several pieces, of several images where the queries are shared, add up
// in rows of scratch of a block's own. The third adds those of all blocks, and what the first left
// of the scale, in a fixed order.
#include "cuda/aggregate_by_token.cuh"

namespace tk {
namespace {

using cuda::kSlots;
using cuda::kThreads;
using cuda::kTokens;

template <class T>
constexpr int kPiece = sizeof(T) == 4 ? 128 : 256;  // tokens
constexpr int64_t kScratch = 32 << 20;              // bytes

// Owners of a gradient (one, or every image), groups of each, that sum some of its items: pieces of
// `length` tokens.
struct BySlot {
  cuda::Gradients p;
  float* partial;  // (owners, groups, M, E)
  int64_t owners, groups, items, span, pieces, length;
  uint32_t down, ranges;  // blocks of slots, ranges of features
  int each;               // blocks of features in a range
};

template <class T>
constexpr int64_t shared_of_slots() {
  return cuda::PairRoom<T, true>::bytes() +
         cuda::shared_bytes<T>(kPiece<T> * cuda::tile_stride<T>(kSlots)) +
         cuda::shared_bytes<float>(kPiece<T> / kTokens);
}

// Slopes of all tokens of a piece, 64 at a time.
template <class T>
__device__ void make_piece(const BySlot& job, const cuda::PairRoom<T, true>& room, T* slopes,
                           float* units, int64_t image, int64_t first, int64_t end, int64_t slot) {
  constexpr int stride = cuda::tile_stride<T>(kSlots);
#pragma unroll 1
  for (int64_t token = first; token < end; token += kTokens) {
    cuda::sync();
    if (cuda::thread() == 0) {
      room.pair->set_tokens(job.p, image, token, end);
      room.pair->set_slots(job.p, slot);
    }
    cuda::sync();
    const int at = static_cast<int>(token - first);
    const float unit =
        cuda::make_square<T>(room, job.p, static_cast<T*>(nullptr), slopes + at * stride, stride,
                             {false, true, false}, nullptr);
    if (cuda::thread() == 0) units[at / kTokens] = unit;
  }
  cuda::sync();
  if (cuda::thread() == 0) {
    room.pair->shown.set(job.p.mask, image, first, end - first);
    room.pair->spread.set(job.p.keys, image, first, job.p.E, 0);
  }
  cuda::sync();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    aggregate_slots_kernel(const __grid_constant__ BySlot job) {
  constexpr int stride = cuda::tile_stride<T>(kSlots);
  const cuda::Gradients& p = job.p;
  auto number = static_cast<uint32_t>(cuda::block());
  const uint32_t part = number % job.ranges;
  number /= job.ranges;
  const int64_t slot = int64_t{number % job.down} * kSlots;
  const int64_t group = number / job.down;
  cuda::Arena arena;
  const cuda::PairRoom<T, true> room(arena);
  T* slopes = arena.shared<T>(kPiece<T> * stride);
  auto* units = arena.shared<float>(kPiece<T> / kTokens);
  const int64_t begin = group % job.groups * job.span;
  const int64_t stop = begin + job.span < job.items ? begin + job.span : job.items;
  const int blocks = static_cast<int>(cuda::whole_blocks(p.E, cuda::kSpread));
  const int first_block = static_cast<int>(part) * job.each;
  const int end_block = first_block + job.each < blocks ? first_block + job.each : blocks;
#pragma unroll 1
  for (int64_t item = begin; item < stop; ++item) {
    const int64_t image = group / job.groups + item / job.pieces;
    const int64_t first = item % job.pieces * job.length;
    const int64_t end = first + job.length < p.N ? first + job.length : p.N;
    make_piece<T>(job, room, slopes, units, image, first, end, slot);
    const bool older = item > begin;
    cuda::spread_rows<T, cuda::kAcross>(
        room, slopes, stride, units, static_cast<int>(end - first), room.pair->shown, first_block,
        end_block, nullptr, true, true, [&](cuda::Sheet& sums, int block) {
          const int slots = room.pair->slots - cuda::sheet_row();
          const int64_t column = int64_t{block} * cuda::kSpread + cuda::sheet_column();
          const int left = room.pair->spread.columns - static_cast<int>(column);
          float* to = job.partial + (group * p.M + slot + cuda::sheet_row()) * p.E + column;
          cuda::for_pairs(sums, [&](float one, float two, int row, int next) {
            if (row >= slots) return;
            float* at = to + row * p.E + next;
            if (older && next < left) one += at[0];
            if (older && next + 1 < left) two += at[1];
            cuda::store_pair(at, one, two, left - next, p.E % 2 == 0);
          });
        });
  }
}

struct Total {
  const float *partial, *scales;  // (owners, groups, width), (scales)
  const float* scale_tensor;
  float scale;
  void* query_grad;   // or null
  float* scale_grad;  // or null
  int64_t owners, groups, width, scale_count;
};

// Sums over groups, times the scale; the last block adds up the scale's own gradient.
template <class T>
__global__ void __launch_bounds__(kThreads)
    aggregate_total_kernel(const __grid_constant__ Total job, int64_t summing) {
  if (cuda::block() >= summing) {
    cuda::Arena arena;
    auto* by_warp = arena.shared<float>(kThreads / cuda::kWarp);
    float sum = 0.0f;
    for (int64_t i = cuda::thread(); i < job.scale_count; i += kThreads) sum += job.scales[i];
    sum = cuda::warp_sum(sum);
    if (cuda::lane() == 0) by_warp[cuda::warp()] = sum;
    cuda::sync();
    if (cuda::thread() != 0) return;
    sum = 0.0f;
    for (int w = 0; w < kThreads / cuda::kWarp; ++w) sum += by_warp[w];
    *job.scale_grad = sum;
    return;
  }
  const float scale = job.scale_tensor == nullptr ? job.scale : *job.scale_tensor;
  for (int64_t i = cuda::block() * kThreads + cuda::thread(); i < job.owners * job.width;
       i += summing * kThreads) {
    const float* from = job.partial + i / job.width * job.groups * job.width + i % job.width;
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t g = 0; g < job.groups; ++g) sum += from[g * job.width];
    static_cast<T*>(job.query_grad)[i] = cuda::narrow<T>(sum * scale);
  }
}

int64_t blocks_of_tokens(const AggregateSoftBackward& p) {
  return p.B * cuda::whole_blocks(p.N, kTokens);
}

// How the gradient of the queries is summed.
BySlot by_slot_of(const AggregateSoftBackward& p) {
  BySlot job{};
  const int64_t piece = p.dtype == DType::kFloat32 ? kPiece<float> : kPiece<BFloat16>;
  const bool shared = p.query.batch_stride == 0;
  job.pieces = cuda::whole_blocks(p.N, piece);
  if (job.pieces > 0)
    job.length = cuda::whole_blocks(cuda::whole_blocks(p.N, job.pieces), kTokens) * kTokens;
  job.owners = shared ? 1 : p.B;
  job.items = shared ? p.B * job.pieces : job.pieces;
  const int64_t room = kScratch / (4 * p.M * p.E + 1);
  int64_t most = shared ? (room < 256 ? room : 256) : cuda::kMostSplits;
  if (most < 1) most = 1;
  job.span = job.items > most ? cuda::whole_blocks(job.items, most) : 1;
  job.groups = cuda::whole_blocks(job.items, job.span);
  return job;
}

template <class T>
const char* launch_by_slot(const cuda::Gradients& p, BySlot job, void* stream) {
  job.p = p;
  job.down = static_cast<uint32_t>(cuda::whole_blocks(p.M, kSlots));
  const int64_t blocks = job.owners * job.groups * job.down;
  const int64_t across = cuda::whole_blocks(p.E, cuda::kSpread);
  const int64_t idle = blocks > 0 ? cuda::multiprocessors() / blocks : 1;
  job.each = static_cast<int>(cuda::whole_blocks(across, idle > 1 ? idle : 1));
  job.ranges = job.each > 0 ? static_cast<uint32_t>(cuda::whole_blocks(across, job.each)) : 0;
  return cuda::launch<aggregate_slots_kernel<T>>({.blocks = blocks * job.ranges,
                                                  .threads = kThreads,
                                                  .shared = shared_of_slots<T>(),
                                                  .stream = stream},
                                                 job);
}

template <class T>
const char* run(const AggregateSoftBackward& p, void* stream) {
  cuda::Gradients g{};
  g.B = p.B;
  g.M = p.M;
  g.N = p.N;
  g.E = p.E;
  g.C = p.C;
  g.query = p.query;
  g.keys = p.key;
  g.value = p.value;
  g.gradient = p.gradient;
  g.tokens = p.tokens;
  g.bias = p.bias;
  g.mask = p.mask;
  g.scale = p.scale;
  g.scale_tensor = p.scale_tensor;
  g.lse = p.lse;
  g.weights = p.weights;
  g.keys_grad = p.key_grad;
  g.value_grad = p.value_grad;
  g.bias_grad = p.bias_grad;
  BySlot slots = by_slot_of(p);
  slots.partial = static_cast<float*>(p.scratch);
  const int64_t sums = p.query_grad == nullptr ? 0 : slots.owners * slots.groups * p.M * p.E;
  if (p.scale_grad != nullptr) g.scale_grads = slots.partial + sums;
  const char* error = cuda::launch_by_token<T, true>(g, stream);
  if (error == nullptr && p.query_grad != nullptr) error = launch_by_slot<T>(g, slots, stream);
  if (error != nullptr || (p.query_grad == nullptr && p.scale_grad == nullptr)) return error;
  const Total total{
      slots.partial, g.scale_grads, p.scale_tensor, p.scale,   p.query_grad,
      p.scale_grad,  slots.owners,  slots.groups,   p.M * p.E, p.M > 0 ? blocks_of_tokens(p) : 0};
  const int64_t summing =
      p.query_grad == nullptr ? 0 : cuda::blocks_for(slots.owners * p.M * p.E, kThreads);
  return cuda::launch<aggregate_total_kernel<T>>(
      {.blocks = summing + (p.scale_grad != nullptr ? 1 : 0),
       .threads = kThreads,
       .shared = cuda::shared_bytes<float>(kThreads / cuda::kWarp),
       .stream = stream},
      total, summing);
}

}  // namespace

int64_t aggregate_soft_backward_cuda_scratch(const AggregateSoftBackward& p) {
  const BySlot slots = by_slot_of(p);
  const int64_t sums = p.query_grad == nullptr ? 0 : slots.owners * slots.groups * p.M * p.E;
  return 4 * (sums + (p.scale_grad == nullptr ? 0 : blocks_of_tokens(p)));
}

const char* aggregate_soft_backward_cuda(const AggregateSoftBackward& p, void* stream) {
  const char* error = nullptr;
  dispatch(p.dtype, [&](auto zero) { error = run<decltype(zero)>(p, stream); });
  return error;
}

}  // namespace tk
