// score_attention on a GPU: one launch measures the softmax of each row, unless it is given, one
// scores the keys, and one more joins the shares of long rows, or averages over many neighbours.
#include "cuda/score_plan.cuh"

namespace tk {
namespace {

namespace score = cuda::score;
using score::ScoreFlow;
using score::ScoreJob;

constexpr int kFinished = 256;  // columns of a block
constexpr int kEight = 8;       // that are summed up before windows are

// Some columns of one line of scores: its shares joined in order, then averaged over their
// neighbours. The first `totals` lines are sums, the others maxima.
__global__ void __launch_bounds__(cuda::kThreads)
    finish_kernel(const float* shares, float* out, int count, int64_t lines, int64_t totals,
                  int64_t columns, int pool) {
  const int64_t per_line = (columns + kFinished - 1) / kFinished;
  const int64_t line = cuda::block() / per_line;
  const int64_t first = (cuda::block() - line * per_line) * kFinished;
  const int room = (kFinished + pool + kEight) / kEight * kEight;
  cuda::Arena arena;
  float* values = arena.shared<float>(room);
  float* eights = arena.shared<float>(room / kEight);
  for (int at = cuda::thread(); at < room; at += cuda::threads()) {
    const int64_t column = first - pool / 2 + at;
    float value = 0;
    for (int share = 0; share < count && column >= 0 && column < columns; ++share) {
      const float next = shares[(share * lines + line) * columns + column];
      value = line < totals ? value + next : score::higher(value, next);
    }
    values[at] = value;
  }
  cuda::sync();
  for (int at = cuda::thread(); at < room / kEight; at += cuda::threads()) {
    float sum = 0;
    for (int i = 0; i < kEight; ++i) sum += values[at * kEight + i];
    eights[at] = sum;
  }
  cuda::sync();
  const int64_t left = columns - first;
  for (int at = cuda::thread(); at < kFinished && at < left; at += cuda::threads()) {
    const int end = at + pool;
    int next = at;
    float sum = 0;
    for (; next < end && next % kEight != 0; ++next) sum += values[next];
    for (; next + kEight <= end; next += kEight) sum += eights[next / kEight];
    for (; next < end; ++next) sum += values[next];
    out[line * columns + first + at] = pool > 1 ? sum / static_cast<float>(pool) : sum;
  }
}

template <class T>
__global__ void __launch_bounds__(score::kScoreWarps* cuda::kWarp, 3)
    measure_kernel(const __grid_constant__ ScoreJob job) {
  score::measure_tile<T>(job);
}

// Blocks of the second pass that are to find room on a multiprocessor.
constexpr int resident(ScoreFlow flow) { return flow == ScoreFlow::kSums ? 3 : 2; }

template <class T, ScoreFlow flow>
__global__ void __launch_bounds__(score::kScoreWarps* cuda::kWarp, resident(flow))
    score_kernel(const __grid_constant__ ScoreJob job) {
  score::score_keys<T, flow>(job);
}

template <class T>
ScoreJob measuring_of(const ScoreAttention& p) {
  return score::measuring_of<T>(p, cuda::most_cluster<measure_kernel<T>>());
}

template <class T>
const char* launch_measure(const ScoreJob& job, void* stream) {
  const int64_t tiles = job.p.key_heads * job.tile.head_tiles * job.tile.row_blocks;
  return cuda::launch<measure_kernel<T>>({.blocks = job.p.batch * tiles * job.splits * job.cluster,
                                          .threads = job.tile.warps() * cuda::kWarp,
                                          .shared = score::measure_bytes<T>(job),
                                          .stream = stream,
                                          .cluster = job.cluster},
                                         job);
}

template <class T, ScoreFlow flow>
const char* launch_flow(const ScoreJob& job, void* stream) {
  const int64_t groups = (job.key_tiles + job.tiles_each - 1) / job.tiles_each;
  return cuda::launch<score_kernel<T, flow>>(
      {.blocks = job.p.batch * job.units * job.parts * groups,
       .threads = job.tile.warps() * cuda::kWarp,
       .shared = score::score_bytes<T>(job),
       .stream = stream},
      job);
}

template <class T>
const char* launch_score(const ScoreJob& job, void* stream) {
  switch (job.flow) {
    case ScoreFlow::kSums:
      return launch_flow<T, ScoreFlow::kSums>(job, stream);
    case ScoreFlow::kMaxima:
      return launch_flow<T, ScoreFlow::kMaxima>(job, stream);
    default:
      return launch_flow<T, ScoreFlow::kMeanFirst>(job, stream);
  }
}

const char* launch_finish(const ScoreJob& job, void* stream) {
  const ScoreAttention& p = job.p;
  const int64_t columns = p.end_column - p.first_column;
  const int64_t lines = (p.sum + p.max) * p.batch * score::lines_of(p);
  const int pool = static_cast<int>(p.pool);
  const int64_t room = kFinished + pool + kEight;
  return cuda::launch<finish_kernel>(
      {.blocks = lines * ((columns + kFinished - 1) / kFinished),
       .threads = cuda::kThreads,
       .shared = cuda::shared_bytes<float>(room) + cuda::shared_bytes<float>(room / kEight),
       .stream = stream},
      job.out, p.out, job.parts, lines, p.sum ? p.batch * score::lines_of(p) : 0, columns, pool);
}

template <class T>
const char* launch_all(const ScoreAttention& p, void* stream) {
  ScoreJob job = score::scoring_of<T>(p);
  auto* scratch = static_cast<char*>(p.scratch);
  if (p.lse == nullptr) {
    ScoreJob measuring = measuring_of<T>(p);
    measuring.softmax = job.softmax = reinterpret_cast<score::SplitSoftmax*>(scratch);
    job.splits = measuring.splits;
    scratch += score::softmax_bytes(measuring);
    if (const char* error = launch_measure<T>(measuring, stream); error != nullptr) return error;
  }
  const bool direct = score::is_direct(job);
  job.out = direct ? p.out : reinterpret_cast<float*>(scratch);
  const char* error = launch_score<T>(job, stream);
  return direct || error != nullptr ? error : launch_finish(job, stream);
}

template <class T>
int64_t scratch_of(const ScoreAttention& p) {
  const ScoreJob job = score::scoring_of<T>(p);
  const int64_t softmax = p.lse == nullptr ? score::softmax_bytes(measuring_of<T>(p)) : 0;
  return softmax + (score::is_direct(job) ? 0 : score::share_bytes(job));
}

bool is_empty(const ScoreAttention& p) { return p.batch == 0 || p.first_column == p.end_column; }

}  // namespace

int64_t score_attention_cuda_scratch(const ScoreAttention& p) {
  if (is_empty(p)) return 0;
  return p.dtype == DType::kFloat32 ? scratch_of<float>(p) : scratch_of<Half>(p);
}

const char* score_attention_cuda(const ScoreAttention& p, void* stream) {
  if (is_empty(p)) return nullptr;
  constexpr int64_t kMost = int64_t{1} << 30;
  if (p.keys > kMost || p.rows > kMost) return "allowed 2^30 keys and rows";
  if (p.dtype == DType::kFloat32) return launch_all<float>(p, stream);
  return p.dtype == DType::kFloat16 ? launch_all<Half>(p, stream) : launch_all<BFloat16>(p, stream);
}

}  // namespace tk
