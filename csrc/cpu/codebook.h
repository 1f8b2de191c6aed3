// Packed codebooks and the search in them: codes across lanes, several rows per register block,
// never an N×K matrix.
//
// A codebook is packed once per call into panels: panel p holds codes [p·W, (p+1)·W) as (D, W)
// floats, W four vectors wide, and the last panel is filled up with codes that never win. A score
// is ⟨x−μ, e−μ⟩ − ½‖e−μ‖² (l2) or ⟨x, e⟩ (the others); the highest wins. μ, the mean of 64 evenly
// spaced codes, keeps the scores exact for data far from the origin. A row's arithmetic does not
// depend on the rows beside it, nor on how the codebook is split among threads.
#pragma once

#include "cpu/token_rows.h"

namespace tk::TK_ISA {
namespace {

using Metric = AssignNearest::Metric;

#if defined(__AVX512F__)
constexpr int kRows = 5, kVectors = 4;  // 20 accumulators, 4 codes, 1 token, of 32 registers
#else
constexpr int kRows = 4, kVectors = 2;  // 8 accumulators, 2 codes, 1 token, of 16 registers
#endif
constexpr int64_t kWidth = int64_t{kVectors} * kLanes;
constexpr int64_t kMaxDim = 512;
constexpr int64_t kNarrowDim =
    16;  // up to here comparing costs as much as multiplying: the narrow search below
constexpr int64_t kRun =
    64;  // longer sums are cut into runs: rounding errors grow with the length of a run
constexpr int64_t kBlockTiles =
    96 / kRows;  // tiles of kRows rows that share one pass over a block of panels
constexpr int64_t kBlockBytes = 1 << 18;  // of panels: half of a small L2
constexpr int64_t kCentreCodes = 64;
constexpr float kNormFloor = 1e-12f;
constexpr float kInfinity = __builtin_inff();

struct Packed {
  float* panels;  // (panel_count, D, W)
  float* bias;    // (panel_count, W): −½‖e−μ‖² or 0, −inf for codes that never win
  float* centre;  // (D): μ, zeros unless l2
  int64_t dim, panel_count;
  Metric metric;
};

// Floats that one packed codebook takes; every part starts at a multiple of 64 bytes.
TK_INLINE int64_t packed_floats(int64_t codes, int64_t dim) {
  const int64_t panel_count = ceil_div(codes, kWidth);
  return ceil_div(panel_count * kWidth * (dim + 1) + dim, 16) * 16;
}

TK_INLINE Packed packed_at(float* base, const Codebooks& book, int64_t group, Metric metric) {
  const int64_t panel_count = ceil_div(book.codes, kWidth);
  float* panels = base + group * packed_floats(book.codes, book.dim);
  float* bias = panels + panel_count * kWidth * book.dim;
  return {panels, bias, bias + panel_count * kWidth, book.dim, panel_count, metric};
}

TK_INLINE void read_code(const Codebooks& book, int64_t group, int64_t code, float* to) {
  read_row(book.data, book.dtype, group * book.group_stride + code * book.code_stride, book.stride,
           book.dim, to);
}

TK_INLINE bool finite(const float* row, int64_t dim) {
  Floats zeros{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) zeros += load(row + d) * 0.0f;
  return sum(zeros + load(row + d, static_cast<int>(dim - d)) * 0.0f) == 0;
}

TK_INLINE float norm(const float* row, int64_t dim) {
  Floats total{};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) total += load(row + d) * load(row + d);
  const Floats rest = load(row + d, static_cast<int>(dim - d));
  return __builtin_sqrtf(sum(total + rest * rest));
}

// A row as the search takes it: centred (l2) or of length 1 (cosine).
TK_INLINE void transform(const Packed& packed, float* row) {
  if (packed.metric == Metric::kL2) {
    for (int64_t d = 0; d < packed.dim; ++d) row[d] -= packed.centre[d];
  } else if (packed.metric == Metric::kCosine) {
    const float length = larger(norm(row, packed.dim), kNormFloor);
    for (int64_t d = 0; d < packed.dim; ++d) row[d] /= length;
  }
}

// The mean of evenly spaced codes, of those among them that are finite.
void find_centre(const Codebooks& book, int64_t group, const Packed& packed) {
  float row[kMaxDim];
  for (int64_t d = 0; d < book.dim; ++d) packed.centre[d] = 0;
  if (packed.metric != Metric::kL2) return;
  const int64_t candidates = smaller(book.codes, kCentreCodes);
  float count = 0;
  for (int64_t i = 0; i < candidates; ++i) {
    read_code(book, group, i * book.codes / candidates, row);
    if (!finite(row, book.dim)) continue;
    count += 1;
    for (int64_t d = 0; d < book.dim; ++d) packed.centre[d] += (row[d] - packed.centre[d]) / count;
  }
}

// kLanes codes side by side, from column `column` of a panel.
void pack_vector(const Codebooks& book, int64_t group, int64_t first, const Packed& packed,
                 float* panel, float* bias) {
  float side[kMaxDim * kLanes], row[kMaxDim];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t code = first + lane;
    bool usable = code < book.codes;
    if (usable) {
      read_code(book, group, code, row);
      usable = finite(row, book.dim);
      transform(packed, row);
    }
    for (int64_t d = 0; d < book.dim; ++d) side[d * kLanes + lane] = usable ? row[d] : 0;
    bias[lane] = usable ? 0 : -kInfinity;
  }
  Floats squares{};
  for (int64_t run = 0; run < book.dim; run += kRun) {
    Floats part{};
    for (int64_t d = run; d < smaller(run + kRun, book.dim); ++d) {
      const Floats codes = load(side + d * kLanes);
      store(panel + d * kWidth, codes);
      part += codes * codes;
    }
    squares += part;
  }
  if (packed.metric == Metric::kL2) store(bias, load(bias) - squares * 0.5f);
}

// All codebooks of a call, panel by panel.
TK_INLINE void pack(const Codebooks& book, Metric metric, float* base, const Pool& pool) {
  parallel_for(pool, book.groups, grain_of(kCentreCodes * book.dim),
               [&](int64_t begin, int64_t end) {
                 for (int64_t group = begin; group < end; ++group)
                   find_centre(book, group, packed_at(base, book, group, metric));
               });
  const int64_t panels = ceil_div(book.codes, kWidth);
  parallel_for(
      pool, book.groups * panels, grain_of(2 * kWidth * book.dim), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const Packed packed = packed_at(base, book, item / panels, metric);
          const int64_t p = item % panels;
          for (int v = 0; v < kVectors; ++v) {
            const int64_t column = p * kWidth + v * kLanes;
            pack_vector(book, item / panels, column, packed,
                        packed.panels + p * kWidth * book.dim + v * kLanes, packed.bias + column);
          }
        }
      });
}

// The best of each lane for kRows rows: its score, and where it was found first: a panel (narrow)
// or a vector of codes (wide).
struct Best {
  Floats score[kRows];
  Ints at[kRows];
};

template <int kCount>
TK_INLINE void add_products(const float* tile, const float* panel, int64_t dim,
                            Floats (&sums)[kCount][kVectors]) {
  for (int64_t d = 0; d < dim; ++d) {
    Floats codes[kVectors];
    for (int v = 0; v < kVectors; ++v) codes[v] = load(panel + d * kWidth + v * kLanes);
    for (int r = 0; r < kCount; ++r) {
      const Floats token = splat(tile[d * kRows + r]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] += token * codes[v];
    }
  }
}

template <int kCount>
TK_INLINE void set_all(Floats (&to)[kCount][kVectors], const Floats (&from)[kVectors]) {
  for (int r = 0; r < kCount; ++r) {
    for (int v = 0; v < kVectors; ++v) to[r][v] = from[v];
  }
}

// Few dimensions: sums start at the bias, and only the highest score of a panel is compared with
// the best so far. `kCount` rows of a tile.
template <int kCount>
TK_INLINE void score_narrow(const float* tile, const Packed& packed, int64_t p,
                            Floats (&scores)[kCount][kVectors]) {
  Floats bias[kVectors];
  for (int v = 0; v < kVectors; ++v) bias[v] = load(packed.bias + p * kWidth + v * kLanes);
  set_all(scores, bias);
  add_products(tile, packed.panels + p * kWidth * packed.dim, packed.dim, scores);
}

void search_narrow(const Packed& packed, const float* tile, int64_t begin, int64_t end,
                   Best& best) {
  for (int64_t p = begin; p < end; ++p) {
    Floats scores[kRows][kVectors];
    score_narrow(tile, packed, p, scores);
    const Ints panel = splat_int(static_cast<int32_t>(p));
    for (int r = 0; r < kRows; ++r) {
      Floats highest = scores[r][0];
      for (int v = 1; v < kVectors; ++v) highest = max(highest, scores[r][v]);
      best.at[r] = highest > best.score[r] ? panel : best.at[r];
      best.score[r] = max(highest, best.score[r]);
    }
  }
}

// More dimensions: sums of at most kRun products, then the bias, then every vector of scores
// against the best so far.
void search_wide(const Packed& packed, const float* tile, int64_t begin, int64_t end, Best& best) {
  const Floats zeros[kVectors] = {};
  for (int64_t p = begin; p < end; ++p) {
    const float* panel = packed.panels + p * kWidth * packed.dim;
    Floats scores[kRows][kVectors], total[kRows][kVectors];
    set_all(scores, zeros);
    add_products(tile, panel, smaller(packed.dim, kRun), scores);
    for (int64_t run = kRun; run < packed.dim; run += kRun) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v)
          total[r][v] = run == kRun ? scores[r][v] : total[r][v] + scores[r][v];
      }
      set_all(scores, zeros);
      add_products(tile + run * kRows, panel + run * kWidth, smaller(packed.dim - run, kRun),
                   scores);
    }
    for (int v = 0; v < kVectors; ++v) {
      const Floats bias = load(packed.bias + p * kWidth + v * kLanes);
      const Ints at = splat_int(static_cast<int32_t>(p * kVectors + v));
      for (int r = 0; r < kRows; ++r) {
        const Floats score = (packed.dim > kRun ? total[r][v] + scores[r][v] : scores[r][v]) + bias;
        best.at[r] = score > best.score[r] ? at : best.at[r];
        best.score[r] = score > best.score[r] ? score : best.score[r];
      }
    }
  }
}

// Tiles of (D, kRows) floats, one after the other, against panels [begin, end), in blocks of panels
// that stay in the L2 cache.
TK_INLINE void search(const Packed& packed, const float* tiles, int64_t tile_count, int64_t begin,
                      int64_t end, Best* best) {
  for (int64_t t = 0; t < tile_count; ++t) {
    for (int r = 0; r < kRows; ++r) {
      best[t].score[r] = splat(-kInfinity);
      best[t].at[r] = Ints{};
    }
  }
  const int64_t step =
      larger<int64_t>(1, kBlockBytes / (packed.dim * kWidth * int64_t{sizeof(float)}));
  for (int64_t block = begin; block < end; block += step) {
    const int64_t stop = smaller(block + step, end);
    for (int64_t t = 0; t < tile_count; ++t) {
      const float* tile = tiles + t * kRows * packed.dim;
      packed.dim <= kNarrowDim ? search_narrow(packed, tile, block, stop, best[t])
                               : search_wide(packed, tile, block, stop, best[t]);
    }
  }
}

// The best of all lanes: the highest score, and its panel (narrow) or code (wide): the first, of
// equal scores.
struct Candidate {
  float score;
  int32_t at;
};

TK_INLINE Candidate candidate_of(const Packed& packed, const Best& best, int r) {
  const float score = max(best.score[r]);
  const Ints at = packed.dim <= kNarrowDim ? best.at[r] : best.at[r] * kLanes + iota();
  return {score, min(best.score[r] == splat(score) ? at : splat_int(0x7fffffff))};
}

TK_INLINE bool beats(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.at < b.at);
}

// The code that a candidate of row r of a tile stands for; narrow: the first of the highest scores
// of its panel. A row with a NaN or an infinity has no finite score, and gets code 0.
TK_INLINE int64_t code_of(const Packed& packed, const float* tile, int r,
                          const Candidate& candidate) {
  if (!(candidate.score > -kInfinity && candidate.score < kInfinity)) return 0;
  if (packed.dim > kNarrowDim) return candidate.at;
  Floats scores[1][kVectors];
  score_narrow(tile + r, packed, candidate.at, scores);
  Floats highest = scores[0][0];
  for (int v = 1; v < kVectors; ++v) highest = max(highest, scores[0][v]);
  const Floats winner = splat(max(highest));
  Ints first = splat_int(0x7fffffff);
  for (int v = kVectors - 1; v >= 0; --v)
    first = scores[0][v] == winner ? iota() + v * kLanes : first;
  return candidate.at * kWidth + min(first);
}

// Puts a row (which it transforms) into column r of a tile.
TK_INLINE void put_row(const Packed& packed, float* row, float* tile, int r) {
  transform(packed, row);
  for (int64_t d = 0; d < packed.dim; ++d) tile[d * kRows + r] = row[d];
}

TK_INLINE void put_nothing(const Packed& packed, float* tile, int r) {
  for (int64_t d = 0; d < packed.dim; ++d) tile[d * kRows + r] = 0;
}

}  // namespace
}  // namespace tk::TK_ISA
