// gather_topk on a GPU. Up to 8192 tokens with budgets: one launch, in which several blocks of an
// image each repeat the selection and move a share of the rows. Else two: one block per image, or a
// cluster of blocks, selects, then the rows are moved and the dropped ones fused.
#include "cuda/fuse_dropped.cuh"
#include "cuda/sort.cuh"

namespace tk {
namespace {

using cuda::ScoreKeys;
using cuda::TopkJob;
using cuda::TopkSpan;
using Fuse = GatherTopk::Fuse;

constexpr int kMaxThreads = 1024;
constexpr int64_t kOneLaunch = int64_t{ScoreKeys::kKeys} * kMaxThreads;
constexpr int kListRoom = 1024;                // rows that a block looks up at a time
constexpr int64_t kBytesPerBlock = 16 * 1024;  // that are worth one more block
constexpr int kBlocksEach = 3;                 // that move or fuse rows on one multiprocessor

__global__ void __launch_bounds__(kMaxThreads)
    gather_topk_kernel(const __grid_constant__ TopkJob job) {
  const GatherTopk& p = job.p;
  const auto number = static_cast<uint32_t>(cuda::block());
  const uint32_t image = number / job.parts, part = number % job.parts;
  cuda::Arena arena;
  const cuda::SelectMemory memory(arena);
  auto* list = arena.shared<uint64_t>(job.room);
  const TopkSpan span = cuda::budget_of(job, image);
  const auto rows = static_cast<uint32_t>(p.prefix + span.count);
  const int64_t first = cuda::begin_of(part, rows, job.parts);
  const int64_t last = cuda::begin_of(part + 1, rows, job.parts);
  const int64_t low = first > p.prefix ? first - p.prefix : 0;
  const int64_t high = last > p.prefix ? last - p.prefix : 0;
  const bool by_score = p.by_score;
  if (low < high) {
    const cuda::Alone alone;
    ScoreKeys keys = cuda::keys_of(job, image, alone);
    cuda::select_tokens(
        keys, static_cast<uint32_t>(span.count), memory, alone,
        [&](int64_t rank, int token) {
          if (by_score) {
            list[rank] = cuda::entry_of(keys, token);
          } else if (rank >= low && rank < high) {
            list[rank - low] = static_cast<uint32_t>(token);
          }
        },
        [](int64_t, cuda::Lanes) {});
    if (by_score) {
      cuda::sort_words(list, span.count);
      list += low;
    }
    for (int64_t i = cuda::thread(); i < high - low; i += cuda::threads())
      p.index[span.before + low + i] = cuda::token_of(list[i]);
  }
  if (part == 0) cuda::write_offsets(job, image, span);
  cuda::move_share(job, image, span.before, first, last, list, low);
}

template <class Team>
__global__ void __launch_bounds__(kMaxThreads) select_kernel(const __grid_constant__ TopkJob job) {
  const GatherTopk& p = job.p;
  cuda::Arena arena;
  const cuda::SelectMemory memory(arena);
  const Team team(arena);
  const int64_t image = cuda::block() / team.blocks;
  const TopkSpan span = cuda::budget_of(job, image);
  auto* list = reinterpret_cast<uint64_t*>(cuda::picks_of(job, image, span.before));
  uint32_t* chosen = job.chosen == nullptr ? nullptr : job.chosen + image * job.chosen_words;
  const bool by_score = p.by_score;
  ScoreKeys keys = cuda::keys_of(job, image, team);
  const uint32_t reached = cuda::select_tokens(
      keys, static_cast<uint32_t>(span.count), memory, team,
      [&](int64_t rank, int token) {
        list[rank] = by_score ? cuda::entry_of(keys, token) : static_cast<uint32_t>(token);
      },
      [=](int64_t word, cuda::Lanes bits) {
        if (chosen != nullptr) chosen[word] = bits;
      });
  const int64_t count = job.counts == nullptr ? span.count : team.of_last(reached);
  if (job.counts != nullptr && team.rank == 0 && cuda::thread() == 0) job.counts[image] = count;
  if (by_score) {
    team.sync();
    cuda::sort_words(list, count, arena.shared<uint64_t>(job.room), team);
    const int64_t step = int64_t{team.blocks} * cuda::threads();
    for (int64_t i = int64_t{team.rank} * cuda::threads() + cuda::thread(); i < count; i += step)
      list[i] = static_cast<uint64_t>(cuda::token_of(list[i]));
  }
  if (Team::kMany) team.sync();  // nobody leaves whose memory others still read
}

// Parts [part, end) of the rows of one image, so many at a time as the list has room for.
__device__ void move_parts(const TopkJob& job, int64_t image, uint32_t part, uint32_t end,
                           const TopkSpan& span, uint64_t* list) {
  const GatherTopk& p = job.p;
  const auto rows = static_cast<uint32_t>(p.prefix + span.count);
  const int64_t* picks = cuda::picks_of(job, image, span.before);
  const int64_t stop = cuda::begin_of(end, rows, job.parts);
  for (int64_t first = cuda::begin_of(part, rows, job.parts); first < stop; first += kListRoom) {
    const int64_t last = first + kListRoom < stop ? first + kListRoom : stop;
    const int64_t low = first > p.prefix ? first - p.prefix : 0;
    for (int64_t i = cuda::thread(); i < last - p.prefix - low; i += cuda::threads()) {
      list[i] = static_cast<uint64_t>(picks[low + i]);
      if (job.picks != nullptr) p.index[span.before + low + i] = picks[low + i];
    }
    cuda::sync();
    cuda::move_share(job, image, span.before, first, last, list, low);
    cuda::sync();
  }
}

__global__ void __launch_bounds__(cuda::kThreads, kBlocksEach)
    rows_kernel(const __grid_constant__ TopkJob job) {
  cuda::Arena arena;
  auto* sums = arena.shared<int64_t>(cuda::kThreads / cuda::kWarp);
  const auto group = static_cast<uint32_t>(cuda::block());
  if (group < job.moving) {
    auto* list = arena.shared<uint64_t>(kListRoom);
    cuda::for_images(job, job.parts, group, job.moving, sums,
                     [&](uint32_t image, uint32_t part, uint32_t end, const TopkSpan& span) {
                       if (part == 0) cuda::write_offsets(job, image, span);
                       move_parts(job, image, part, end, span, list);
                     });
    return;
  }
  auto* memory = arena.shared<float>(cuda::kFuseFloats);
  uint32_t slices = 0;
  for (int t = 0; t < job.p.tensor_count; ++t)
    slices += static_cast<uint32_t>(cuda::fuse_slices(job.p.tensors[t]));
  cuda::for_images(job, slices, group - job.moving,
                   static_cast<uint32_t>(cuda::blocks()) - job.moving, sums,
                   [&](uint32_t image, uint32_t part, uint32_t end, const TopkSpan& span) {
                     const int64_t row = span.before + span.count + (image + 1) * job.extra() - 1;
                     for (; part < end; ++part) cuda::fuse_slice(job, image, part, row, memory);
                   });
}

int select_threads(int64_t tokens) {
  return tokens <= kOneLaunch / 4   ? kMaxThreads / 4
         : tokens <= kOneLaunch / 2 ? kMaxThreads / 2
                                    : kMaxThreads;
}

int64_t clamp(int64_t value, int64_t least, int64_t most) {
  return value > most ? (most < least ? least : most) : value < least ? least : value;
}

int64_t row_bytes_of(const GatherTopk& p) {
  int64_t bytes = 0;
  for (int t = 0; t < p.tensor_count; ++t) bytes += p.tensors[t].row_bytes;
  return bytes;
}

const char* launch_one(TopkJob& job, void* stream) {
  const GatherTopk& p = job.p;
  const int threads = select_threads(p.tokens);
  const int64_t places = cuda::multiprocessors() * (kMaxThreads / threads);
  const int64_t rows = p.prefix + job.most;
  const int64_t wanted = p.batch <= places ? places / p.batch : 4 * places / p.batch + 1;
  const int64_t useful = rows * row_bytes_of(p) / kBytesPerBlock + 1;
  job.parts = static_cast<uint32_t>(clamp(wanted, 1, useful < rows ? useful : rows));
  const int64_t each = rows / job.parts + 1;  // rows of a share, at most
  job.room = static_cast<int>(p.by_score || each > job.most ? job.most : each) + 1;
  const int64_t shared = cuda::SelectMemory::bytes() + cuda::shared_bytes<uint64_t>(job.room);
  return cuda::launch<gather_topk_kernel>(
      {.blocks = p.batch * job.parts, .threads = threads, .shared = shared, .stream = stream}, job);
}

const char* launch_rows(TopkJob& job, void* stream) {
  const GatherTopk& p = job.p;
  const int64_t places = cuda::multiprocessors() * kBlocksEach, rows = p.prefix + job.most;
  job.parts = static_cast<uint32_t>(clamp(8 * places / p.batch + 1, 1, rows));
  job.moving =
      static_cast<uint32_t>(clamp(p.batch * rows * row_bytes_of(p) / kBytesPerBlock, 1, places));
  int64_t fusing = 0;
  for (int t = 0; t < p.tensor_count && p.fuse != Fuse::kNone; ++t)
    fusing += p.batch * cuda::fuse_slices(p.tensors[t]);
  const int64_t shared = cuda::shared_bytes<int64_t>(cuda::kThreads / cuda::kWarp) +
                         (fusing > 0 && cuda::kFuseFloats > 2 * kListRoom
                              ? cuda::shared_bytes<float>(cuda::kFuseFloats)
                              : cuda::shared_bytes<uint64_t>(kListRoom));
  return cuda::launch<rows_kernel>({.blocks = job.moving + clamp(fusing, 0, 4 * places),
                                    .threads = cuda::kThreads,
                                    .shared = shared,
                                    .stream = stream},
                                   job);
}

template <class Team>
const char* launch_select(TopkJob& job, int64_t blocks, void* stream) {
  const GatherTopk& p = job.p;
  const int64_t shared = cuda::SelectMemory::bytes() + Team::bytes() +
                         (p.by_score ? cuda::shared_bytes<uint64_t>(job.room) : 0);
  return cuda::launch<select_kernel<Team>>({.blocks = p.batch * blocks,
                                            .threads = select_threads(p.tokens / blocks),
                                            .shared = shared,
                                            .stream = stream,
                                            .cluster = static_cast<int>(blocks)},
                                           job);
}

// Blocks that select for one image: until each holds its keys, while all find a place at once.
int64_t select_blocks(const GatherTopk& p) {
  const int64_t places = cuda::multiprocessors() + 1;
  int64_t blocks = 1;
  while (p.tokens > blocks * kOneLaunch && 2 * blocks * p.batch <= places) blocks *= 2;
  const int64_t most = blocks > 1 ? cuda::most_cluster<select_kernel<cuda::Together>>() : 1;
  return blocks < most ? blocks : most;
}

const char* launch_two(TopkJob& job, void* stream) {
  const GatherTopk& p = job.p;
  job.room = static_cast<int>(p.by_score ? clamp(job.most, 1, cuda::kSortRoom) : 0);
  const int64_t blocks = select_blocks(p);
  const char* error = blocks > 1 ? launch_select<cuda::Together>(job, blocks, stream)
                                 : launch_select<cuda::Alone>(job, 1, stream);
  return error != nullptr ? error : launch_rows(job, stream);
}

// Images [first, first + count) as a job of their own, of which `chosen` tokens lie before them.
TopkJob part_of(const TopkJob& whole, int64_t first, int64_t count, int64_t chosen) {
  TopkJob job = whole;
  GatherTopk& p = job.p;
  job.rows_before = chosen + first * whole.extra();
  p.batch = count;
  p.scores =
      static_cast<const char*>(p.scores) + first * p.scores_batch_stride * size_of(p.scores_dtype);
  if (p.keep != nullptr) p.keep += first * p.keep_batch_stride;
  p.index += chosen;
  p.offsets += first;
  for (int t = 0; t < p.tensor_count; ++t) {
    GatherTopk::Tensor& tensor = p.tensors[t];
    tensor.from = static_cast<const char*>(tensor.from) + first * tensor.batch_stride;
    tensor.to = static_cast<char*>(tensor.to) + job.rows_before * tensor.row_bytes;
  }
  return job;
}

const char* launch_all(TopkJob& job, void* stream) {
  const GatherTopk& p = job.p;
  const bool one = p.budgets != nullptr && p.fuse == Fuse::kNone && p.tokens <= kOneLaunch;
  return one ? launch_one(job, stream) : launch_two(job, stream);
}

// The longest table of budgets that a launch carries, one launch after the other.
const char* launch_ragged(const TopkJob& whole, void* stream) {
  const GatherTopk& p = whole.p;
  int64_t chosen = 0;
  for (int64_t first = 0; first < p.batch; first += TopkJob::kImages) {
    const int64_t count = clamp(p.batch - first, 1, TopkJob::kImages);
    TopkJob job = part_of(whole, first, count, chosen);
    job.has_table = true;
    job.most = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t budget = p.budgets[first + i];
      if (budget > job.most) job.most = budget;
      job.starts[i + 1] = job.starts[i] + static_cast<int32_t>(budget);
    }
    chosen += job.starts[count];
    if (const char* error = launch_all(job, stream); error != nullptr) return error;
  }
  return nullptr;
}

int64_t chosen_words(const GatherTopk& p) { return (p.tokens + cuda::kWarp - 1) / cuda::kWarp; }

}  // namespace

int64_t gather_topk_cuda_scratch(const GatherTopk& p) {
  const int64_t by_threshold = p.budgets == nullptr ? p.batch * (p.tokens + 1) : 0;
  return by_threshold * 8 + (p.fuse == Fuse::kNone ? 0 : p.batch * chosen_words(p) * 4);
}

const char* gather_topk_cuda(const GatherTopk& p, bool ragged, void* stream) {
  if (p.batch == 0) return cuda::zero(p.offsets, sizeof(int64_t), stream);
  TopkJob job{};
  job.p = p;
  auto* scratch = static_cast<int64_t*>(p.scratch);
  if (p.budgets == nullptr) {
    job.picks = scratch;
    job.counts = scratch + p.batch * p.tokens;
    scratch = job.counts + p.batch;
  }
  if (p.fuse != Fuse::kNone) {
    job.chosen = reinterpret_cast<uint32_t*>(scratch);
    job.chosen_words = chosen_words(p);
  }
  if (ragged) return launch_ragged(job, stream);
  job.each = p.budgets == nullptr ? 0 : p.budgets[0];
  job.most = p.budgets == nullptr ? p.tokens : job.each;
  return launch_all(job, stream);
}

}  // namespace tk
