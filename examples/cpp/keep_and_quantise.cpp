// Keeps the tokens of every image that stand out and quantises them, in plain C++ without torch or
// Python; then checks both results by counting.
#include <tokenkernels/tokenkernels.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kImages = 8, kTokens = 576, kChannels = 64, kKept = 64, kCodes = 512;

// Memory that a kernel borrows, aligned for vectors.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  void* data() { return data_; }

 private:
  void* data_;
};

// The simplest pool: threads that live for one call. Ranges are no shorter than `grain`.
tk::Pool threads() {
  static const int count = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 16);
  const auto run = [](int64_t work, int64_t grain, tk::Pool::Body body, const void* context) {
    const int64_t parts = std::clamp<int64_t>(work / std::max<int64_t>(grain, 1), 1, count);
    std::vector<std::jthread> helpers;
    for (int64_t part = 1; part < parts; ++part)
      helpers.emplace_back(body, context, work * part / parts, work * (part + 1) / parts);
    body(context, 0, work / parts);
  };
  return {run, count};
}

struct Kept {
  std::vector<float> tokens;                      // (images, kept, channels)
  std::vector<int64_t> index = {}, offsets = {};  // (images, kept), (images + 1)
};

// The kKept tokens of highest score, in their order.
Kept keep(const std::vector<float>& tokens, const std::vector<float>& scores) {
  Kept kept{std::vector<float>(kImages * kKept * kChannels), std::vector<int64_t>(kImages * kKept),
            std::vector<int64_t>(kImages + 1)};
  std::vector<int64_t> selected(kImages * kTokens), budgets(kImages, kKept);
  tk::GatherTopk p{};
  p.scores = scores.data();
  p.scores_dtype = tk::DType::kFloat32;
  p.scores_batch_stride = kTokens;
  p.scores_token_stride = 1;
  p.batch = kImages;
  p.tokens = kTokens;
  p.budgets = budgets.data();
  p.selected = selected.data();
  p.index = kept.index.data();
  p.offsets = kept.offsets.data();
  constexpr int64_t kRow = kChannels * sizeof(float);
  p.tensors[p.tensor_count++] = {tokens.data(), kept.tokens.data(), kTokens * kRow, kRow,
                                 kRow,          tk::DType::kFloat32};
  const tk::Pool pool = threads();
  Scratch selecting(tk::gather_topk_select_scratch(p, pool.threads));
  p.scratch = selecting.data();
  tk::gather_topk_select(p, pool);
  Scratch gathering(tk::gather_topk_scratch(p, pool.threads));
  p.scratch = gathering.data();
  tk::gather_topk(p, pool);
  return kept;
}

struct Quantised {
  std::vector<int64_t> index;   // (rows)
  std::vector<float> distance;  // (rows): squared
};

Quantised quantise(const std::vector<float>& rows, const std::vector<float>& codebook) {
  const int64_t count = static_cast<int64_t>(rows.size()) / kChannels;
  Quantised result{std::vector<int64_t>(rows.size() / kChannels),
                   std::vector<float>(rows.size() / kChannels)};
  tk::AssignNearest p{};
  p.x = {rows.data(), tk::DType::kFloat32, count, 1, {count}, {kChannels}, kChannels, 1};
  p.codebook = {codebook.data(), tk::DType::kFloat32, 1,         kCodes,
                kChannels,       kCodes * kChannels,  kChannels, 1};
  p.metric = tk::AssignNearest::Metric::kL2;
  p.index = result.index.data();
  p.distance = result.distance.data();
  const tk::Pool pool = threads();
  Scratch scratch(tk::assign_nearest_scratch(p, pool.threads));
  p.scratch = scratch.data();
  tk::assign_nearest(p, pool);
  return result;
}

std::vector<float> random(int64_t count, std::mt19937& source) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(source);
  return values;
}

double squared_distance(const float* a, const float* b) {
  double sum = 0;
  for (int64_t c = 0; c < kChannels; ++c) sum += (double{a[c]} - b[c]) * (double{a[c]} - b[c]);
  return sum;
}

// Every image keeps as many as it should, in order, none of them below one that goes; rows are
// those of the index.
bool is_kept_right(const Kept& kept, const std::vector<float>& tokens,
                   const std::vector<float>& scores) {
  for (int64_t b = 0; b < kImages; ++b) {
    const int64_t* index = &kept.index[b * kKept];
    if (kept.offsets[b + 1] != (b + 1) * kKept || !std::is_sorted(index, index + kKept))
      return false;
    float least = 1e30f, most = -1e30f;
    for (int64_t n = 0; n < kTokens; ++n) {
      const float score = scores[b * kTokens + n];
      const bool stays = std::binary_search(index, index + kKept, n);
      (stays ? least : most) = stays ? std::min(least, score) : std::max(most, score);
    }
    if (least < most) return false;
    for (int64_t i = 0; i < kKept; ++i) {
      const float* from = &tokens[(b * kTokens + index[i]) * kChannels];
      if (!std::equal(from, from + kChannels, &kept.tokens[(b * kKept + i) * kChannels]))
        return false;
    }
  }
  return true;
}

// No code is nearer than the one that was found, beyond rounding.
bool is_nearest(const Quantised& found, const std::vector<float>& rows,
                const std::vector<float>& codebook) {
  for (size_t row = 0; row < found.index.size(); ++row) {
    const float* x = &rows[row * kChannels];
    const double mine = squared_distance(x, &codebook[found.index[row] * kChannels]);
    for (int64_t k = 0; k < kCodes; ++k) {
      if (squared_distance(x, &codebook[k * kChannels]) < mine * (1 - 1e-5)) return false;
    }
  }
  return true;
}

template <class Call>
double milliseconds(const Call& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace

int main() {
  std::mt19937 source(0);
  const std::vector<float> tokens = random(kImages * kTokens * kChannels, source);
  const std::vector<float> codebook = random(kCodes * kChannels, source);
  std::vector<float> scores(kImages * kTokens);
  for (size_t n = 0; n < scores.size(); ++n) {
    for (int64_t c = 0; c < kChannels; ++c)
      scores[n] += tokens[n * kChannels + c] * tokens[n * kChannels + c];
  }
  Kept kept;
  Quantised found;
  const double keeping = milliseconds([&] { kept = keep(tokens, scores); });
  const double quantising = milliseconds([&] { found = quantise(kept.tokens, codebook); });
  double distance = 0;
  for (const float one : found.distance)
    distance += one / static_cast<double>(found.distance.size());
  std::vector<int64_t> used = found.index;
  std::sort(used.begin(), used.end());
  const auto codes = std::unique(used.begin(), used.end()) - used.begin();
  std::printf("tokenkernels on %s, %d threads\n", tk::instruction_set(), threads().threads);
  std::printf("gather_topk: %ld of %ld tokens in each of %ld images, %.2f ms\n", kKept, kTokens,
              kImages, keeping);
  std::printf("assign_nearest: %ld of %ld codes used, mean squared distance %.1f, %.2f ms\n",
              static_cast<int64_t>(codes), kCodes, distance, quantising);
  const bool right =
      is_kept_right(kept, tokens, scores) && is_nearest(found, kept.tokens, codebook);
  std::printf(right ? "both are right\n" : "wrong\n");
  return right ? 0 : 1;
}
