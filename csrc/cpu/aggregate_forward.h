// Forward of soft token aggregation: scores, softmax over the tokens and weighted sum in one pass
// over blocks of tokens.
//
// One driver for both forms: with `Given` scores the params' key holds the logits (B, N, M), and E
// is 0.
#pragma once

#include "cpu/aggregate.h"

namespace tk::TK_ISA {
namespace {

// The split into tasks (image by slots) and what each worker needs.
struct Plan {
  int64_t parts, slots, token_block, token_blocks, workers;

  Plan(const AggregateSoft& p, int threads)
      : parts(slot_parts(p.B, p.M, threads)),
        slots(ceil_div(ceil_div(p.M, parts), kTileCols) * kTileCols),
        token_block(block_size(p.N, kTokenBlock)),
        token_blocks(ceil_div(p.N, token_block)),
        workers(smaller<int64_t>(threads, p.B * parts)) {}
};

struct Worker {
  float* scores;  // (token_block, slots)
  float* maxima;  // (token_blocks, slots): the running maximum each block of kept weights was made
                  // with
  float* sums;    // (slots, C) where halves come in several blocks of tokens; (slots, kTileCols)
                  // where there is one block
  float* panels;  // packed (token_block, kGroupCols)
  float* stage;   // (token_block, kDepthBlock)
  float* query;   // packed (E, slots)
  Running running;
};

Worker worker_scratch(const AggregateSoft& p, const Plan& plan, Arena* arena) {
  const bool halves = p.dtype != DType::kFloat32, own_query = p.query.batch_stride != 0;
  Worker worker;
  worker.scores = arena->floats(plan.token_block * plan.slots);
  worker.maxima = arena->floats(p.weights ? plan.token_blocks * plan.slots : 0);
  worker.sums = arena->floats(plan.slots * (plan.token_blocks <= 1 ? kTileCols : halves ? p.C : 0));
  worker.panels = arena->floats(plan.token_block * kGroupCols);
  worker.stage = arena->floats(halves ? plan.token_block * kDepthBlock : 0);
  worker.query = arena->floats(own_query ? packed_size(p.E, plan.slots) : 0);
  worker.running = {arena->floats(plan.slots), arena->floats(plan.slots),
                    arena->floats(plan.slots)};
  return worker;
}

// The kept weights of all blocks, from each block's own maximum to the final softmax.
void normalise(const AggregateSoft& p, const Plan& plan, const Worker& worker, int64_t slots,
               float* weights) {
  for (int64_t n = 0; n < p.N; ++n) {
    const float* maxima = worker.maxima + n / plan.token_block * plan.slots;
    each_vector(slots, [&](int64_t m, auto part) {
      const Floats total = load(worker.running.total + m, part);
      const Floats last = load(worker.running.maximum + m, part);
      const Floats drop =
          select(last == kNegativeInfinity, splat(0.0f), load(maxima + m, part) - last);
      const Floats factor = select(total == 0.0f, splat(0.0f), exp(drop) / total);
      store(weights + n * p.M + m, load(weights + n * p.M + m, part) * factor, part);
    });
  }
}

template <class T, bool Given>
void aggregate(const AggregateSoft& p, const Plan& plan, const Worker& worker, const float* query,
               float scale, int64_t image, int64_t slot) {
  const int64_t slots = smaller(p.M - slot, plan.slots);
  const Running& running = worker.running;
  fill(running.maximum, slots, kNegativeInfinity);
  fill(running.total, slots, 0.0f);
  T* const out = static_cast<T*>(p.out) + (image * p.M + slot) * p.C;
  const bool one_block = plan.token_blocks <= 1;
  float* const sums = sizeof(T) == 4 && !one_block ? reinterpret_cast<float*>(out) : worker.sums;
  float* const kept = p.weights ? p.weights + image * p.N * p.M + slot : nullptr;
  for (int64_t n = 0; n < p.N; n += plan.token_block) {
    const int64_t tokens = smaller(p.N - n, plan.token_block);
    const Terms terms = terms_at(scale, p.bias, p.mask, image, n);
    float* const scores = kept ? kept + n * p.M : worker.scores;
    const int64_t stride = kept ? p.M : plan.slots;
    const T* const key = rows_of<T>(p.key, image, n);
    if constexpr (Given) {
      widen_rows(key + slot, p.key.row_stride, tokens, slots, scores, stride);
    } else {
      Product<T>::multiply_rows(key, p.key.row_stride, query, tokens, slots, p.E, scores, stride,
                                false, worker.stage);
    }
    soften(scores, stride, tokens, slots, terms, running);
    if (kept) {
      float* const maxima = worker.maxima + n / plan.token_block * plan.slots;
      each_vector(slots, [&](int64_t m, auto part) {
        store(maxima + m, load(running.maximum + m, part), part);
      });
    }
    // Kept weights stay as they are: an operand of another form goes to the place of scores that
    // are not kept.
    const Left weights =
        Product<T>::columns(scores, stride, tokens, slots, worker.scores, plan.slots);
    const T* const values = rows_of<T>(p.value, image, n);
    if (one_block) {
      multiply_values(
          weights, values, p.value.row_stride, tokens, p.N - n - tokens, slots, p.C, terms,
          kTileCols, false, worker.panels, [&](int64_t) { return sums; },
          [&](int64_t c, int64_t cols) {
            divide(sums, kTileCols, running.total, slots, cols, out + c, p.C);
          });
    } else {
      if (n > 0) rescale(sums, slots, p.C, running.factor);
      multiply_values(
          weights, values, p.value.row_stride, tokens, p.N - n - tokens, slots, p.C, terms, p.C,
          n > 0, worker.panels, [&](int64_t c) { return sums + c; }, [](int64_t, int64_t) {});
    }
  }
  if (!one_block || p.N == 0) divide(sums, p.C, running.total, slots, p.C, out, p.C);
  float* const lse = p.lse + image * p.M + slot;
  for (int64_t m = 0; m < slots; ++m) {
    lse[m] = running.total[m] == 0.0f ? kNegativeInfinity
                                      : running.maximum[m] + __builtin_logf(running.total[m]);
  }
  if (kept) normalise(p, plan, worker, slots, kept);
}

TK_INLINE int64_t products_of(const AggregateSoft& p) { return p.B * p.M * p.N * (p.E + p.C); }

template <class T, bool Given>
void run(const AggregateSoft& p, const Pool& all) {
  const Pool pool{all.run, threads_for(all.threads, products_of(p))};
  const Plan plan(p, pool.threads);
  const float scale = p.scale_tensor ? *p.scale_tensor : p.scale;
  const bool shared = p.query.batch_stride == 0;
  Arena arena{p.scratch};
  float* const packed = arena.floats(shared ? packed_size(p.E, p.M) : 0);
  Arena sizes{nullptr};
  worker_scratch(p, plan, &sizes);
  if (shared) {
    parallel_for(pool, ceil_div(p.M, kTileCols), 1, [&](int64_t begin, int64_t end) {
      const int64_t slot = begin * kTileCols;
      Product<T>::pack(rows_of<T>(p.query, 0, slot), 1, p.query.row_stride, p.E,
                       smaller(p.M, end * kTileCols) - slot,
                       packed + slot * Product<T>::Kind::words(p.E));
    });
  }
  share_tasks(pool, p.B * plan.parts, plan.workers, [&](int64_t task, int64_t index) {
    const int64_t image = task / plan.parts, slot = task % plan.parts * plan.slots;
    if (slot >= p.M) return;
    Arena own{arena.base + static_cast<uintptr_t>(arena.used + index * sizes.used)};
    const Worker worker = worker_scratch(p, plan, &own);
    if (!shared) {
      Product<T>::pack(rows_of<T>(p.query, image, slot), 1, p.query.row_stride, p.E,
                       smaller(p.M - slot, plan.slots), worker.query);
    }
    aggregate<T, Given>(p, plan, worker,
                        shared ? packed + slot * Product<T>::Kind::words(p.E) : worker.query, scale,
                        image, slot);
  });
}

int64_t forward_scratch(const AggregateSoft& p, int threads) {
  const Plan plan(p, threads_for(threads, products_of(p)));
  Arena shared{nullptr}, own{nullptr};
  shared.floats(p.query.batch_stride == 0 ? packed_size(p.E, p.M) : 0);
  worker_scratch(p, plan, &own);
  return shared.used + plan.workers * own.used;
}

}  // namespace
}  // namespace tk::TK_ISA
