// Scores of a piece of the tokens against 64 slots, and their softmax: the first half of
// aggregate_soft on a GPU.
#pragma once

#include "cuda/aggregate.cuh"

namespace tk::cuda {

constexpr int kWarps = kThreads / kWarp;
constexpr int kFeatures = 32;  // and tokens of a tile of values
constexpr int kDeep = 3;       // tiles of values under way
constexpr int kTerms = 16;     // at a time: more take more registers than there are
template <class T>
constexpr int kPiece = sizeof(T) == 4 ? 128 : 256;  // tokens
template <class T>
constexpr int kOwn = kPiece<T> / kWarps;  // tokens of a warp
template <class T>
constexpr int kColumns = sizeof(T) == 4 ? 128 : 256;  // channels that are summed at a time
template <class T>
constexpr int kHalves = sizeof(T) == 4 ? 2 : 1;  // warps that share a column's slots
template <class T>
constexpr int kKeys = kPiece<T> * tile_stride<T>(kFeatures);
template <class T>
constexpr int kQueries = kSlots * tile_stride<T>(kFeatures);
template <class T>
constexpr int kValues = kFeatures * tile_stride<T>(kColumns<T>);
template <class T>
constexpr int kParts = kPiece<T> * tile_stride<T>(kSlots);
template <class T>
constexpr int kStages =
    2 * (kKeys<T> + kQueries<T>) > kDeep* kValues<T> ? 2 * (kKeys<T> + kQueries<T>)
                                                     : kDeep * kValues<T>;

struct SoftJob {
  AggregateSoft p;
  Partial partial;
  bool whole;             // one piece holds all tokens
  uint32_t down, ranges;  // blocks of slots, ranges of channels
  int each;               // kColumns of a range
};

template <class T>
using Scores = float[kOwn<T> / 16][kSlots / 8][4];

// The piece of its work that a block has at hand. It lies in shared memory, as registers are few.
template <class T>
struct Task {
  uint32_t part, down, split, image;
  int left, slots;    // tokens and slots from here on
  int tiles, chunks;  // of values: kFeatures tokens, kColumns channels
  bool first;         // piece of the split
  int64_t begin;      // token
  Shown shown;
  Rows<T> keys, queries, values;
  const float* bias;
  float* weights;  // to be kept, or null
  int64_t row;     // of the results, or of the split's sums

  __device__ void start(const SoftJob& job) {
    auto number = static_cast<uint32_t>(block());
    part = number % job.ranges;
    number /= job.ranges;
    down = number % job.down;
    number /= job.down;
    split = number % static_cast<uint32_t>(job.partial.splits);
    image = number / static_cast<uint32_t>(job.partial.splits);
    const int64_t slot = int64_t{down} * kSlots;
    slots = static_cast<int>(job.p.M - slot < kSlots ? job.p.M - slot : kSlots);
    row = (int64_t{image} * job.partial.splits + split) * job.p.M + slot;
    queries.set(job.p.query, image, slot, job.p.E, 0);
    first = true;
    begin = split * job.partial.span;
    const int64_t here = job.p.N - begin;
    left = static_cast<int>(here < job.partial.span ? here : job.partial.span);
    look(job);
  }
  __device__ void next(const SoftJob& job) {
    first = false;
    begin += kPiece<T>;
    left -= kPiece<T>;
    look(job);
  }
  __device__ void look(const SoftJob& job) {
    const AggregateSoft& p = job.p;
    shown.set(p.mask, image, begin, left);
    keys.set(p.key, image, begin, p.E, 0);
    values.set(p.value, image, begin, p.C, int64_t{part} * job.each * kColumns<T>);
    bias = p.bias.data == nullptr
               ? nullptr
               : p.bias.data + image * p.bias.batch_stride + begin * p.bias.token_stride;
    tiles = left < kFeatures   ? 1
            : left < kPiece<T> ? (left + kFeatures - 1) / kFeatures
                               : kPiece<T> / kFeatures;
    chunks = (values.columns - 1) / kColumns<T> + 1;
    if (chunks > job.each) chunks = job.each;
    weights = p.weights == nullptr || part != 0
                  ? nullptr
                  : p.weights + (image * p.N + begin) * p.M + int64_t{down} * kSlots;
  }
};

// What a block has in shared memory.
template <class T>
struct Room {
  Task<T>* task;
  T *stages, *parts;  // tiles under way, exponentials (tokens, slots)
  float* by_warp;     // (kWarps, slots)
  float *highest, *shift, *shrink, *total, *inverse;  // (slots)

  __device__ explicit Room(Arena& arena) {
    task = arena.shared<Task<T>>(1);
    stages = arena.shared<T>(kStages<T>);
    parts = arena.shared<T>(kParts<T>);
    by_warp = arena.shared<float>(kWarps * kSlots);
    highest = arena.shared<float>(kSlots);
    shift = arena.shared<float>(kSlots);
    shrink = arena.shared<float>(kSlots);
    total = arena.shared<float>(kSlots);
    inverse = arena.shared<float>(kSlots);
  }
  static int64_t bytes() {
    return shared_bytes<Task<T>>(1) + shared_bytes<T>(kStages<T>) + shared_bytes<T>(kParts<T>) +
           shared_bytes<float>(kWarps * kSlots) + 5 * shared_bytes<float>(kSlots);
  }
};

// ⟨key, query⟩ of this warp's tokens.
template <class T>
__device__ void multiply_keys(Scores<T>& scores, const Room<T>& room) {
  constexpr int stride = tile_stride<T>(kFeatures), stage = kKeys<T> + kQueries<T>;
  const auto fetch = [&](int feature) {
    if (feature < room.task->keys.columns) {
      T* to = room.stages + feature / kFeatures % 2 * stage;
      fetch_some<T, kPiece<T>, kFeatures>(to, room.task->keys, 0, feature, room.task->shown);
      const int slots = room.task->slots;
      fetch_some<T, kSlots, kFeatures>(to + kKeys<T>, room.task->queries, 0, feature,
                                       [=](int slot) { return slot < slots; });
    }
    commit_copies();
  };
  const int own = warp() * kOwn<T>;
#pragma unroll 1
  for (int feature = -kFeatures; feature < room.task->keys.columns; feature += kFeatures) {
    wait_copies<0>();
    sync();
    fetch(feature + kFeatures);
    if (feature < 0 || own >= room.task->left) continue;
    const T* from = room.stages + feature / kFeatures % 2 * stage;
#pragma unroll 1
    for (int term = 0; term < kFeatures; term += kTerms)
      add_product<T>(scores, from + own * stride + term, stride, from + kKeys<T> + term, stride,
                     kTerms);
  }
}

// The largest or the sum of what a lane has of each slot, of all lanes of the warp: to by_warp.
template <class T, class Join>
__device__ void gather_columns(const Scores<T>& scores, float* by_warp, const Join& join) {
#pragma unroll
  for (int j = 0; j < kSlots / 8; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float all = join(scores[0][j][c], scores[0][j][2 + c]);
#pragma unroll
      for (int i = 1; i < kOwn<T> / 16; ++i)
        all = join(all, join(scores[i][j][c], scores[i][j][2 + c]));
      for (int step = 4; step < kWarp; step *= 2) all = join(all, shuffle_xor(all, step));
      if (lane() < 4) by_warp[warp() * kSlots + 8 * j + lane() * 2 + c] = all;
    }
}

// body(score, next score, token of the piece, slot) for each pair of this lane.
template <class T, class Body>
__device__ void for_scores(Scores<T>& scores, const Body& body) {
  for_pairs(scores, [&](float& one, float& two, int row, int slot) {
    body(one, two, warp() * kOwn<T> + row, slot);
  });
}

// body(scores of one token, the token) for each of this lane.
template <class T, class Body>
__device__ void for_tokens(Scores<T>&, const Body& body) {
#pragma unroll
  for (int i = 0; i < kOwn<T> / 16; ++i)
#pragma unroll
    for (int v = 0; v < 2; ++v) body(i, 2 * v, warp() * kOwn<T> + 16 * i + lane() / 4 + 8 * v);
}

template <class T>
__device__ void score_piece(Scores<T>& scores, const Room<T>& room, const SoftJob& job) {
  const AggregateSoft& p = job.p;
  multiply_keys<T>(scores, room);
  const float scale = p.scale_tensor == nullptr ? p.scale : *p.scale_tensor;
  for_tokens<T>(scores, [&](int i, int v, int token) {
    const bool visible = room.task->shown(token);
    const float* bias = room.task->bias;
    const float added = visible && bias != nullptr ? bias[token * p.bias.token_stride] : 0.0f;
#pragma unroll
    for (int j = 0; j < kSlots / 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores[i][j][v + c];
        score = visible ? score * scale + added : kNothing;
      }
  });
}

// Scores become exponentials, in registers and in shared memory; `between` runs when the tiles are
// free.
template <class T, class Between>
__device__ void rank_piece(Scores<T>& scores, const Room<T>& room, const Between& between) {
  gather_columns<T>(scores, room.by_warp, [](float a, float b) { return fmaxf(a, b); });
  sync();
  between();
  const int slot = thread();
  if (slot < kSlots) {
    float top = room.highest[slot];
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, room.by_warp[w * kSlots + slot]);
    const float shift = shift_of(top);
    room.shift[slot] = shift;
    room.shrink[slot] = exponential(room.highest[slot], shift);
    room.highest[slot] = top;
  }
  sync();
  constexpr int stride = tile_stride<T>(kSlots);
  for_scores<T>(scores, [&](float& one, float& two, int token, int at) {
    one = exponential(one, room.shift[at]);
    two = exponential(two, room.shift[at + 1]);
    store(room.parts + token * stride + at, Vector<T, 2>{{narrow<T>(one), narrow<T>(two)}});
  });
  gather_columns<T>(scores, room.by_warp, [](float a, float b) { return a + b; });
  sync();
  if (slot < kSlots) {
    float total = room.total[slot] * room.shrink[slot];
    for (int w = 0; w < kWarps; ++w) total += room.by_warp[w * kSlots + slot];
    room.total[slot] = total;
    room.inverse[slot] = inverse(total);
  }
}

}  // namespace tk::cuda
