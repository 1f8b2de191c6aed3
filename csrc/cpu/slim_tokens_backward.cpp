// The gradients of slim_tokens: a tile of tokens at a time, every product on float32 in cache.
//
// The gradients of the tokens need no one but their own tile. Those of the weights are sums over all tiles: each of at most
// kSplits runs of tiles gathers its own, and these are added in order, so that the bits do not depend on the threads.
#include "cpu/slim_tokens.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kTileTokens = 112;
constexpr int64_t kSplits = 16;

// What a worker needs for one tile of `rows` tokens and for the image that it belongs to.
struct Workspace {
  float* normal;         // (rows, C) after the layer norm; then its gradient
  float* normal_packed;  // packed (rows, C)
  float* values_grad;    // (rows, C): the gradient that reaches a token as a value
  float* projected;      // (rows, H)
  float* hidden;         // (rows, H) after the GELU; then its gradient, then that of `projected`
  float* hidden_packed;  // packed (rows, H)
  float* weights;        // (rows, M): logits before the scale; then softmax weights
  float* shares;         // (rows, M): gradient of the weights; then of the logits before the scale
  Moments* moments;      // (rows)
  float* grad_by_channel;  // packed (C, M): the image's output gradient, for x · gradᵀ
  float* grad_by_slot;     // packed (M, C): the same, for weights · grad
  float* along_output;     // (M): ⟨output, its gradient⟩
};

// The sums that one run of tiles gathers for the weights.
struct Sums {
  float* w1;           // (H, C)
  float* w2;           // (M, H)
  float* b1;           // (H)
  float* norm_weight;  // (C)
  float* norm_bias;    // (C)
  float* scale;        // one number
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
  w.weights = arena.floats(rows * slots);
  w.shares = arena.floats(rows * slots);
  w.moments = reinterpret_cast<Moments*>(arena.bytes(rows * static_cast<int64_t>(sizeof(Moments))));
  w.grad_by_channel = arena.floats(packed_size(p.channels, p.slots));
  w.grad_by_slot = arena.floats(packed_size(p.slots, p.channels));
  w.along_output = arena.floats(p.slots);
  return w;
}

Sums take_sums(const SlimTokens& p, Arena& arena) {
  return {arena.floats(p.hidden * p.channels), arena.floats(p.slots * p.hidden), arena.floats(p.hidden),
          arena.floats(p.channels), arena.floats(p.channels), arena.floats(1)};
}

Plan plan_for(const SlimTokens& p) {
  const int64_t tiles = ceil_div(p.tokens, kTileTokens), rows = ceil_div(p.tokens, tiles);
  Arena workspace{nullptr}, sums{nullptr};
  take_workspace(p, rows, workspace);
  take_sums(p, sums);
  return {tiles, rows, smaller(kSplits, p.batch * tiles), workspace.used, sums.used};
}

// The scratch of one call; the plain weights are those of the products that lead back.
struct Scratch {
  Weights weights;
  float* w1;  // packed (H, C)
  float* w2;  // packed (M, H)
  char *workspaces, *sums;
};

Scratch take_scratch(const SlimTokens& p, const Plan& plan, int64_t workers, Arena& arena) {
  Scratch s;
  s.weights = take_weights(p, arena);
  s.w1 = arena.floats(packed_size(p.hidden, p.channels));
  s.w2 = arena.floats(packed_size(p.slots, p.hidden));
  s.workspaces = arena.bytes(workers * plan.workspace_bytes);
  s.sums = arena.bytes(plan.splits * plan.sums_bytes);
  return s;
}

Sums sums_of(const SlimTokens& p, const Plan& plan, const Scratch& scratch, int64_t split) {
  Arena arena{scratch.sums + split * plan.sums_bytes};
  return take_sums(p, arena);
}

template <class T>
void enter_image(const SlimTokensBackward& q, int64_t b, const Workspace& w) {
  const SlimTokens& p = q.forward;
  const T* grad = static_cast<const T*>(q.grad_out) + b * q.grad_batch;
  pack(grad, 1, q.grad_slot, p.channels, p.slots, w.grad_by_channel);
  pack(grad, q.grad_slot, 1, p.slots, p.channels, w.grad_by_slot);
  for (int64_t m = 0; m < p.slots; ++m) {
    const T* out = static_cast<const T*>(p.out) + (b * p.slots + m) * p.channels;
    Floats product{};
    for_vectors(p.channels, [&](int64_t c, int lanes) {
      product += load_some(out + c, lanes) * load_some(grad + m * q.grad_slot + c, lanes);
    });
    w.along_output[m] = sum(product);
  }
}

// The forward pass of a tile once more, up to the logits before the scale.
template <class T>
void recall_tile(const SlimTokens& p, const Scratch& s, int64_t b, int64_t first, int64_t rows, const Workspace& w) {
  for (int64_t i = 0; i < rows; ++i) {
    w.moments[i] = layer_norm(p, s.weights, token<T>(p, b, first + i), w.normal + i * p.channels);
  }
  pack(w.normal, p.channels, 1, rows, p.channels, w.normal_packed);
  if (p.projected != nullptr) {
    std::memcpy(w.projected, p.projected + (b * p.tokens + first) * p.hidden,
                static_cast<size_t>(rows * p.hidden) * sizeof(float));
  } else {
    project(p, s.weights, w.normal, rows, w.projected);
  }
  gelu_rows(w.projected, rows * p.hidden, w.hidden);
  pack(w.hidden, p.hidden, 1, rows, p.hidden, w.hidden_packed);
  const int64_t slots = slot_stride(p);
  multiply({w.hidden, p.hidden, 1}, s.weights.w2, rows, p.slots, p.hidden, w.weights, slots, false);
}

// Gradient of the softmax: weights and, in `shares`, the gradient of the logits before the scale.
template <class T>
void softmax_backward(const SlimTokens& p, int64_t b, int64_t first, int64_t rows, const Workspace& w, const Sums& sums) {
  const int64_t slots = slot_stride(p);
  const T* x = token<T>(p, b, first);
  if constexpr (sizeof(T) == sizeof(float)) {
    multiply({x, p.x_token, 1}, w.grad_by_channel, rows, p.slots, p.channels, w.shares, slots, false);
  } else {
    widen_rows(x, p.x_token, rows, p.channels, w.values_grad, p.channels);
    multiply({w.values_grad, p.channels, 1}, w.grad_by_channel, rows, p.slots, p.channels, w.shares, slots, false);
  }
  const float* lse = p.lse + b * p.slots;
  Floats scale_grad{};
  for (int64_t i = 0; i < rows; ++i) {
    float *weights = w.weights + i * slots, *shares = w.shares + i * slots;
    for_vectors(p.slots, [&](int64_t m, int lanes) {
      const Floats raw = load_some(weights + m, lanes);
      const Floats weight = exp(raw * p.scale - load_some(lse + m, lanes));
      const Floats logit_grad = weight * (load_some(shares + m, lanes) - load_some(w.along_output + m, lanes));
      scale_grad += logit_grad * raw;
      store_some(weights + m, weight, lanes);
      store_some(shares + m, logit_grad * p.scale, lanes);
    });
  }
  *sums.scale += sum(scale_grad);
}

// hidden holds the gradient after the GELU; here it becomes that before the GELU.
void gelu_backward(const SlimTokens& p, int64_t rows, const Workspace& w, const Sums& sums) {
  for_vectors(p.hidden, [&](int64_t j, int lanes) {
    Floats total = load_some(sums.b1 + j, lanes);
    for (int64_t i = 0; i < rows; ++i) {
      float* at = w.hidden + i * p.hidden + j;
      const Floats grad = load_some(at, lanes) * gelu_slope(load_some(w.projected + i * p.hidden + j, lanes));
      store_some(at, grad, lanes);
      total += grad;
    }
    store_some(sums.b1 + j, total, lanes);
  });
}

// One token: the gradient that comes through its layer norm, and that of its value, into grad_x.
template <class T>
void norm_backward(const SlimTokens& p, const Weights& weights, const T* x, const Moments& moments, const float* normal_grad,
                   const float* values_grad, const Sums& sums, T* to) {
  Floats total{}, along{};
  for_vectors(p.channels, [&](int64_t c, int lanes) {
    const Floats grad = load_some(normal_grad + c, lanes);
    const Floats standard = (load_some(x + c, lanes) - moments.mean) * moments.rstd;
    const Floats scaled = grad * load_some(weights.norm_weight + c, lanes);
    total += scaled;
    along += scaled * standard;
    store_some(sums.norm_weight + c, load_some(sums.norm_weight + c, lanes) + grad * standard, lanes);
    store_some(sums.norm_bias + c, load_some(sums.norm_bias + c, lanes) + grad, lanes);
  });
  const auto channels = static_cast<float>(p.channels);
  const float mean = sum(total) / channels, slope = sum(along) / channels;
  for_vectors(p.channels, [&](int64_t c, int lanes) {
    const Floats standard = (load_some(x + c, lanes) - moments.mean) * moments.rstd;
    const Floats scaled = load_some(normal_grad + c, lanes) * load_some(weights.norm_weight + c, lanes);
    const Floats through_norm = (scaled - mean - standard * slope) * moments.rstd;
    store_some(to + c, load_some(values_grad + c, lanes) + through_norm, lanes);
  });
}

// Tokens [first, first + rows) of image b. `fresh`: the first tile of its run, whose products begin the sums.
template <class T>
void tile_backward(const SlimTokensBackward& q, const Scratch& s, int64_t b, int64_t first, int64_t rows, bool fresh,
                   const Workspace& w, const Sums& sums) {
  const SlimTokens& p = q.forward;
  const int64_t slots = slot_stride(p);
  recall_tile<T>(p, s, b, first, rows, w);
  softmax_backward<T>(p, b, first, rows, w, sums);
  multiply({w.weights, slots, 1}, w.grad_by_slot, rows, p.channels, p.slots, w.values_grad, p.channels, false);
  multiply({w.shares, 1, slots}, w.hidden_packed, p.slots, p.hidden, rows, sums.w2, p.hidden, !fresh);
  multiply({w.shares, slots, 1}, s.w2, rows, p.hidden, p.slots, w.hidden, p.hidden, false);
  gelu_backward(p, rows, w, sums);
  multiply({w.hidden, 1, p.hidden}, w.normal_packed, p.hidden, p.channels, rows, sums.w1, p.channels, !fresh);
  multiply({w.hidden, p.hidden, 1}, s.w1, rows, p.channels, p.hidden, w.normal, p.channels, false);
  for (int64_t i = 0; i < rows; ++i) {
    norm_backward(p, s.weights, token<T>(p, b, first + i), w.moments[i], w.normal + i * p.channels,
                  w.values_grad + i * p.channels, sums,
                  static_cast<T*>(q.grad_x) + (b * p.tokens + first + i) * p.channels);
  }
}

template <class T>
void run_of_tiles(const SlimTokensBackward& q, const Plan& plan, const Scratch& s, int64_t split, const Workspace& w) {
  const SlimTokens& p = q.forward;
  const Sums sums = sums_of(p, plan, s, split);
  std::memset(sums.b1, 0, static_cast<size_t>(p.hidden) * sizeof(float));
  std::memset(sums.norm_weight, 0, static_cast<size_t>(p.channels) * sizeof(float));
  std::memset(sums.norm_bias, 0, static_cast<size_t>(p.channels) * sizeof(float));
  *sums.scale = 0;
  const int64_t begin = part(p.batch * plan.tiles, split, plan.splits);
  const int64_t end = part(p.batch * plan.tiles, split + 1, plan.splits);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / plan.tiles, tile = item % plan.tiles;
    if (item == begin || tile == 0) enter_image<T>(q, b, w);
    const int64_t first = part(p.tokens, tile, plan.tiles), last = part(p.tokens, tile + 1, plan.tiles);
    tile_backward<T>(q, s, b, first, last - first, item == begin, w, sums);
  }
}

// Adds what the runs gathered, in their order.
template <class T>
void add_runs(const Plan& plan, const float* sums, int64_t count, void* to, const Pool& pool) {
  const int64_t stride = plan.sums_bytes / static_cast<int64_t>(sizeof(float));
  parallel_for(pool, ceil_div(count, kLanes), 512, [&](int64_t begin, int64_t end) {
    for_vectors(smaller(end * kLanes, count) - begin * kLanes, [&](int64_t i, int lanes) {
      const int64_t at = begin * kLanes + i;
      Floats total = load_some(sums + at, lanes);
      for (int64_t split = 1; split < plan.splits; ++split) total += load_some(sums + split * stride + at, lanes);
      store_some(static_cast<T*>(to) + at, total, lanes);
    });
  });
}

template <class T>
void backward(const SlimTokensBackward& q, const Plan& plan, const Scratch& s, int64_t workers, const Pool& pool) {
  const SlimTokens& p = q.forward;
  pack_weights<T>(p, s.weights);
  pack(static_cast<const T*>(p.w1), p.w1_row, 1, p.hidden, p.channels, s.w1);
  pack(static_cast<const T*>(p.w2), p.w2_row, 1, p.slots, p.hidden, s.w2);
  share(pool, workers, plan.splits, [&](int64_t worker, int64_t split) {
    Arena arena{s.workspaces + worker * plan.workspace_bytes};
    run_of_tiles<T>(q, plan, s, split, take_workspace(p, plan.rows, arena));
  });
  const Sums sums = sums_of(p, plan, s, 0);
  add_runs<T>(plan, sums.w1, p.hidden * p.channels, q.grad_w1, pool);
  add_runs<T>(plan, sums.w2, p.slots * p.hidden, q.grad_w2, pool);
  add_runs<T>(plan, sums.b1, p.hidden, q.grad_b1, pool);
  add_runs<T>(plan, sums.norm_weight, p.channels, q.grad_norm_weight, pool);
  add_runs<T>(plan, sums.norm_bias, p.channels, q.grad_norm_bias, pool);
  add_runs<float>(plan, sums.scale, 1, q.grad_scale, pool);
}

}  // namespace

Status slim_tokens_backward(const SlimTokensBackward& q, const Pool& pool) {
  const Plan plan = plan_for(q.forward);
  const int64_t workers = smaller<int64_t>(pool.threads, plan.splits);
  Arena arena{static_cast<char*>(q.scratch)};
  const Scratch scratch = take_scratch(q.forward, plan, workers, arena);
  dispatch(q.forward.dtype, [&](auto zero) { backward<decltype(zero)>(q, plan, scratch, workers, pool); });
  return Status::kOk;
}

int64_t slim_tokens_backward_scratch(const SlimTokensBackward& q, int threads) {
  const Plan plan = plan_for(q.forward);
  Arena arena{nullptr};
  take_scratch(q.forward, plan, smaller<int64_t>(threads, plan.splits), arena);
  return arena.used;
}

}  // namespace tk::TK_ISA
