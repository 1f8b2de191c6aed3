// The gradients of the soft aggregations that lie by token, to values, keys or logits, bias, scale:
// a block owns 64 tokens of one image, and writes whole rows of every gradient.
//
// Where the weights and slopes of all slots fit into shared memory, nothing is computed twice;
// beyond, they are made again for every block of columns.
#pragma once

#include "cuda/aggregate_backward.cuh"

namespace tk::cuda {

template <class T>
constexpr int kHeld = sizeof(T) == 4 ? 128 : 256;  // slots whose weights a block keeps

struct ByToken {
  Gradients p;
  int held;        // slots at a time, a multiple of 64
  int groups;      // of so many
  uint32_t tiles;  // blocks of tokens in an image
  uint32_t parts;  // 2: one makes the gradient of the values, another the rest
};

template <class T, bool soft>
int64_t shared_of_tokens(const ByToken& job);

template <class T, bool soft>
ByToken by_token_of(const Gradients& p) {
  ByToken job{};
  job.p = p;
  const int64_t up = whole_blocks(p.M, kSlots) * kSlots;
  job.held = static_cast<int>(up < kHeld<T> ? up : kHeld<T>);
  job.groups = static_cast<int>(whole_blocks(p.M, job.held > 0 ? job.held : 1));
  while (job.held > kSlots && shared_of_tokens<T, soft>(job) > most_shared()) {
    job.held -= kSlots;
    job.groups = static_cast<int>(whole_blocks(p.M, job.held));
  }
  job.tiles = static_cast<uint32_t>(whole_blocks(p.N, kTokens));
  const bool both = p.sloping() && p.value_grad != nullptr;
  job.parts = both && p.B * job.tiles < multiprocessors() ? 2 : 1;
  return job;
}

inline int64_t blocks_of(const ByToken& job) {
  const bool any = job.p.sloping() || job.p.value_grad != nullptr;
  return any && job.groups > 0 ? job.p.B * job.tiles * job.parts : 0;
}

// Sums that wait for the weights of further slots, or scores for the slopes of theirs.
__host__ __device__ inline int64_t parked_of(const ByToken& job) {
  return job.groups > 1                 ? int64_t{kTokens} * kSpread
         : job.p.scale_grads != nullptr ? int64_t{kTokens} * kSlots
                                        : 0;
}

template <class T, bool soft>
int64_t shared_of_tokens(const ByToken& job) {
  return PairRoom<T, soft>::bytes() +
         (job.groups > 1 ? 1 : 2) * shared_bytes<T>(kTokens * tile_stride<T>(job.held)) +
         shared_bytes<float>(kHeld<T> / kSlots) + shared_bytes<float>(parked_of(job));
}

template <class T, bool soft>
struct TokenRoom {
  PairRoom<T, soft> room;
  T *weights, *slopes;
  float *units, *parked;
  int stride;
  __device__ TokenRoom(Arena& arena, const ByToken& job)
      : room(arena), stride(tile_stride<T>(job.held)) {
    weights = arena.shared<T>(kTokens * stride);
    slopes = job.groups > 1 ? weights : arena.shared<T>(kTokens * stride);  // one at a time then
    units = arena.shared<float>(kHeld<T> / kSlots);
    parked = arena.shared<float>(parked_of(job));
  }
};

// Weights and slopes of all slots of a group.
template <class T, bool soft>
__device__ void make_group(const ByToken& job, const TokenRoom<T, soft>& at, int group,
                           const Wanted& wanted) {
#pragma unroll 1
  for (int block = 0; block < job.held / kSlots; ++block) {
    const int64_t slot = int64_t{group} * job.held + block * kSlots;
    if (slot >= job.p.M) break;
    sync();
    if (thread() == 0) at.room.pair->set_slots(job.p, slot);
    sync();
    const float unit = make_square<T>(at.room, job.p, at.weights + block * kSlots,
                                      at.slopes + block * kSlots, at.stride, wanted, at.parked);
    if (thread() == 0) at.units[block] = unit;
  }
  sync();
}

// What lies by token of the sums: the gradient of the bias, this block's share of the scale's.
template <class T, bool soft>
__device__ void write_sums(const ByToken& job, const TokenRoom<T, soft>& at, uint32_t tile) {
  const Gradients& p = job.p;
  const float* sums = at.room.bias_sums;
  const int token = thread();
  if (p.bias_grad != nullptr && token < kTokens && token < at.room.pair->tokens)
    p.bias_grad[at.room.pair->image * p.N + at.room.pair->token + token] =
        sums[token] + sums[kTokens + token];
  if (p.scale_grads == nullptr || warp() != 0) return;
  sums = at.room.scale_sums;
  const float all = warp_sum((sums[lane()] + sums[kTokens + lane()]) +
                             (sums[kWarp + lane()] + sums[kTokens + kWarp + lane()]));
  if (lane() == 0) p.scale_grads[tile] = all;
}

enum Phase { kSums, kValueGradient, kKeyGradient };

// Rows of one gradient from the slots of a group, for the blocks of columns first … end − 1.
template <class T, bool soft>
__device__ void spread_group(const ByToken& job, const TokenRoom<T, soft>& at, Phase phase,
                             int group, int first, int end) {
  const Gradients& p = job.p;
  const bool valuing = phase == kValueGradient;
  const int64_t width = valuing ? p.C : p.E, slot = int64_t{group} * job.held;
  sync();
  if (thread() == 0)
    at.room.pair->spread.set(valuing ? p.gradient : p.query, at.room.pair->image, slot, width, 0);
  sync();
  const int depth = static_cast<int>(p.M - slot < job.held ? p.M - slot : job.held);
  spread_rows<T, kAlong>(
      at.room, valuing ? at.weights : at.slopes, at.stride, valuing ? nullptr : at.units, depth,
      [=](int row) { return row < depth; }, first, end, at.parked, group == 0,
      group == job.groups - 1,
      [&](Sheet& sums, int block) {
        const float factor = valuing ? 1.0f : p.factor();
        const int64_t column = int64_t{block} * kSpread + sheet_column();
        const int tokens = at.room.pair->tokens - sheet_row();
        const int left = at.room.pair->spread.columns - static_cast<int>(column);
        T* to = static_cast<T*>(valuing ? p.value_grad : p.keys_grad) + column +
                (at.room.pair->image * p.N + at.room.pair->token + sheet_row()) * width;
        for_pairs(sums, [&](float one, float two, int token, int next) {
          if (token < tokens)
            store_pair(to + token * width + next, one * factor, two * factor, left - next,
                       width % 2 == 0);
        });
      });
}

// All gradients of a block whose weights are kept: straight on, as what a loop would hold in
// registers leaves no room for a second block on a multiprocessor.
template <class T, bool soft>
__device__ void take_once(const ByToken& job, const TokenRoom<T, soft>& at, uint32_t tile,
                          bool valuing, bool sloping) {
  const Gradients& p = job.p;
  const auto blocks = [](int64_t width) {
    return static_cast<int>((width + kSpread - 1) / kSpread);
  };
  make_group<T>(job, at, 0, {valuing, sloping, sloping});
  if (soft && sloping) write_sums(job, at, tile);
  if (valuing) spread_group<T>(job, at, kValueGradient, 0, 0, blocks(p.C));
  if (soft && sloping && p.keys_grad != nullptr)
    spread_group<T>(job, at, kKeyGradient, 0, 0, blocks(p.E));
}

// The same where weights are made again, group after group, for every block of columns.
template <class T, bool soft>
__device__ void take_again(const ByToken& job, const TokenRoom<T, soft>& at, uint32_t tile,
                           bool valuing, bool sloping) {
  const Gradients& p = job.p;
#pragma unroll 1
  for (int phase = kSums; phase <= (soft ? kKeyGradient : kValueGradient); ++phase) {
    if (phase == kSums && !sloping) continue;
    if (phase == kValueGradient && !valuing) continue;
    if (phase == kKeyGradient && (!sloping || p.keys_grad == nullptr)) continue;
    const int64_t width = phase == kSums ? 1 : phase == kValueGradient ? p.C : p.E;
    const Wanted wanted{phase == kValueGradient, phase != kValueGradient, phase == kSums};
#pragma unroll 1
    for (int block = 0; block * int64_t{kSpread} < width; ++block) {
#pragma unroll 1
      for (int group = 0; group < job.groups; ++group) {
        make_group<T>(job, at, group, wanted);
        if (phase != kSums)
          spread_group<T>(job, at, static_cast<Phase>(phase), group, block, block + 1);
      }
    }
    if (soft && phase == kSums) write_sums(job, at, tile);
  }
}

template <class T, bool soft, bool again>
__device__ void take_tokens(const ByToken& job) {
  const Gradients& p = job.p;
  Arena arena;
  const TokenRoom<T, soft> at(arena, job);
  const auto number = static_cast<uint32_t>(block());
  const uint32_t part = number % job.parts, tile = number / job.parts;
  const bool valuing = part == 0 && p.value_grad != nullptr;
  const bool sloping = part == job.parts - 1 && p.sloping();
  if (thread() == 0)
    at.room.pair->set_tokens(p, tile / job.tiles, int64_t{tile % job.tiles} * kTokens, p.N);
  for (int i = thread(); i < 2 * kTokens; i += kThreads)
    at.room.bias_sums[i] = at.room.scale_sums[i] = 0.0f;
  sync();
  if constexpr (again)
    take_again(job, at, tile, valuing, sloping);
  else
    take_once(job, at, tile, valuing, sloping);
}

template <class T, bool soft>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2)
    aggregate_tokens_kernel(const __grid_constant__ ByToken job) {
  take_tokens<T, soft, false>(job);
}

template <class T, bool soft>
__global__ void __launch_bounds__(kThreads, 1)
    aggregate_tokens_again_kernel(const __grid_constant__ ByToken job) {
  take_tokens<T, soft, true>(job);
}

// Without slots all gradients are zero.
template <class T, bool soft>
const char* clear(const Gradients& p, void* stream) {
  const int64_t rows = p.B * p.N;
  const char* error = nullptr;
  if (soft && p.keys_grad != nullptr)
    error = zero(p.keys_grad, rows * p.E * int64_t{sizeof(T)}, stream);
  if (error == nullptr && p.value_grad != nullptr)
    error = zero(p.value_grad, rows * p.C * int64_t{sizeof(T)}, stream);
  if (error == nullptr && p.bias_grad != nullptr)
    error = zero(p.bias_grad, rows * int64_t{sizeof(float)}, stream);
  return error;
}

template <class T, bool soft>
const char* launch_by_token(const Gradients& p, void* stream) {
  if (p.M == 0) return clear<T, soft>(p, stream);
  const ByToken job = by_token_of<T, soft>(p);
  const Launch how{.blocks = blocks_of(job),
                   .threads = kThreads,
                   .shared = shared_of_tokens<T, soft>(job),
                   .stream = stream};
  return job.groups == 1 ? launch<aggregate_tokens_kernel<T, soft>>(how, job)
                         : launch<aggregate_tokens_again_kernel<T, soft>>(how, job);
}

}  // namespace tk::cuda
