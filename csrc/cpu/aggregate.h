// What the soft aggregations share: blocks, scratch, the softmax of a block of tokens, and the
// weighted sum of the values.
//
// Scores lie as (tokens, slots): the softmax runs down the tokens, so every slot keeps its own lane
// and nothing is ever reduced across lanes; and the same block, read by columns, is the left side
// of weights · values.
#pragma once

#include "cpu/gemm.h"
#include "cpu/work.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kSlotBlock = 256;
constexpr int64_t kTokenBlock = 256;
constexpr float kNegativeInfinity = -__builtin_inff();

// Equal blocks of at most `most`: a function of the count alone, so that a batch never changes a
// summation order.
TK_INLINE int64_t block_size(int64_t count, int64_t most) {
  return count <= most ? larger<int64_t>(count, 1) : ceil_div(count, ceil_div(count, most));
}

struct Whole {};
struct Part {
  int count;
};
template <class T>
TK_INLINE Floats load(const T* from, Whole) {
  return load(from);
}
template <class T>
TK_INLINE Floats load(const T* from, Part part) {
  return load(from, part.count);
}
template <class T>
TK_INLINE void store(T* to, Floats value, Whole) {
  store(to, value);
}
template <class T>
TK_INLINE void store(T* to, Floats value, Part part) {
  store(to, value, part.count);
}

// body(i, Whole or Part) for each vector of a row of `count` elements.
template <class Body>
TK_INLINE void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, Whole{});
  if (i < count) body(i, Part{static_cast<int>(count - i)});
}

TK_INLINE void fill(float* to, int64_t count, float value) {
  each_vector(count, [&](int64_t i, auto part) { store(to + i, splat(value), part); });
}

// Bias and mask of one image's tokens from `first` on, and the scale.
struct Terms {
  float scale;
  const float* bias;
  int64_t bias_stride;
  const bool* mask;
  int64_t mask_stride;

  float added(int64_t token) const { return bias ? bias[token * bias_stride] : 0.0f; }
  bool hidden(int64_t token) const { return mask && !mask[token * mask_stride]; }
};

TK_INLINE Terms terms_at(float scale, const PerToken<float>& bias, const PerToken<bool>& mask,
                         int64_t image, int64_t first) {
  return {scale,
          bias.data ? bias.data + image * bias.batch_stride + first * bias.token_stride : nullptr,
          bias.token_stride,
          mask.data ? mask.data + image * mask.batch_stride + first * mask.token_stride : nullptr,
          mask.token_stride};
}

template <class T>
TK_INLINE const T* rows_of(const Matrices& from, int64_t image, int64_t row) {
  return static_cast<const T*>(from.data) + image * from.batch_stride + row * from.row_stride;
}

// A call on given logits as the same on scores: what forward and backward have in common of it.
template <class Soft, class Logits>
TK_INLINE Soft as_scores(const Logits& p) {
  Soft soft{};
  soft.dtype = p.dtype;
  soft.B = p.B;
  soft.M = p.M;
  soft.N = p.N;
  soft.C = p.C;
  soft.key = p.logits;
  soft.value = p.value;
  soft.mask = p.mask;
  soft.scale = 1.0f;
  soft.lse = p.lse;
  soft.scratch = p.scratch;
  return soft;
}

// The state of a softmax that sees its tokens block by block, one entry per slot.
struct Running {
  float* maximum;
  float* total;
  float* factor;  // what the sums made so far must be multiplied by
};

// Some vectors of slots: scores become exp(scale · score + bias − maximum), zero for hidden tokens;
// `running` takes the block in.
template <int Vectors, class Width>
TK_INLINE void soften_slots(float* scores, int64_t stride, int64_t tokens, const Terms& terms,
                            const Running& running, Width part) {
  Floats before[Vectors], maxima[Vectors], safe[Vectors], totals[Vectors];
  for (int v = 0; v < Vectors; ++v)
    before[v] = maxima[v] = load(running.maximum + v * kLanes, part);
  for (int64_t n = 0; n < tokens; ++n) {
    if (terms.hidden(n)) continue;
    const float added = terms.added(n);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const Floats score = load(scores + n * stride + v * kLanes, part) * terms.scale + added;
      maxima[v] = max(maxima[v], score);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    safe[v] = select(maxima[v] == kNegativeInfinity, splat(0.0f), maxima[v]);
    const Floats factor = exp_below(before[v] - safe[v]);
    store(running.maximum + v * kLanes, maxima[v], part);
    store(running.factor + v * kLanes, factor, part);
    totals[v] = load(running.total + v * kLanes, part) * factor;
  }
  for (int64_t n = 0; n < tokens; ++n) {
    const bool hidden = terms.hidden(n);
    const float added = terms.added(n);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* const at = scores + n * stride + v * kLanes;
      if (hidden) {
        store(at, splat(0.0f), part);
        continue;
      }
      const Floats weight = exp_below(load(at, part) * terms.scale + added - safe[v]);
      store(at, weight, part);
      totals[v] += weight;
    }
  }
  for (int v = 0; v < Vectors; ++v) store(running.total + v * kLanes, totals[v], part);
}

inline void soften(float* scores, int64_t stride, int64_t tokens, int64_t slots, const Terms& terms,
                   const Running& running) {
  constexpr int kTogether = 4;
  const auto from = [&](int64_t m) {
    return Running{running.maximum + m, running.total + m, running.factor + m};
  };
  int64_t m = 0;
  for (; m + kTogether * kLanes <= slots; m += kTogether * kLanes)
    soften_slots<kTogether>(scores + m, stride, tokens, terms, from(m), Whole{});
  each_vector(slots - m, [&](int64_t i, auto part) {
    soften_slots<1>(scores + m + i, stride, tokens, terms, from(m + i), part);
  });
}

// The softmax of a block from its scores and the logarithm of the totals.
inline void weigh(float* scores, int64_t stride, int64_t tokens, int64_t slots, const Terms& terms,
                  const float* lse) {
  for (int64_t n = 0; n < tokens; ++n) {
    if (terms.hidden(n)) {
      fill(scores + n * stride, slots, 0.0f);
      continue;
    }
    const float added = terms.added(n);
    each_vector(slots, [&](int64_t m, auto part) {
      const Floats total = load(lse + m, part);
      const Floats weight =
          exp_below(load(scores + n * stride + m, part) * terms.scale + added - total);
      store(scores + n * stride + m, select(total == kNegativeInfinity, splat(0.0f), weight), part);
    });
  }
}

constexpr int64_t kGroupCols = kPanelGroup * kTileCols;

// Panels of the value (or key) rows of one block, cols ≤ kGroupCols; hidden tokens count as zero,
// whatever they hold.
template <class T>
TK_INLINE void pack_tokens(const T* from, int64_t row_stride, int64_t tokens, int64_t cols,
                           const Terms& terms, float* panels) {
  Product<T>::pack(from, row_stride, 1, tokens, cols, panels);
  for (int64_t n = 0; terms.mask && n < tokens; ++n) {
    for (int64_t c = 0; c < cols && terms.hidden(n); c += kTileCols) {
      Product<T>::clear(panels + c * Product<T>::Kind::words(tokens), n);
    }
  }
}

// sums[slots, channels] *= factor, where the running maximum has moved.
inline void rescale(float* sums, int64_t slots, int64_t channels, const float* factor) {
  for (int64_t m = 0; m < slots; ++m) {
    if (factor[m] == 1.0f) continue;
    float* row = sums + m * channels;
    each_vector(channels, [&](int64_t c, auto part) {
      store(row + c, load(row + c, part) * factor[m], part);
    });
  }
}

// Rows [begin, end) of `cols` elements, asked for ahead of their use.
template <class T>
TK_INLINE void prefetch_rows(const T* from, int64_t row_stride, int64_t begin, int64_t end,
                             int64_t cols) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t c = 0; c < cols; c += kLine) __builtin_prefetch(from + n * row_stride + c, 0, 3);
  }
}

// The product weightsᵀ · values of one block, panel by panel: into sums + place(c) with this
// stride, then done(c, cols). Between the tiles of a product, the columns packed next are asked
// for, a few at a time; `following` tokens lie behind this block.
template <class T, class Place, class Done>
TK_INLINE void multiply_values(const Left& weights, const T* values, int64_t row_stride,
                               int64_t tokens, int64_t following, int64_t slots, int64_t channels,
                               const Terms& terms, int64_t stride, bool accumulate, float* panels,
                               const Place& place, const Done& done) {
  using Kind = typename Product<T>::Kind;
  const int64_t words = Kind::words(tokens), tiles = ceil_div(slots, kTileRows);
  for (int64_t group = 0; group < channels; group += kGroupCols) {
    const int64_t last = smaller<int64_t>(channels, group + kGroupCols);
    pack_tokens(values + group, row_stride, tokens, last - group, terms, panels);
    const bool inside = last < channels;
    const T* const next = inside ? values + last : values + tokens * row_stride;
    const int64_t rows = inside ? tokens : smaller(following, tokens);
    const int64_t width = smaller(channels - (inside ? last : 0), kGroupCols);
    const int64_t turns = ceil_div(last - group, kTileCols) * tiles;
    int64_t turn = 0;
    for (int64_t c = group; c < last; c += kTileCols) {
      const int64_t cols = smaller<int64_t>(last - c, kTileCols);
      for (int64_t tile = 0; tile < tiles; ++tile, ++turn) {
        prefetch_rows(next, row_stride, rows * turn / turns, rows * (turn + 1) / turns, width);
        const int64_t slot = slots * tile / tiles, height = slots * (tile + 1) / tiles - slot;
        const Left part = {weights.data + slot * weights.row_stride, weights.row_stride,
                           weights.depth_stride};
        multiply_panel<Kind>(part, panels + (c - group) * words, height, cols, words,
                             place(c) + slot * stride, stride, accumulate);
      }
      done(c, cols);
    }
  }
}

// out[slots, cols] = sums / total, zeros for a slot that no token reaches.
template <class T>
void divide(const float* sums, int64_t sums_stride, const float* total, int64_t slots, int64_t cols,
            T* out, int64_t out_stride) {
  for (int64_t m = 0; m < slots; ++m) {
    const bool empty = total[m] == 0.0f;
    const float inverse = 1.0f / total[m];
    each_vector(cols, [&](int64_t c, auto part) {
      const Floats value = empty ? splat(0.0f) : load(sums + m * sums_stride + c, part) * inverse;
      store(out + m * out_stride + c, value, part);
    });
  }
}

template <class T>
TK_INLINE void narrow_rows(const float* from, int64_t from_stride, int64_t rows, int64_t cols,
                           T* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    each_vector(cols, [&](int64_t c, auto part) {
      store(to + i * to_stride + c, load(from + i * from_stride + c, part), part);
    });
  }
}

// How the slots of an image are split into tasks: few parts, because each packs the values again,
// but enough for every thread.
TK_INLINE int64_t slot_parts(int64_t images, int64_t slots, int64_t threads) {
  const int64_t most = ceil_div(slots, kTileCols);
  int64_t parts = ceil_div(slots, kSlotBlock);
  while (parts < smaller<int64_t>(most, 4 * threads) &&
         ceil_div(images * parts, threads) * threads * 4 > images * parts * 5) {
    ++parts;
  }
  return larger<int64_t>(parts, 1);
}

}  // namespace
}  // namespace tk::TK_ISA
