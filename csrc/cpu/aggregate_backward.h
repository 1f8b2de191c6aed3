// Gradients of soft token aggregation, without atomics. First every block of tokens by itself: its
// softmax (kept or made again), the gradient of its scores, and from those the gradients of its
// values and keys. Then the query gradient, which sums over the tokens, from the score gradients
// left in the scratch.
//
// One driver for both forms: with `Given` scores the params' key holds the logits (B, N, M), its
// gradient theirs, and E is 0.
#pragma once

#include "cpu/aggregate.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kBackwardTokens = 256;
constexpr int64_t kLeaveRows = 2 * kTileRows, kLeaveCols = 256;
constexpr int64_t kScratchFloats =
    int64_t{4} << 20;  // score gradients, and query gradients, in flight: 16 MiB each

// How the work is cut. A chunk is as many images, or as many blocks of one image, as the scratch
// holds score gradients of.
struct Cuts {
  int64_t tokens, blocks;  // tokens per block, blocks per image
  int64_t slots, slot_blocks;
  int64_t stride;  // of the score gradients in the scratch
  int64_t images, chunk_blocks;
  int64_t panels, panel_group,
      sums;  // query gradient: panels of columns, how many make a task, floats per image
  int64_t workers;
  bool shared;

  Cuts(const AggregateSoftBackward& p, int threads)
      : tokens(block_size(p.N, kBackwardTokens)),
        blocks(ceil_div(p.N, tokens)),
        slots(block_size(p.M, kSlotBlock)),
        slot_blocks(ceil_div(p.M, slots)),
        stride(ceil_div(p.M, kLanes) * kLanes),
        panels(ceil_div(p.E, kTileCols)),
        panel_group(smaller(kPanelGroup, larger<int64_t>(panels / (2 * threads), 1))),
        sums(panels * p.M * kTileCols),
        shared(p.query.batch_stride == 0) {
    const int64_t block = larger<int64_t>(tokens * stride, 1),
                  image = larger<int64_t>(blocks, 1) * block;
    const bool query = p.query_grad != nullptr;
    images = larger<int64_t>(query ? kScratchFloats / image : p.B, 1);
    if (query && !shared)
      images = smaller(images, larger<int64_t>(kScratchFloats / larger<int64_t>(sums, 1), 1));
    images = smaller(images, larger<int64_t>(p.B, 1));
    chunk_blocks = query && image > kScratchFloats ? larger<int64_t>(kScratchFloats / block, 1)
                                                   : larger<int64_t>(blocks, 1);
    workers = smaller<int64_t>(threads, images * chunk_blocks);
  }
};

struct BackwardWorker {
  int64_t* packed_gradient;  // which image and slot block `gradient`, `gradient_t` and `mean` hold
  int64_t* packed_query;
  float* gradient;    // packed (slots, C)
  float* gradient_t;  // packed (C, slots)
  float* query;       // packed (slots, E)
  float* query_t;     // packed (E, slots)
  float* mean;        // (slots): <gradient, tokens>, the weighted mean of what the softmax receives
  float* weights;     // (tokens, slots)
  float* shares;      // (tokens, slots): gradient of the scores
  float* scores;      // (tokens, slots), unscaled, where the scale wants its gradient
  float* operand;     // (tokens, slots): weights or shares in another form
  float* keys;    // (tokens, E) in float32, for halves; one block of it where the slots come in one
  float* values;  // (tokens, C), the same
  float* stage;
};

BackwardWorker backward_worker(const AggregateSoftBackward& p, const Cuts& cuts, Arena* arena) {
  const bool halves = p.dtype != DType::kFloat32;
  const int64_t stride = ceil_div(cuts.slots, kLanes) * kLanes;
  BackwardWorker w;
  w.packed_gradient = reinterpret_cast<int64_t*>(arena->floats(2));
  w.packed_query = reinterpret_cast<int64_t*>(arena->floats(2));
  w.gradient = arena->floats(packed_size(cuts.slots, p.C));
  w.gradient_t = arena->floats(packed_size(p.C, cuts.slots));
  w.query = arena->floats(packed_size(cuts.slots, p.E));
  w.query_t = arena->floats(p.weights ? 0 : packed_size(p.E, cuts.slots));
  w.mean = arena->floats(stride);
  w.weights = arena->floats(cuts.tokens * stride);
  w.shares = arena->floats(cuts.tokens * stride);
  w.scores = arena->floats(p.scale_grad ? cuts.tokens * stride : 0);
  w.operand = arena->floats(cuts.tokens * stride);
  const auto own = [&](int64_t width) {
    return !halves ? 0 : cuts.slot_blocks == 1 ? kLeaveRows * kLeaveCols : cuts.tokens * width;
  };
  w.keys = arena->floats(own(p.E));
  w.values = arena->floats(own(p.C));
  w.stage = arena->floats(halves ? cuts.tokens * kDepthBlock : 0);
  return w;
}

// Packs what the blocks of one image share, where this worker does not hold it already.
template <class T, bool Given>
void prepare(const AggregateSoftBackward& p, const Cuts& cuts, const BackwardWorker& w,
             int64_t image, int64_t slot, int64_t slots) {
  const int64_t number = image * p.M + slot, query_number = cuts.shared ? slot : number;
  if (!Given && *w.packed_query != query_number) {
    const T* const query = rows_of<T>(p.query, image, slot);
    if (p.key_grad) Product<T>::pack(query, p.query.row_stride, 1, slots, p.E, w.query);
    if (!p.weights) Product<T>::pack(query, 1, p.query.row_stride, p.E, slots, w.query_t);
    *w.packed_query = query_number;
  }
  if (*w.packed_gradient == number) return;
  const T* const gradient = rows_of<T>(p.gradient, image, slot);
  const T* const tokens = rows_of<T>(p.tokens, image, slot);
  for (int64_t m = 0; m < slots; ++m) {
    Floats total = splat(0.0f);
    each_vector(p.C, [&](int64_t c, auto part) {
      total += load(gradient + m * p.gradient.row_stride + c, part) *
               load(tokens + m * p.tokens.row_stride + c, part);
    });
    w.mean[m] = sum(total);
  }
  Product<T>::pack(gradient, p.gradient.row_stride, 1, slots, p.C, w.gradient);
  Product<T>::pack(gradient, 1, p.gradient.row_stride, p.C, slots, w.gradient_t);
  *w.packed_gradient = number;
}

// shares[tokens, slots], holding <value, gradient>, becomes the gradient of the scores: weight ·
// (share − mean), zero for hidden tokens. Returns its product with `scores` (of the shares'
// stride), where there are any: what the scale gets.
inline double share(const float* weights, int64_t weights_stride, const float* scores,
                    float* shares, int64_t stride, int64_t tokens, int64_t slots,
                    const Terms& terms, const float* mean, float* bias_grad) {
  double scale_grad = 0;
  for (int64_t n = 0; n < tokens; ++n) {
    Floats total = splat(0.0f), scaled = splat(0.0f);
    if (terms.hidden(n)) {
      fill(shares + n * stride, slots, 0.0f);
    } else {
      each_vector(slots, [&](int64_t m, auto part) {
        const Floats share = load(shares + n * stride + m, part) - load(mean + m, part);
        const Floats result = load(weights + n * weights_stride + m, part) * share;
        store(shares + n * stride + m, result, part);
        total += result;
        if (scores) scaled += result * load(scores + n * stride + m, part);
      });
    }
    if (bias_grad) bias_grad[n] += sum(total);
    if (scores) scale_grad += static_cast<double>(sum(scaled));
  }
  return scale_grad;
}

// Where the float32 rows of a gradient are summed: in the output itself, or for halves in the
// worker's own place.
template <class T>
TK_INLINE float* sums_of(void* output, int64_t row, int64_t width, float* own) {
  return sizeof(T) == 4 ? static_cast<float*>(output) + row * width : own;
}

// sums[tokens, width] (+)= left · packed. Halves whose slots come in one block leave at once for
// `out`, a block after the other, each in runs that the caches like.
template <class T>
void add_rows(const Cuts& cuts, const Left& left, const float* packed, int64_t tokens,
              int64_t width, int64_t slots, float* sums, bool accumulate, T* out) {
  using Kind = typename Product<T>::Kind;
  const int64_t words = Kind::words(slots);
  if (sizeof(T) == 4 || cuts.slot_blocks != 1) {
    return multiply<Kind>(left, packed, tokens, width, words, sums, width, accumulate);
  }
  const int64_t blocks = ceil_div(tokens, kLeaveRows);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t row = tokens * i / blocks, rows = tokens * (i + 1) / blocks - row;
    const Left part = {left.data + row * left.row_stride, left.row_stride, left.depth_stride};
    for (int64_t c = 0; c < width; c += kLeaveCols) {
      const int64_t cols = smaller(width - c, kLeaveCols);
      multiply<Kind>(part, packed + c * words, rows, cols, words, sums, kLeaveCols, false);
      narrow_rows(sums, kLeaveCols, rows, cols, out + row * width + c, width);
    }
  }
}

// The score gradients of a block as a left side read by columns, in the scratch: there the query
// gradient finds them.
template <class T>
TK_INLINE void keep_columns(const float* shares, int64_t stride, int64_t tokens, int64_t slots,
                            float* kept, int64_t kept_stride) {
  if (Product<T>::Kind::kPerWord > 1) {
    Product<T>::columns(shares, stride, tokens, slots, kept, kept_stride);
  } else {
    widen_rows(shares, stride, tokens, slots, kept, kept_stride);
  }
}

// One block of tokens of one image, slot block by slot block. `kept` (its stride that of the cuts)
// receives the score gradients; returned is what the scale gets.
template <class T, bool Given>
double backward_block(const AggregateSoftBackward& p, const Cuts& cuts, const BackwardWorker& w,
                      float scale, int64_t image, int64_t first, float* kept) {
  const int64_t tokens = smaller(p.N - first, cuts.tokens), row = image * p.N + first;
  const int64_t stride = ceil_div(cuts.slots, kLanes) * kLanes;
  const Terms terms = terms_at(scale, p.bias, p.mask, image, first);
  float* const keys = Given || !p.key_grad ? nullptr : sums_of<T>(p.key_grad, row, p.E, w.keys);
  float* const values = p.value_grad ? sums_of<T>(p.value_grad, row, p.C, w.values) : nullptr;
  float* const bias_grad = p.bias_grad ? p.bias_grad + row : nullptr;
  if (bias_grad) fill(bias_grad, tokens, 0.0f);
  if (p.M == 0 && keys) fill(keys, tokens * p.E, 0.0f);  // no block of slots to start the sums
  if (p.M == 0 && p.value_grad) fill(values, tokens * p.C, 0.0f);
  double scale_grad = 0;
  for (int64_t slot = 0; slot < p.M; slot += cuts.slots) {
    const int64_t slots = smaller(p.M - slot, cuts.slots);
    prepare<T, Given>(p, cuts, w, image, slot, slots);
    const float* weights = p.weights ? p.weights + row * p.M + slot : w.weights;
    const int64_t weights_stride = p.weights ? p.M : stride;
    if (!p.weights) {
      const T* const key = rows_of<T>(p.key, image, first);
      if constexpr (Given) {
        widen_rows(key + slot, p.key.row_stride, tokens, slots, w.weights, stride);
      } else {
        Product<T>::multiply_rows(key, p.key.row_stride, w.query_t, tokens, slots, p.E, w.weights,
                                  stride, false, w.stage);
      }
      if (p.scale_grad) widen_rows(w.weights, stride, tokens, slots, w.scores, stride);
      weigh(w.weights, stride, tokens, slots, terms, p.lse + image * p.M + slot);
    }
    if (p.value_grad) {
      const Left left = Product<T>::rows(weights, weights_stride, tokens, slots, w.operand, stride);
      add_rows<T>(cuts, left, w.gradient, tokens, p.C, slots, values, slot > 0,
                  static_cast<T*>(p.value_grad) + row * p.C);
    }
    if (!p.key_grad && !p.query_grad && !p.bias_grad && !p.scale_grad) continue;
    Product<T>::multiply_rows(rows_of<T>(p.value, image, first), p.value.row_stride, w.gradient_t,
                              tokens, slots, p.C, w.shares, stride, false, w.stage);
    scale_grad += share(weights, weights_stride, p.scale_grad ? w.scores : nullptr, w.shares,
                        stride, tokens, slots, terms, w.mean, bias_grad);
    if constexpr (Given) {
      for (int64_t n = 0; n < tokens; ++n) {
        T* const to = static_cast<T*>(p.key_grad) + (row + n) * p.M + slot;
        each_vector(slots, [&](int64_t m, auto part) {
          store(to + m, load(w.shares + n * stride + m, part), part);
        });
      }
    } else {
      if (p.query_grad) keep_columns<T>(w.shares, stride, tokens, slots, kept + slot, cuts.stride);
      if (!p.key_grad) continue;
      for (int64_t i = 0; i < tokens * stride; i += kLanes)
        store(w.shares + i, load(w.shares + i) * scale);
      const Left left = Product<T>::rows(w.shares, stride, tokens, slots, w.operand, stride);
      add_rows<T>(cuts, left, w.query, tokens, p.E, slots, keys, slot > 0,
                  static_cast<T*>(p.key_grad) + row * p.E);
    }
  }
  const bool narrow = sizeof(T) < 4 && cuts.slot_blocks != 1;
  if (narrow && keys)
    narrow_rows(keys, p.E, tokens, p.E, static_cast<T*>(p.key_grad) + row * p.E, p.E);
  if (narrow && p.value_grad)
    narrow_rows(values, p.C, tokens, p.C, static_cast<T*>(p.value_grad) + row * p.C, p.C);
  return scale_grad;
}

// Adds some panels of columns of the query gradient of `image`, over blocks of its tokens: sums[M,
// kTileCols] += sharesᵀ · keys each.
template <class T>
void add_query_panels(const AggregateSoftBackward& p, const Cuts& cuts, int64_t image,
                      int64_t block, int64_t blocks, int64_t panel, const float* kept,
                      float* packed, float* sums) {
  using Kind = typename Product<T>::Kind;
  const int64_t column = panel * kTileCols,
                cols = smaller<int64_t>(p.E - column, cuts.panel_group * kTileCols);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = (block + i) * cuts.tokens, tokens = smaller(p.N - first, cuts.tokens);
    const int64_t words = Kind::words(tokens);
    pack_tokens(rows_of<T>(p.key, image, first) + column, p.key.row_stride, tokens, cols,
                terms_at(1.0f, {}, p.mask, image, first), packed);
    const T* const next = rows_of<T>(p.key, image, first + tokens) + column;
    const int64_t ahead = i + 1 < blocks ? smaller(p.N - first - tokens, cuts.tokens) : 0;
    for (int64_t c = 0; c < cols; c += kTileCols) {
      const int64_t end = smaller(cols, c + kTileCols);
      prefetch_rows(next, p.key.row_stride, ahead * c / cols, ahead * end / cols, cols);
      multiply_panel<Kind>({kept + i * cuts.tokens * cuts.stride, 1, cuts.stride},
                           packed + c * words, p.M, smaller<int64_t>(cols - c, kTileCols), words,
                           sums + (column + c) * p.M, kTileCols, true);
    }
  }
}

// The query gradient of one image (of all, where it is shared) from its sums.
template <class T>
void write_query(const AggregateSoftBackward& p, const Cuts& cuts, float scale, int64_t image,
                 const float* sums) {
  for (int64_t m = 0; m < p.M; ++m) {
    T* const to = static_cast<T*>(p.query_grad) + (image * p.M + m) * p.E;
    for (int64_t panel = 0; panel < cuts.panels; ++panel) {
      const float* from = sums + (panel * p.M + m) * kTileCols;
      const int64_t column = panel * kTileCols;
      each_vector(smaller<int64_t>(p.E - column, kTileCols), [&](int64_t i, auto part) {
        store(to + column + i, load(from + i, part) * scale, part);
      });
    }
  }
}

struct BackwardScratch {
  float* sums;    // query gradients: of all images together, or of those of a chunk
  float* kept;    // score gradients of a chunk
  float* packed;  // one group of panels of keys per worker of the query phase
  double* scale;  // what the scale gets from each block
  uintptr_t workers;
  int64_t worker_bytes, bytes;
};

BackwardScratch backward_scratch(const AggregateSoftBackward& p, const Cuts& cuts, int threads) {
  Arena arena{p.scratch}, own{nullptr};
  const bool query = p.query_grad != nullptr;
  BackwardScratch scratch;
  scratch.sums = arena.floats(query ? cuts.sums * (cuts.shared ? 1 : cuts.images) : 0);
  scratch.kept =
      arena.floats(query ? cuts.images * cuts.chunk_blocks * cuts.tokens * cuts.stride : 0);
  scratch.packed = arena.floats(query ? threads * cuts.tokens * kGroupCols : 0);
  scratch.scale = reinterpret_cast<double*>(arena.floats(p.scale_grad ? 2 * p.B * cuts.blocks : 0));
  backward_worker(p, cuts, &own);
  scratch.workers = arena.base + static_cast<uintptr_t>(arena.used);
  scratch.worker_bytes = own.used;
  scratch.bytes = arena.used + own.used * cuts.workers;
  return scratch;
}

// Adds the tokens of a chunk to the query gradients. A shared query meets its images in ascending
// order, whoever adds them.
template <class T>
void add_queries(const AggregateSoftBackward& p, const Cuts& cuts, const BackwardScratch& scratch,
                 const Pool& pool, int64_t image, int64_t images, int64_t block, int64_t blocks) {
  const int64_t groups = cuts.shared ? 1 : images, together = cuts.shared ? images : 1;
  const int64_t image_floats = cuts.chunk_blocks * cuts.tokens * cuts.stride;
  const int64_t tasks = ceil_div(cuts.panels, cuts.panel_group);
  share_tasks(pool, groups * tasks, pool.threads, [&](int64_t task, int64_t worker) {
    const int64_t group = task / tasks, panel = task % tasks * cuts.panel_group;
    for (int64_t i = group * together; i < (group + 1) * together; ++i) {
      add_query_panels<T>(p, cuts, image + i, block, blocks, panel, scratch.kept + i * image_floats,
                          scratch.packed + worker * cuts.tokens * kGroupCols,
                          scratch.sums + group * cuts.sums);
    }
  });
}

template <class T, bool Given>
void run_backward(const AggregateSoftBackward& p, const Pool& pool) {
  const Cuts cuts(p, pool.threads);
  const float scale = p.scale_tensor ? *p.scale_tensor : p.scale;
  const BackwardScratch scratch = backward_scratch(p, cuts, pool.threads);
  for (int64_t i = 0; i < cuts.workers; ++i) {
    Arena own{scratch.workers + static_cast<uintptr_t>(i * scratch.worker_bytes)};
    const BackwardWorker worker = backward_worker(p, cuts, &own);
    *worker.packed_gradient = *worker.packed_query = -1;
  }
  if (p.query_grad && cuts.shared) fill(scratch.sums, cuts.sums, 0.0f);
  for (int64_t image = 0; image < p.B; image += cuts.images) {
    const int64_t images = smaller(p.B - image, cuts.images);
    if (p.query_grad && !cuts.shared) fill(scratch.sums, images * cuts.sums, 0.0f);
    for (int64_t block = 0; block < cuts.blocks; block += cuts.chunk_blocks) {
      const int64_t blocks = smaller(cuts.blocks - block, cuts.chunk_blocks);
      share_tasks(pool, images * blocks, cuts.workers, [&](int64_t task, int64_t index) {
        const int64_t i = task / blocks, j = task % blocks;
        Arena own{scratch.workers + static_cast<uintptr_t>(index * scratch.worker_bytes)};
        const double scale_grad = backward_block<T, Given>(
            p, cuts, backward_worker(p, cuts, &own), scale, image + i, (block + j) * cuts.tokens,
            scratch.kept + (i * cuts.chunk_blocks + j) * cuts.tokens * cuts.stride);
        if (p.scale_grad) scratch.scale[(image + i) * cuts.blocks + block + j] = scale_grad;
      });
      if (p.query_grad) add_queries<T>(p, cuts, scratch, pool, image, images, block, blocks);
    }
    if (!p.query_grad || cuts.shared) continue;
    parallel_for(pool, images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        write_query<T>(p, cuts, scale, image + i, scratch.sums + i * cuts.sums);
    });
  }
  if (p.query_grad && cuts.shared) write_query<T>(p, cuts, scale, 0, scratch.sums);
  double total = 0;
  for (int64_t i = 0; i < p.B * cuts.blocks && p.scale_grad; ++i) total += scratch.scale[i];
  if (p.scale_grad) *p.scale_grad = static_cast<float>(total);
}

int64_t backward_scratch_bytes(const AggregateSoftBackward& p, int threads) {
  return backward_scratch(p, Cuts(p, threads), threads).bytes;
}

}  // namespace
}  // namespace tk::TK_ISA
