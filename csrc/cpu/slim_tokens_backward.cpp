// The gradients of slim_tokens: a tile of tokens at a time, every product on float32 in cache.
//
// The gradient of a softmax needs one sum over all tokens of the image; where they are more than a
// tile, it is made beforehand. The gradients of the weights are sums over all tiles: each of at
// most kSplits runs of tiles gathers its own, and these are added in order, so that the bits do not
// depend on the threads.
#include "cpu/slim_tokens.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kTileTokens = 256;
constexpr int64_t kSplits = 16;

// What a worker needs for one tile of `rows` tokens and for the image that it belongs to.
struct Workspace {
  float* normal;         // (rows, C) after the layer norm, operands; then its gradient
  float* normal_packed;  // packed (rows, C)
  float* values_grad;    // (rows, C): the gradient that reaches a token as a value
  float* projected;      // (rows, H); then its gradient, read by columns
  float* hidden;         // (rows, H) after the GELU, operands
  float* hidden_packed;  // packed (rows, H)
  float* hidden_grad;    // (rows, H): gradient after the GELU, then before it
  float* weights;        // (rows, M): logits, then softmax weights, then the shares read by columns
  float* shares;         // (rows, M): gradient of the weights, then of the logits
  Moments* moments;      // (rows)
  float* grad_by_channel;  // packed (C, M): the image's output gradient, for x · gradᵀ
  float* grad_by_slot;     // packed (M, C): the same, for weights · grad
  float* stage;
};

// The sums that one run of tiles gathers for the weights.
struct Sums {
  float* w1;           // (H, C)
  float* w2;           // (M, H), of w2 times the scale
  float* b1;           // (H)
  float* norm_weight;  // (C)
  float* norm_bias;    // (C)
};

struct Plan {
  int64_t tiles;  // of one image
  int64_t rows;   // of the largest tile
  int64_t splits;
  int64_t workspace_bytes, sums_bytes;
};

Workspace take_workspace(const SlimTokens& p, int64_t rows, Arena& arena) {
  const int64_t slots = slot_stride(p);
  Workspace w;
  w.normal = arena.floats(rows * p.channels);
  w.normal_packed = arena.floats(packed_size(rows, p.channels));
  w.values_grad = arena.floats(rows * p.channels);
  w.projected = arena.floats(rows * p.hidden);
  w.hidden = arena.floats(rows * p.hidden);
  w.hidden_packed = arena.floats(packed_size(rows, p.hidden));
  w.hidden_grad = arena.floats(rows * p.hidden);
  w.weights = arena.floats(rows * slots);
  w.shares = arena.floats(rows * slots);
  w.moments = reinterpret_cast<Moments*>(arena.bytes(rows * static_cast<int64_t>(sizeof(Moments))));
  w.grad_by_channel = arena.floats(packed_size(p.channels, p.slots));
  w.grad_by_slot = arena.floats(packed_size(p.slots, p.channels));
  w.stage = arena.floats(stage_size(p, rows));
  return w;
}

Sums take_sums(const SlimTokens& p, Arena& arena) {
  return {arena.floats(p.hidden * p.channels), arena.floats(p.slots * p.hidden),
          arena.floats(p.hidden), arena.floats(p.channels), arena.floats(p.channels)};
}

Plan plan_for(const SlimTokens& p) {
  const int64_t tiles = ceil_div(p.tokens, kTileTokens), rows = ceil_div(p.tokens, tiles);
  Arena workspace{nullptr}, sums{nullptr};
  take_workspace(p, rows, workspace);
  take_sums(p, sums);
  const int64_t splits = larger<int64_t>(1, smaller(kSplits, p.batch * tiles));
  return {tiles, rows, splits, workspace.used, sums.used};
}

// The scratch of one call. The second w1 and w2 are for the products that lead back.
struct Scratch {
  Weights weights;
  float* w1;      // packed (H, C)
  float* w2;      // packed (M, H)
  float* totals;  // (B, tiles, 2, M): over a tile's tokens, the sum of their weights, and of their
                  // weighted shares
  char *workspaces, *sums;
};

Scratch take_scratch(const SlimTokens& p, const Plan& plan, int64_t workers, Arena& arena) {
  Scratch s;
  s.weights = take_weights(p, arena);
  s.w1 = arena.floats(packed_size(p.hidden, p.channels));
  s.w2 = arena.floats(packed_size(p.slots, p.hidden));
  s.totals = arena.floats(p.batch * plan.tiles * 2 * slot_stride(p));
  s.workspaces = arena.bytes(workers * plan.workspace_bytes);
  s.sums = arena.bytes(plan.splits * plan.sums_bytes);
  return s;
}

Sums sums_of(const SlimTokens& p, const Plan& plan, const Scratch& scratch, int64_t split) {
  Arena arena{scratch.sums + split * plan.sums_bytes};
  return take_sums(p, arena);
}

Workspace workspace_of(const SlimTokens& p, const Plan& plan, const Scratch& scratch,
                       int64_t worker) {
  Arena arena{scratch.workspaces + worker * plan.workspace_bytes};
  return take_workspace(p, plan.rows, arena);
}

template <class T>
void enter_image(const SlimTokensBackward& q, int64_t b, const Workspace& w) {
  const SlimTokens& p = q.forward;
  const T* grad = static_cast<const T*>(q.grad_out) + b * q.grad_batch;
  Product<T>::pack(grad, 1, q.grad_slot, p.channels, p.slots, w.grad_by_channel);
  Product<T>::pack(grad, q.grad_slot, 1, p.slots, p.channels, w.grad_by_slot);
}

template <class T>
void normalise(const SlimTokens& p, const Scratch& s, int64_t b, int64_t first, int64_t rows,
               const Workspace& w) {
  layer_norm<T>(p, s.weights, b, first, rows, reinterpret_cast<Operand<T>*>(w.normal), w.moments);
}

// The forward pass of a normalised tile once more, up to the logits; and what each weight's
// gradient is.
template <class T>
void score(const SlimTokens& p, const Scratch& s, int64_t b, int64_t first, int64_t rows,
           const Workspace& w) {
  const int64_t slots = slot_stride(p);
  if (p.projected != nullptr) {
    std::memcpy(w.projected, p.projected + (b * p.tokens + first) * p.hidden,
                static_cast<size_t>(rows * p.hidden) * sizeof(float));
  } else {
    project<T>(p, s.weights, reinterpret_cast<const Operand<T>*>(w.normal), rows, w.projected,
               w.stage);
  }
  score_slots<T>(p, s.weights, w.projected, rows, reinterpret_cast<Operand<T>*>(w.hidden),
                 w.weights, w.stage);
  Product<T>::multiply_rows(token<T>(p, b, first), p.x_token, w.grad_by_channel, rows, p.slots,
                            p.channels, w.shares, slots, false, w.stage);
}

TK_INLINE Floats weight_of(const float* logits, const float* lse, int lanes) {
  return exp_below(load_some(logits, lanes) - load_some(lse, lanes));
}

void sum_shares(const SlimTokens& p, int64_t b, int64_t rows, const Workspace& w, float* totals) {
  const int64_t slots = slot_stride(p);
  for_vectors(p.slots, [&](int64_t m, int lanes) {
    Floats weights{}, shares{};
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = i * slots + m;
      const Floats weight = weight_of(w.weights + at, p.lse + b * p.slots + m, lanes);
      weights += weight;
      shares += weight * load_some(w.shares + at, lanes);
    }
    store(totals + m, weights);
    store(totals + slots + m, shares);
  });
}

// From the logits to the softmax weights, and from their shares to the gradient of the logits. The
// weights are divided by their sum once more: a large `lse` is too coarse to make it one.
void softmax_backward(const SlimTokens& p, const Plan& plan, int64_t b, int64_t rows,
                      const Scratch& s, const Workspace& w) {
  const int64_t slots = slot_stride(p);
  for_vectors(p.slots, [&](int64_t m, int lanes) {
    Floats total{}, mean{};
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      const float* totals = s.totals + (b * plan.tiles + tile) * 2 * slots;
      total += load(totals + m);
      mean += load(totals + slots + m);
    }
    const Floats inverse = 1.0f / total;
    mean *= inverse;
    for (int64_t i = 0; i < rows; ++i) {
      float *weights = w.weights + i * slots + m, *shares = w.shares + i * slots + m;
      const Floats weight = weight_of(weights, p.lse + b * p.slots + m, lanes) * inverse;
      store_some(weights, weight, lanes);
      store_some(shares, weight * (load_some(shares, lanes) - mean), lanes);
    }
  });
}

// hidden_grad holds the gradient after the GELU, but for the scale; here it becomes that before the
// GELU.
template <class T>
void gelu_backward(const SlimTokens& p, int64_t rows, const Workspace& w, const Sums& sums) {
  for_vectors(p.hidden, [&](int64_t j, int lanes) {
    Floats total = load_some(sums.b1 + j, lanes);
    for (int64_t i = 0; i < rows; ++i) {
      float* at = w.hidden_grad + i * p.hidden + j;
      const Floats slope =
          gelu_slope(load_some(w.projected + i * p.hidden + j, lanes), Operand<T>{});
      const Floats grad = load_some(at, lanes) * p.scale * slope;
      store_some(at, grad, lanes);
      total += grad;
    }
    store_some(sums.b1 + j, total, lanes);
  });
}

// One token: the gradient that comes through its layer norm, and that of its value, into grad_x.
template <class T>
void norm_backward(const SlimTokens& p, const Weights& weights, const T* x, const Moments& moments,
                   const float* normal_grad, const float* values_grad, const Sums& sums, T* to) {
  Floats total{}, along{};
  for_vectors(p.channels, [&](int64_t c, int lanes) {
    const Floats grad = load_some(normal_grad + c, lanes);
    const Floats standard = moments.standard(load_some(x + c, lanes));
    const Floats scaled = grad * load_some(weights.norm_weight + c, lanes);
    total += scaled;
    along += scaled * standard;
    store_some(sums.norm_weight + c, load_some(sums.norm_weight + c, lanes) + grad * standard,
               lanes);
    store_some(sums.norm_bias + c, load_some(sums.norm_bias + c, lanes) + grad, lanes);
  });
  const auto channels = static_cast<float>(p.channels);
  const float mean = sum(total) / channels, slope = sum(along) / channels;
  for_vectors(p.channels, [&](int64_t c, int lanes) {
    const Floats standard = moments.standard(load_some(x + c, lanes));
    const Floats scaled =
        load_some(normal_grad + c, lanes) * load_some(weights.norm_weight + c, lanes);
    const Floats through_norm = (scaled - mean - standard * slope) * moments.rstd;
    store_some(to + c, load_some(values_grad + c, lanes) + through_norm, lanes);
  });
}

struct Item {
  int64_t image, number, first, rows;
};

Item item_at(const SlimTokens& p, const Plan& plan, int64_t item) {
  const int64_t number = item % plan.tiles, first = part(p.tokens, number, plan.tiles);
  return {item / plan.tiles, number, first, part(p.tokens, number + 1, plan.tiles) - first};
}

float* totals_of(const SlimTokens& p, const Scratch& s, int64_t item) {
  return s.totals + item * 2 * slot_stride(p);
}

// From the gradient of the logits to those of w2, b1, w1 and of what the layer norm gave.
template <class T>
void hidden_backward(const SlimTokens& p, const Scratch& s, int64_t rows, bool fresh,
                     const Workspace& w, const Sums& sums) {
  using Kind = typename Product<T>::Kind;
  using Side = Product<T>;
  const int64_t slots = slot_stride(p), channels = p.channels, hidden = p.hidden,
                words = Kind::words(rows);
  multiply<Kind>(Side::columns(w.shares, slots, rows, p.slots, w.weights, slots), w.hidden_packed,
                 p.slots, hidden, words, sums.w2, hidden, !fresh);
  multiply<Kind>(Side::rows(w.shares, slots, rows, p.slots, w.shares, slots), s.w2, rows, hidden,
                 Kind::words(p.slots), w.hidden_grad, hidden, false);
  gelu_backward<T>(p, rows, w, sums);
  multiply<Kind>(Side::columns(w.hidden_grad, hidden, rows, hidden, w.projected, hidden),
                 w.normal_packed, hidden, channels, words, sums.w1, channels, !fresh);
  multiply<Kind>(Side::rows(w.hidden_grad, hidden, rows, hidden, w.hidden_grad, hidden), s.w1, rows,
                 channels, Kind::words(hidden), w.normal, channels, false);
}

// `fresh`: the first tile of its run, whose products begin the sums.
template <class T>
void tile_backward(const SlimTokensBackward& q, const Plan& plan, const Scratch& s, int64_t item,
                   bool fresh, const Workspace& w, const Sums& sums) {
  using Kind = typename Product<T>::Kind;
  const SlimTokens& p = q.forward;
  const auto [b, number, first, rows] = item_at(p, plan, item);
  const int64_t slots = slot_stride(p);
  normalise<T>(p, s, b, first, rows, w);
  score<T>(p, s, b, first, rows, w);
  Product<Operand<T>>::pack(reinterpret_cast<Operand<T>*>(w.normal), p.channels, 1, rows,
                            p.channels, w.normal_packed);
  Product<Operand<T>>::pack(reinterpret_cast<Operand<T>*>(w.hidden), p.hidden, 1, rows, p.hidden,
                            w.hidden_packed);
  if (plan.tiles == 1) sum_shares(p, b, rows, w, totals_of(p, s, item));
  softmax_backward(p, plan, b, rows, s, w);
  multiply<Kind>(Product<T>::rows(w.weights, slots, rows, p.slots, w.weights, slots),
                 w.grad_by_slot, rows, p.channels, Kind::words(p.slots), w.values_grad, p.channels,
                 false);
  hidden_backward<T>(p, s, rows, fresh, w, sums);
  for (int64_t i = 0; i < rows; ++i) {
    norm_backward(p, s.weights, token<T>(p, b, first + i), w.moments[i], w.normal + i * p.channels,
                  w.values_grad + i * p.channels, sums,
                  static_cast<T*>(q.grad_x) + (b * p.tokens + first + i) * p.channels);
  }
}

template <class T>
void run_of_tiles(const SlimTokensBackward& q, const Plan& plan, const Scratch& s, int64_t split,
                  const Workspace& w) {
  const SlimTokens& p = q.forward;
  const Sums sums = sums_of(p, plan, s, split);
  std::memset(sums.b1, 0, static_cast<size_t>(p.hidden) * sizeof(float));
  std::memset(sums.norm_weight, 0, static_cast<size_t>(p.channels) * sizeof(float));
  std::memset(sums.norm_bias, 0, static_cast<size_t>(p.channels) * sizeof(float));
  const int64_t begin = part(p.batch * plan.tiles, split, plan.splits);
  const int64_t end = part(p.batch * plan.tiles, split + 1, plan.splits);
  if (begin == end) std::memset(sums.w1, 0, static_cast<size_t>(plan.sums_bytes));  // no image
  for (int64_t item = begin; item < end; ++item) {
    if (item == begin || item % plan.tiles == 0) enter_image<T>(q, item / plan.tiles, w);
    tile_backward<T>(q, plan, s, item, item == begin, w, sums);
  }
}

// Where images have several tiles: the sums that the softmax's gradient needs.
template <class T>
void sum_all_shares(const SlimTokensBackward& q, const Plan& plan, const Scratch& s,
                    int64_t workers, const Pool& pool) {
  const SlimTokens& p = q.forward;
  share_tasks(pool, p.batch * plan.tiles, workers, [&](int64_t item, int64_t worker) {
    const Workspace w = workspace_of(p, plan, s, worker);
    const Item tile = item_at(p, plan, item);
    enter_image<T>(q, tile.image, w);
    if (p.projected == nullptr) normalise<T>(p, s, tile.image, tile.first, tile.rows, w);
    score<T>(p, s, tile.image, tile.first, tile.rows, w);
    sum_shares(p, tile.image, tile.rows, w, totals_of(p, s, item));
  });
}

// Adds what the runs gathered, in their order.
template <class T>
void add_runs(const Plan& plan, const float* sums, int64_t count, void* to, const Pool& pool) {
  const int64_t stride = plan.sums_bytes / static_cast<int64_t>(sizeof(float));
  parallel_for(pool, ceil_div(count, kLanes), 512, [&](int64_t begin, int64_t end) {
    for_vectors(smaller(end * kLanes, count) - begin * kLanes, [&](int64_t i, int lanes) {
      const int64_t at = begin * kLanes + i;
      Floats total = load_some(sums + at, lanes);
      for (int64_t split = 1; split < plan.splits; ++split)
        total += load_some(sums + split * stride + at, lanes);
      store_some(static_cast<T*>(to) + at, total, lanes);
    });
  });
}

// The gradient of scale · w2 becomes that of both.
template <class T>
void part_scale(const SlimTokensBackward& q, const float* product_grad) {
  const SlimTokens& p = q.forward;
  Floats along{};
  for (int64_t m = 0; m < p.slots; ++m) {
    const T* w2 = static_cast<const T*>(p.w2) + m * p.w2_row;
    T* to = static_cast<T*>(q.grad_w2) + m * p.hidden;
    for_vectors(p.hidden, [&](int64_t j, int lanes) {
      const Floats grad = load_some(product_grad + m * p.hidden + j, lanes);
      along += grad * load_some(w2 + j, lanes);
      store_some(to + j, grad * p.scale, lanes);
    });
  }
  *q.grad_scale = sum(along);
}

template <class T>
void backward(const SlimTokensBackward& q, const Plan& plan, const Scratch& s, int64_t workers,
              const Pool& pool) {
  const SlimTokens& p = q.forward;
  pack_weights<T>(p, s.weights);
  Product<T>::pack(static_cast<const T*>(p.w1), p.w1_row, 1, p.hidden, p.channels, s.w1);
  Product<T>::pack(static_cast<const T*>(p.w2), p.w2_row, 1, p.slots, p.hidden, s.w2);
  if (plan.tiles > 1) sum_all_shares<T>(q, plan, s, workers, pool);
  share_tasks(pool, plan.splits, workers, [&](int64_t split, int64_t worker) {
    run_of_tiles<T>(q, plan, s, split, workspace_of(p, plan, s, worker));
  });
  const Sums sums = sums_of(p, plan, s, 0);
  add_runs<T>(plan, sums.w1, p.hidden * p.channels, q.grad_w1, pool);
  add_runs<float>(plan, sums.w2, p.slots * p.hidden, sums.w2, pool);
  part_scale<T>(q, sums.w2);
  add_runs<T>(plan, sums.b1, p.hidden, q.grad_b1, pool);
  add_runs<T>(plan, sums.norm_weight, p.channels, q.grad_norm_weight, pool);
  add_runs<T>(plan, sums.norm_bias, p.channels, q.grad_norm_bias, pool);
}

}  // namespace

Status slim_tokens_backward(const SlimTokensBackward& q, const Pool& pool) {
  const Plan plan = plan_for(q.forward);
  const int64_t workers = smaller<int64_t>(pool.threads, plan.splits);
  Arena arena{q.scratch};
  const Scratch scratch = take_scratch(q.forward, plan, workers, arena);
  dispatch(q.forward.dtype,
           [&](auto zero) { backward<decltype(zero)>(q, plan, scratch, workers, pool); });
  return Status::kOk;
}

int64_t slim_tokens_backward_scratch(const SlimTokensBackward& q, int threads) {
  const Plan plan = plan_for(q.forward);
  Arena arena{nullptr};
  take_scratch(q.forward, plan, smaller<int64_t>(threads, plan.splits), arena);
  return arena.used;
}

}  // namespace tk::TK_ISA
