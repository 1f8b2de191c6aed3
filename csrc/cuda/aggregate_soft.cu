// aggregate_soft on a GPU: scores of a piece of the tokens against 64 slots, their softmax, then
// their sums, channels after channels.
//
// The scores of a piece (256 tokens, 128 of float32) stay in registers while the features stream
// past, their exponentials in shared memory while the channels do: nothing is computed twice
// however many of both there are. One launch where a piece holds all tokens; else every split of
// the tokens leaves its sums, and a second launch joins them. Where blocks are few, the channels
// of a split are divided among several, which make the scores again: that changes no sum.
#include "cuda/aggregate_piece.cuh"

namespace tk {
namespace {

using cuda::kColumns;
using cuda::kDeep;
using cuda::kFeatures;
using cuda::kHalves;
using cuda::kOwn;
using cuda::kPiece;
using cuda::kSlots;
using cuda::kStages;
using cuda::kTerms;
using cuda::kThreads;
using cuda::kValues;
using cuda::kWarps;
using cuda::Room;
using cuda::Scores;
using cuda::SoftJob;

// Σ exponential · value for the blocks of channels of a piece.
template <class T>
struct Values {
  const Room<T>& room;
  int asked = 0;  // tiles so far

  __device__ void fetch() {
    const int chunk = asked / room.task->tiles, tile = asked % room.task->tiles;
    if (chunk < room.task->chunks)
      cuda::fetch_some<T, kFeatures, kColumns<T>>(room.stages + asked % kDeep * kValues<T>,
                                                  room.task->values, tile * kFeatures,
                                                  chunk * kColumns<T>, room.task->shown);
    ++asked;
    cuda::commit_copies();
  }

  // write(sums, slot, column) after each block of channels.
  template <class Write>
  __device__ void add(const Write& write) {
    constexpr int per_warp = kColumns<T> / kWarps * kHalves<T>;
    constexpr int stride = cuda::tile_stride<T>(kColumns<T>);
    constexpr int parts_stride = cuda::tile_stride<T>(kSlots);
    const int across = cuda::warp() / kHalves<T> * per_warp;
    const int slot = cuda::warp() % kHalves<T> * (kSlots / kHalves<T>);
#pragma unroll 1
    for (int chunk = 0; chunk < room.task->chunks; ++chunk) {
      const int column = chunk * kColumns<T> + across;
      float sums[kSlots / kHalves<T> / 16][per_warp / 8][4] = {};
#pragma unroll 1
      for (int tile = 0; tile < room.task->tiles; ++tile) {
        cuda::wait_copies<kDeep - 2>();
        cuda::sync();
        fetch();
        if (column >= room.task->values.columns) continue;
        const T* parts = room.parts + tile * kFeatures * parts_stride + slot;
        const T* values = room.stages + asked % kDeep * kValues<T> + across;
#pragma unroll 1
        for (int term = 0; term < kFeatures; term += kTerms)
          cuda::add_product<T, cuda::kAcross, cuda::kAcross>(sums, parts + term * parts_stride,
                                                             parts_stride, values + term * stride,
                                                             stride, kTerms);
      }
      write(sums, slot, column);
    }
  }
};

// What stands in registers, times `factor` of each slot where there is one, to the weights: 16
// tokens of every warp at a time go through the memory of the tiles, which nobody uses.
template <class T>
__device__ void keep_weights(Scores<T>& scores, const SoftJob& job, const Room<T>& room,
                             const float* factor) {
  constexpr int stride = kSlots + 8;
  static_assert(16 * kWarps * stride * 4 <= kStages<T> * sizeof(T));
  auto* tile = reinterpret_cast<float*>(room.stages);
#pragma unroll
  for (int i = 0; i < kOwn<T> / 16; ++i) {
    cuda::sync();
#pragma unroll
    for (int v = 0; v < 4; v += 2)
#pragma unroll
      for (int j = 0; j < kSlots / 8; ++j)
        cuda::store(tile + (cuda::warp() * 16 + cuda::lane() / 4 + 4 * v) * stride + 8 * j +
                        cuda::lane() % 4 * 2,
                    cuda::Vector<float, 2>{{scores[i][j][v], scores[i][j][v + 1]}});
    cuda::sync();
#pragma unroll 1
    for (int at = cuda::thread(); at < 16 * kWarps * kSlots; at += kThreads) {
      const int row = at / kSlots, slot = at % kSlots;
      const int token = row / 16 * kOwn<T> + 16 * i + row % 16;
      if (token >= room.task->left || slot >= room.task->slots) continue;
      const float some = tile[row * stride + slot];
      room.task->weights[token * job.p.M + slot] =
          factor == nullptr ? some : cuda::scaled(some, factor[slot]);
    }
  }
  cuda::sync();
}

// The sums of one block of channels to where they belong.
template <class T, int I, int J>
__device__ void write_sums(float (&sums)[I][J][4], const SoftJob& job, const Room<T>& room,
                           int first, int at) {
  const int64_t channels = job.p.C;
  const int64_t begin =
      (room.task->row + first) * channels + int64_t{room.task->part} * job.each * kColumns<T> + at;
  const int slots = room.task->slots - first, places = room.task->values.columns - at;
  const bool even = channels % 2 == 0, older = !room.task->first;
  auto* out = static_cast<T*>(job.p.out) + begin;
  float* partial = job.partial.sums + begin;
#pragma unroll
  for (int i = 0; i < 2 * I; ++i) {
    const int slot = 8 * i + cuda::lane() / 4;
    if (slot >= slots) continue;
    const float factor = (older ? room.shrink : room.inverse)[first + slot];
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int column = 8 * j + cuda::lane() % 4 * 2, left = places - column;
      float one = sums[i / 2][j][i % 2 * 2], two = sums[i / 2][j][i % 2 * 2 + 1];
      const int64_t to = slot * channels + column;
      if (job.whole) {
        cuda::store_pair(out + to, cuda::scaled(one, factor), cuda::scaled(two, factor), left,
                         even);
        continue;
      }
      if (older && left > 0) one += partial[to] * factor;
      if (older && left > 1) two += partial[to + 1] * factor;
      cuda::store_pair(partial + to, one, two, left, even);
    }
  }
}

template <class T>
__device__ void take_piece(const SoftJob& job, const Room<T>& room) {
  Scores<T> scores = {};
  cuda::score_piece<T>(scores, room, job);
  const bool keeps = room.task->weights != nullptr;
  if (keeps && !job.whole) keep_weights<T>(scores, job, room, nullptr);
  Values<T> values{room};
  const auto begin_values = [&] {
#pragma unroll 1
    for (int i = 1; i < kDeep; ++i) values.fetch();
  };
  const bool late = keeps && job.whole;
  cuda::rank_piece<T>(scores, room, [&] {
    if (!late) begin_values();
  });
  if (late) {
    keep_weights<T>(scores, job, room, room.inverse);
    begin_values();
  }
  values.add(
      [&](auto& sums, int slot, int column) { write_sums<T>(sums, job, room, slot, column); });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    aggregate_soft_kernel(const __grid_constant__ SoftJob job) {
  cuda::Arena arena;
  const Room<T> room(arena);
  const int slot = cuda::thread();
  if (slot == 0) room.task->start(job);
  if (slot < kSlots) {
    room.highest[slot] = cuda::kNothing;
    room.total[slot] = 0.0f;
  }
  cuda::sync();
  while (true) {
    take_piece<T>(job, room);
    cuda::sync();
    if (room.task->left <= kPiece<T>) break;
    cuda::sync();
    if (slot == 0) room.task->next(job);
    cuda::sync();
  }
  if (room.task->part != 0 || slot >= room.task->slots) return;
  const int64_t row = room.task->row + slot;
  if (job.whole) {
    job.p.lse[row] = cuda::logarithm(room.highest[slot], room.total[slot]);
  } else {
    job.partial.highest[row] = room.highest[slot];
    job.partial.total[row] = room.total[slot];
  }
}

int64_t up(int64_t count, int64_t each) { return (count + each - 1) / each; }

int64_t piece_of(const AggregateSoft& p) {
  return p.dtype == DType::kFloat32 ? kPiece<float> : kPiece<BFloat16>;
}

// In how many splits of how many tokens: a piece each, as long as that is not more than there may
// be; of one piece in equal shares.
int64_t splits_of(const AggregateSoft& p, int64_t* span) {
  const int64_t piece = piece_of(p), pieces = p.N > piece ? up(p.N, piece) : 1;
  const int64_t each = up(pieces, cuda::kMostSplits);
  *span = each > 1 ? each * piece : up(up(p.N, pieces), kFeatures) * kFeatures;
  return p.N > *span ? up(p.N, *span) : 1;
}

template <class T>
const char* run(const AggregateSoft& p, void* stream) {
  SoftJob job{};
  job.p = p;
  job.whole = p.N <= kPiece<T>;
  job.down = static_cast<uint32_t>(up(p.M, kSlots));
  int64_t span = 0;
  const int64_t splits = splits_of(p, &span), blocks = p.B * splits * job.down;
  job.partial =
      cuda::partial_in(p.scratch, p.B * splits * p.M, p.C, static_cast<int>(splits), span);
  if (blocks == 0) return nullptr;
  const int64_t chunks = p.C > 0 ? up(p.C, kColumns<T>) : 1;
  const int64_t idle = cuda::multiprocessors() / blocks;
  job.each = static_cast<int>(up(chunks, idle > 1 ? idle : 1));
  job.ranges = static_cast<uint32_t>(up(chunks, job.each));
  const char* error = cuda::launch<aggregate_soft_kernel<T>>({.blocks = blocks * job.ranges,
                                                              .threads = kThreads,
                                                              .shared = Room<T>::bytes(),
                                                              .stream = stream},
                                                             job);
  if (error != nullptr || job.whole) return error;
  return cuda::launch_join<T>({job.partial, p.B, p.M, p.N, p.C, p.out, p.lse, p.weights}, stream);
}

}  // namespace

int64_t aggregate_soft_cuda_scratch(const AggregateSoft& p) {
  int64_t span = 0;
  const int64_t splits = splits_of(p, &span);
  return p.N <= piece_of(p) ? 0 : cuda::partial_bytes(p.B * splits * p.M, p.C);
}

const char* aggregate_soft_cuda(const AggregateSoft& p, void* stream) {
  const char* error = nullptr;
  dispatch(p.dtype, [&](auto zero) { error = run<decltype(zero)>(p, stream); });
  return error;
}

}  // namespace tk
