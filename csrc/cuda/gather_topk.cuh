// What the launches of gather_topk share: the job, where each image begins, and the rows of a
// share.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/select.cuh"

namespace tk::cuda {

// One launch or two for all images, or for kImages of them where their budgets differ: budgets
// travel with the launch.
struct TopkJob {
  static constexpr int kImages = 512;

  GatherTopk p;
  int64_t each;         // tokens to choose where no table says so
  int64_t rows_before;  // output rows of earlier jobs
  int64_t* picks;       // (B, N): with a threshold, the chosen tokens of every image
  int64_t* counts;      // (B): how many they are
  uint32_t* chosen;     // (B, chosen_words): one bit per token, with a fused row
  int64_t chosen_words;
  int64_t most;    // chosen tokens of an image, at most
  int room;        // entries of the list of chosen tokens in the arena
  int parts;       // of the rows of an image
  int64_t moving;  // blocks that move rows; the others fuse
  bool has_table;
  int32_t starts[kImages + 1];  // chosen tokens of lower images

  __host__ __device__ int64_t extra() const {
    return p.prefix + (p.fuse != GatherTopk::Fuse::kNone);
  }
};

// The chosen tokens of an image: those of lower images, and its own.
struct TopkSpan {
  int64_t before, count;
};

__device__ inline TopkSpan budget_of(const TopkJob& job, int64_t image) {
  if (!job.has_table) return {image * job.each, job.each};
  return {job.starts[image], job.starts[image + 1] - job.starts[image]};
}

__device__ inline int64_t count_of(const TopkJob& job, int64_t image) {
  return job.counts != nullptr ? job.counts[image] : budget_of(job, image).count;
}

__device__ inline int64_t* picks_of(const TopkJob& job, int64_t image, int64_t before) {
  return job.picks != nullptr ? job.picks + image * job.p.tokens : job.p.index + before;
}

__device__ inline void write_offsets(const TopkJob& job, int64_t image, const TopkSpan& span) {
  if (thread() != 0) return;
  if (image == 0 && job.rows_before == 0) job.p.offsets[0] = 0;
  job.p.offsets[image + 1] = job.rows_before + span.before + span.count + (image + 1) * job.extra();
}

template <class Team>
__device__ ScoreKeys keys_of(const TopkJob& job, int64_t image, const Team& team) {
  const GatherTopk& p = job.p;
  const auto* scores = static_cast<const char*>(p.scores) +
                       image * p.scores_batch_stride * (p.scores_dtype == DType::kFloat32 ? 4 : 2);
  const bool* keep = p.keep == nullptr ? nullptr : p.keep + image * p.keep_batch_stride;
  const ScoreRow row{scores, p.scores_dtype,      p.scores_token_stride,
                     keep,   p.keep_token_stride, static_cast<int>(p.tokens)};
  return {row, job.counts != nullptr ? Rule::kThreshold : Rule::kByScore, p.threshold, team.rank,
          team.blocks};
}

// A token with its score in front, so that ascending entries are descending scores, equal ones by
// ascending token; the token alone is an entry too.
__device__ inline uint64_t entry_of(const ScoreKeys& keys, int token) {
  return uint64_t{~keys.key_of(token)} << 32 | static_cast<uint32_t>(token);
}

__device__ inline int64_t token_of(uint64_t entry) {
  return static_cast<int64_t>(entry & 0xffffffffu);
}

// Output rows first … last−1 of an image; list[0] is the entry of the chosen token number `low`.
__device__ inline void move_share(const TopkJob& job, int64_t image, int64_t before, int64_t first,
                                  int64_t last, const uint64_t* list, int64_t low) {
  const GatherTopk& p = job.p;
  const int64_t start = before + image * job.extra() + first, prefix = p.prefix;
  for (int t = 0; t < p.tensor_count; ++t) {
    const GatherTopk::Tensor& tensor = p.tensors[t];
    const int64_t stride = tensor.token_stride, bytes = tensor.row_bytes;
    const char* from = static_cast<const char*>(tensor.from) + image * tensor.batch_stride;
    char* to = static_cast<char*>(tensor.to) + start * bytes;
    const int word =
        word_of(place_of(tensor.from) | place_of(tensor.to) | tensor.batch_stride | stride | bytes);
    move_rows(last - first, bytes, word, thread(), threads(), [=](int64_t r) -> MovedRow {
      const int64_t row = first + r;
      const int64_t token = row < prefix ? row : prefix + token_of(list[row - prefix - low]);
      return {from + token * stride, to + r * bytes};
    });
  }
}

// Runs body(image, first part, last part + 1, span) for the images of this block, one of `group` in
// `groups` that divide `parts` parts of every image evenly. `sums` holds one entry per warp.
template <class Body>
__device__ void for_images(const TopkJob& job, uint32_t parts, uint32_t group, uint32_t groups,
                           int64_t* sums, const Body& body) {
  const uint32_t all = static_cast<uint32_t>(job.p.batch) * parts;
  uint32_t begin = begin_of(group, all, groups);
  const uint32_t end = begin_of(group + 1, all, groups);
  if (begin == end) return;
  uint32_t image = begin / parts, base = image * parts;
  int64_t before = 0;
  if (job.counts != nullptr) {
    for (uint32_t i = static_cast<uint32_t>(thread()); i < image; i += threads())
      before += job.counts[i];
    before = block_sum(before, sums);
  }
  for (; begin < end; ++image, base += parts) {
    if (job.counts == nullptr) before = budget_of(job, image).before;
    const TopkSpan span{before, count_of(job, image)};
    const uint32_t stop = end - base < parts ? end : base + parts;
    body(image, begin - base, stop - base, span);
    before += span.count;
    begin = stop;
  }
}

}  // namespace tk::cuda
