// What the kernels of assign_nearest share: what is to be done, and how a token is finished whose
// code is one of two.
#pragma once

#include "cuda/code_search.cuh"
#include "cuda/rows.cuh"

namespace tk::cuda {

// Tokens that are compared with all codes together: few where few are, for many to take part.
constexpr int kFewRows = 4, kManyRows = 16;

struct NearestJob {
  AssignNearest p;
  Packed packed;
  bool x_wide, direct;
  BlockShape shape;
  int splits;
  int word;                  // bytes that a code moves by; 0: number by number
  int64_t row_blocks, each;  // columns of images of one split
  int64_t chunks;            // of kFewRows tokens of a group, at most
  Found* partial;            // (G, row blocks, splits, rows of a block) where there are splits
  uint32_t* tickets;         // (G, row blocks)
  uint32_t *listed, *done;   // (G) tokens to be compared exactly; (G, chunks) parts that are done
  uint32_t* list;            // (G, rows)

  __device__ int64_t at(int64_t group, int64_t row) const {
    return row * p.codebook.groups + group;
  }
};

// Index, distance and code of `count` tokens; picks[r] is the code of token row_of(r), or the first
// of two, of which seconds[r] is the other; −1: the token is left out.
template <class RowOf>
__device__ void finish(const NearestJob& s, int64_t group, int count, int32_t* picks,
                       const int32_t* seconds, const RowOf& row_of) {
  const AssignNearest& p = s.p;
  const int dim = s.packed.dim(), teams = threads() / kTeam;
  const bool differences = p.metric == Metric::kL2;
  for (int base = 0; base < count; base += teams) {
    const int r = base + thread() / kTeam;
    const int32_t first = r < count ? picks[r] : -1, second = r < count ? seconds[r] : -1;
    const bool here = first >= 0, choice = here && second >= 0;
    const int64_t row = here ? row_of(r) : 0;
    const Numbers x = token_at(p.x, s.x_wide, row, group);
    const auto code = [&](int32_t k) {
      return code_at(p.codebook, s.packed.wide, group, k < 0 ? 0 : k);
    };
    int32_t winner = first;
    const bool measured = p.distance != nullptr && p.metric != Metric::kCosine;
    float total = 0;
    const bool choices = any(choice);
    if (choices || measured)
      total = team_total(x, code(first), dim, differences, measured ? here : choice);
    if (choices) {
      const float other = team_total(x, code(second), dim, differences, choice);
      if (choice) {
        const float a = score_of(total, p.metric, terms_of(s.packed, group, first).at[0]);
        const float b = score_of(other, p.metric, terms_of(s.packed, group, second).at[0]);
        if (b > a || (b == a && second < first)) winner = second, total = other;
      }
    }
    if (p.distance != nullptr && !measured)
      total = team_cosine_distance(x, code(winner), dim, here);
    warp_sync();  // all lanes have read `picks`
    if (here && lane() % kTeam == 0) {
      picks[r] = winner;
      p.index[s.at(group, row)] = winner;
      if (p.distance != nullptr)
        p.distance[s.at(group, row)] = p.metric == Metric::kDot ? -total : total;
    }
  }
  if (p.codes == nullptr) return;
  sync();
  const int64_t size = bytes_of(p.codebook.dtype), bytes = dim * size;
  const auto copy_of = [&](int64_t r) -> MovedRow {
    const int32_t pick = picks[r] < 0 ? 0 : picks[r];
    return {static_cast<const char*>(code_at(p.codebook, false, group, pick).data),
            static_cast<char*>(p.codes) + s.at(group, row_of(static_cast<int>(r))) * bytes};
  };
  if (s.word > 0) {
    move_rows(count, bytes, s.word, thread(), threads(), copy_of);
    return;
  }
  for (int64_t i = thread(); i < int64_t{count} * dim; i += threads()) {
    const MovedRow row = copy_of(i / dim);
    const int64_t d = i % dim;
    if (size == 4)
      reinterpret_cast<uint32_t*>(row.to)[d] =
          reinterpret_cast<const uint32_t*>(row.from)[d * p.codebook.stride];
    else
      reinterpret_cast<uint16_t*>(row.to)[d] =
          reinterpret_cast<const uint16_t*>(row.from)[d * p.codebook.stride];
  }
}

}  // namespace tk::cuda
