// slim_tokens: M soft aggregates of N tokens, weighted by a small network of the tokens themselves.
//
// The tokens of an image pass by in tiles: layer norm, projection, GELU and logits of a tile stay
// in cache. Softmax and aggregation follow once a segment's logits are complete; further segments
// are joined by running maxima and denominators.
#include "cpu/slim_tokens.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t kTileTokens = 96;
constexpr int64_t kSegmentFloats = int64_t{1} << 20;  // logits and values of one segment: 4 MiB
constexpr int64_t kScratchBytes = int64_t{32} << 20;

// Tokens whose logits are complete before the softmax looks at them: a function of the shape of one
// image.
int64_t segment_tokens(const SlimTokens& p) {
  return smaller(p.tokens, larger<int64_t>(kSegmentFloats / (p.slots + p.channels), kTileTokens));
}

// What a worker needs for one tile.
struct TileBuffers {
  float* normal;     // (kTileTokens, C), operands
  float* projected;  // (kTileTokens, H); after the GELU operands
  float* stage;
};

TileBuffers take_tile(const SlimTokens& p, Arena& arena) {
  const int64_t rows = smaller(p.tokens, kTileTokens);
  return {arena.floats(rows * p.channels), arena.floats(rows * p.hidden),
          arena.floats(stage_size(p, rows))};
}

// What one image needs on its way. Slots are padded to whole vectors.
struct ImageBuffers {
  float* logits;        // (segment, M); after the softmax its numerators
  float* values;        // packed (segment, C)
  float* sums;          // (M, C): what the numerators have gathered
  float* maxima;        // (M)
  float* denominators;  // (M)
};

ImageBuffers take_image(const SlimTokens& p, Arena& arena) {
  const int64_t segment = segment_tokens(p), slots = slot_stride(p);
  return {arena.floats(segment * slots), arena.floats(packed_size(segment, p.channels)),
          arena.floats(p.slots * p.channels), arena.floats(slots), arena.floats(slots)};
}

// Workers take whole images where there are enough of them; otherwise all share the tiles and slots
// of one image at a time.
struct Plan {
  bool by_image;
  int64_t workers;
  int64_t tile_bytes, image_bytes;
};

Plan plan_for(const SlimTokens& p, int threads) {
  Arena tile{nullptr}, image{nullptr};
  take_tile(p, tile);
  take_image(p, image);
  const bool by_image = p.batch >= 2 * threads;
  const int64_t room = by_image ? larger<int64_t>(kScratchBytes / image.used, 1) : threads;
  return {by_image, smaller<int64_t>(threads, room), tile.used, image.used};
}

struct Scratch {
  Weights weights;
  char *tiles, *images;

  TileBuffers tile(const SlimTokens& p, const Plan& plan, int64_t worker) const {
    Arena arena{tiles + worker * plan.tile_bytes};
    return take_tile(p, arena);
  }

  ImageBuffers image(const SlimTokens& p, const Plan& plan, int64_t worker) const {
    Arena arena{images + worker * plan.image_bytes};
    return take_image(p, arena);
  }
};

// The logits of tokens [begin, end) of the segment that starts at `first`.
template <class T>
void route(const SlimTokens& p, const Weights& w, int64_t b, int64_t first, int64_t begin,
           int64_t end, const TileBuffers& tile, const ImageBuffers& image) {
  const int64_t rows = end - begin;
  auto* normal = reinterpret_cast<Operand<T>*>(tile.normal);
  Moments moments[kTileTokens];
  layer_norm<T>(p, w, b, first + begin, rows, normal, moments);
  project<T>(p, w, normal, rows, tile.projected, tile.stage);
  if (p.projected != nullptr) {
    std::memcpy(p.projected + (b * p.tokens + first + begin) * p.hidden, tile.projected,
                static_cast<size_t>(rows * p.hidden) * sizeof(float));
  }
  score_slots<T>(p, w, tile.projected, rows, reinterpret_cast<Operand<T>*>(tile.projected),
                 image.logits + begin * slot_stride(p), tile.stage);
}

// Channels [begin, end), whole panels of them, of the segment's `count` tokens, as the right side
// of the aggregation.
template <class T>
void pack_values(const SlimTokens& p, int64_t b, int64_t first, int64_t count, int64_t begin,
                 int64_t end, const ImageBuffers& image) {
  Product<T>::pack(token<T>(p, b, first) + begin, p.x_token, 1, count,
                   smaller(end, p.channels) - begin,
                   image.values + begin * Product<T>::Kind::words(count));
}

// One vector of slots: logits become numerators relative to the running maxima. Returns what
// earlier sums shrink by.
Floats softmax_over_tokens(const SlimTokens& p, const ImageBuffers& image, int64_t count, int64_t m,
                           bool first) {
  const int64_t slots = slot_stride(p);
  const Floats before = first ? splat(-__builtin_inff()) : load(image.maxima + m);
  Floats maximum = before;
  for (int64_t n = 0; n < count; ++n) maximum = max(load(image.logits + n * slots + m), maximum);
  Floats denominator{};
  for (int64_t n = 0; n < count; ++n) {
    float* at = image.logits + n * slots + m;
    const Floats numerator = exp_below(load(at) - maximum);
    store(at, numerator);
    denominator += numerator;
  }
  const Floats shrink = first ? splat(0.0f) : exp_below(before - maximum);
  store(image.maxima + m, maximum);
  store(image.denominators + m,
        first ? denominator : load(image.denominators + m) * shrink + denominator);
  return shrink;
}

// Slots [begin, end), whole vectors of them: softmax over the segment's tokens, then the weighted
// sum of their values.
template <class T>
void aggregate(const SlimTokens& p, const ImageBuffers& image, int64_t count, int64_t begin,
               int64_t end, bool first) {
  for (int64_t m = begin; m < end; m += kLanes) {
    const Floats shrink = softmax_over_tokens(p, image, count, m, first);
    for (int i = 0; !first && i < kLanes && m + i < p.slots; ++i) {
      float* row = image.sums + (m + i) * p.channels;
      for_vectors(p.channels, [&](int64_t c, int lanes) {
        store_some(row + c, load_some(row + c, lanes) * shrink[i], lanes);
      });
    }
  }
  using Kind = typename Product<T>::Kind;
  const int64_t rows = smaller(end, p.slots) - begin, slots = slot_stride(p);
  float* numerators = image.logits + begin;
  multiply<Kind>(Product<T>::columns(numerators, slots, count, rows, numerators, slots),
                 image.values, rows, p.channels, Kind::words(count),
                 image.sums + begin * p.channels, p.channels, !first);
}

// Slots [begin, end): divides by the denominators, rounds, writes.
template <class T>
void finish(const SlimTokens& p, int64_t b, const ImageBuffers& image, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < smaller(end, p.slots); ++m) {
    const float* row = image.sums + m * p.channels;
    T* out = static_cast<T*>(p.out) + (b * p.slots + m) * p.channels;
    const float inverse = 1.0f / image.denominators[m];
    for_vectors(p.channels, [&](int64_t c, int lanes) {
      store_some(out + c, load_some(row + c, lanes) * inverse, lanes);
    });
    p.lse[b * p.slots + m] = image.maxima[m] + __builtin_logf(image.denominators[m]);
  }
}

template <class T>
void whole_image(const SlimTokens& p, const Weights& w, int64_t b, const TileBuffers& tile,
                 const ImageBuffers& image) {
  const int64_t segment = segment_tokens(p);
  for (int64_t first = 0; first < p.tokens; first += segment) {
    const int64_t count = smaller(p.tokens - first, segment), tiles = ceil_div(count, kTileTokens);
    for (int64_t i = 0; i < tiles; ++i) {
      route<T>(p, w, b, first, part(count, i, tiles), part(count, i + 1, tiles), tile, image);
    }
    pack_values<T>(p, b, first, count, 0, p.channels, image);
    aggregate<T>(p, image, count, 0, slot_stride(p), first == 0);
  }
  finish<T>(p, b, image, 0, p.slots);
}

// The same sums in the same order as `whole_image`: neither tiles nor blocks of slots change a bit.
template <class T>
void shared_image(const SlimTokens& p, const Plan& plan, const Scratch& scratch, int64_t b,
                  const Pool& pool) {
  const ImageBuffers image = scratch.image(p, plan, 0);
  const int64_t segment = segment_tokens(p), vectors = ceil_div(p.slots, kLanes);
  const int64_t blocks = smaller(vectors, 2 * plan.workers);
  for (int64_t first = 0; first < p.tokens; first += segment) {
    const int64_t count = smaller(p.tokens - first, segment);
    const int64_t tiles =
        larger(ceil_div(count, kTileTokens), smaller(2 * plan.workers, ceil_div(count, kTileRows)));
    const int64_t panels = ceil_div(p.channels, kTileCols), packs = smaller(panels, plan.workers);
    share_tasks(pool, tiles + packs, plan.workers, [&](int64_t i, int64_t worker) {
      if (i < tiles) {
        route<T>(p, scratch.weights, b, first, part(count, i, tiles), part(count, i + 1, tiles),
                 scratch.tile(p, plan, worker), image);
      } else {
        pack_values<T>(p, b, first, count, part(panels, i - tiles, packs) * kTileCols,
                       part(panels, i - tiles + 1, packs) * kTileCols, image);
      }
    });
    share_tasks(pool, blocks, plan.workers, [&](int64_t i, int64_t) {
      const int64_t begin = part(vectors, i, blocks) * kLanes,
                    end = part(vectors, i + 1, blocks) * kLanes;
      aggregate<T>(p, image, count, begin, end, first == 0);
      if (first + count == p.tokens) finish<T>(p, b, image, begin, end);
    });
  }
}

Scratch take_scratch(const SlimTokens& p, const Plan& plan, Arena& arena) {
  const Weights weights = take_weights(p, arena);
  char* tiles = arena.bytes(plan.workers * plan.tile_bytes);
  return {weights, tiles, arena.bytes((plan.by_image ? plan.workers : 1) * plan.image_bytes)};
}

TK_INLINE int64_t products_of(const SlimTokens& p) {
  const int64_t widths = p.channels * p.hidden + p.hidden * p.slots + p.slots * p.channels;
  return p.batch * p.tokens * widths;
}

}  // namespace

Status slim_tokens(const SlimTokens& p, const Pool& all) {
  if (p.batch == 0) return Status::kOk;
  const Pool pool{all.run, threads_for(all.threads, products_of(p))};
  const Plan plan = plan_for(p, pool.threads);
  Arena arena{p.scratch};
  const Scratch scratch = take_scratch(p, plan, arena);
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    pack_weights<T>(p, scratch.weights);
    if (plan.by_image) {
      share_tasks(pool, p.batch, plan.workers, [&](int64_t b, int64_t worker) {
        whole_image<T>(p, scratch.weights, b, scratch.tile(p, plan, worker),
                       scratch.image(p, plan, worker));
      });
    } else {
      for (int64_t b = 0; b < p.batch; ++b) shared_image<T>(p, plan, scratch, b, pool);
    }
  });
  return Status::kOk;
}

int64_t slim_tokens_scratch(const SlimTokens& p, int threads) {
  Arena arena{nullptr};
  take_scratch(p, plan_for(p, threads_for(threads, products_of(p))), arena);
  return arena.used;
}

}  // namespace tk::TK_ISA
