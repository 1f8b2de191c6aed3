// slim_tokens_backward on a GPU, in five launches.
//
// The softmax comes again from `lse`, the hidden tokens from `projected` or else from x; what
// passes between launches is in the type that is computed with. That is float32 for float16, and
// for bfloat16 with few slots: operands rounded to them would be too far off.
#include "cuda/slim_parameters.cuh"

namespace tk {
namespace {

using cuda::SlimBackward;

constexpr int64_t kFewSlots = 16;
constexpr int64_t kSplits = 16, kSplitTokens = 128;  // at most; at least

template <class T>
__global__ void __launch_bounds__(cuda::kSlimThreads, 2)
    spread_kernel(const __grid_constant__ SlimBackward job) {
  if (cuda::block() < job.all_tiles)
    cuda::spread_tile<T>(job, cuda::block());
  else
    cuda::fold<T>(job, cuda::block() - job.all_tiles);
}

template <class T>
__global__ void __launch_bounds__(cuda::kSlimThreads, 2)
    lower_kernel(const __grid_constant__ SlimBackward job) {
  cuda::lower_tile<T>(job, cuda::block());
}

template <class T>
__global__ void __launch_bounds__(cuda::kSlimThreads, 2)
    resist_kernel(const __grid_constant__ SlimBackward job) {
  cuda::resist_block<T>(job, cuda::block());
}

// Blocks of sums over tokens: of w1's gradient, then of w2's.
template <class T>
__host__ __device__ int64_t token_blocks(const cuda::Slim& p) {
  return cuda::parts_of(p.hidden, cuda::kLeft) * cuda::parts_of(p.channels, cuda::kRight<T>);
}

template <class T>
__global__ void __launch_bounds__(cuda::kSlimThreads, 2)
    collect_kernel(const __grid_constant__ SlimBackward job) {
  const int64_t split = cuda::block() % job.splits, part = cuda::block() / job.splits;
  const int64_t begin = split * job.span;
  const int64_t end = begin + job.span < job.rows ? begin + job.span : job.rows;
  const int64_t first = token_blocks<T>(job.slim);
  if (part < first)
    cuda::collect_tokens<T>(job, part, split, begin, end);
  else
    cuda::collect_hidden<T>(job, part - first, split, begin, end);
}

// Adds the splits: blocks for some channels, for numbers of w2, of b1, and one for the scale.
template <class T>
__global__ void __launch_bounds__(cuda::kSlimThreads)
    finish_kernel(const __grid_constant__ SlimBackward job, int64_t across, int64_t down) {
  const cuda::Slim& p = job.slim;
  cuda::Arena arena;
  auto* partial = arena.shared<float>(2 * cuda::kSlimThreads);
  const int64_t weights = p.slots * p.hidden, part = cuda::block();
  if (part < across) {
    cuda::finish_norm<T>(job, part, partial);
  } else if (part < across + down) {
    const int64_t at = (part - across) * cuda::kSlimThreads + cuda::thread();
    if (at < weights)
      cuda::store_number<T>(p.w1, job.grad_w2, at,
                            cuda::added(job.w2_sums + at, job.splits, weights));
  } else if (part < cuda::blocks() - 1) {
    const int64_t h = (part - across - down) * cuda::kSlimThreads + cuda::thread();
    if (h < p.hidden)
      cuda::store_number<T>(p.w1, job.grad_b1, h,
                            cuda::added(job.totals + h, job.splits, p.hidden));
  } else {
    cuda::finish_scale(job, partial);
  }
}

// Deals out the scratch behind `at`.
class Dealer {
 public:
  explicit Dealer(void* scratch) : base_(static_cast<char*>(scratch)) {}
  template <class T>
  T* take(int64_t count) {
    char* part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += cuda::parts_of(count * int64_t{sizeof(T)}, 16) * 16;
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <class T>
SlimBackward job_of(const SlimTokensBackward& q, int64_t& bytes) {
  const SlimTokens& f = q.forward;
  SlimBackward job{};
  cuda::Slim& p = job.slim = cuda::slim_of<T>(f);
  job.rows = p.batch * p.tokens;
  job.width = cuda::parts_of(p.slots, cuda::kSlotPad) * cuda::kSlotPad;
  job.all_tiles = p.batch * p.tiles;
  const int64_t span = cuda::parts_of(job.rows, kSplits);
  job.span =
      cuda::parts_of(span < kSplitTokens ? kSplitTokens : span, cuda::kChunk<T>) * cuda::kChunk<T>;
  job.splits = job.rows == 0 ? 1 : cuda::parts_of(job.rows, job.span);
  Dealer dealer(q.scratch);
  job.weights = dealer.take<T>(job.rows * job.width);
  job.logits = dealer.take<T>(job.rows * job.width);
  job.hidden = dealer.take<T>(job.rows * p.hidden);
  job.projected = f.projected;
  if (f.projected == nullptr) job.projected = job.made = dealer.take<float>(job.rows * p.hidden);
  // A float32 takes the place of the projection where it was.
  const bool in_place = sizeof(T) == 4 && f.projected == nullptr;
  job.changes = in_place ? static_cast<void*>(job.made) : dealer.take<T>(job.rows * p.hidden);
  job.statistics = dealer.take<float>(4 * job.rows);
  job.folded = dealer.take<float>(2 * p.hidden);
  job.sums = dealer.take<float>(4 * job.all_tiles * p.slots);
  job.scale_sums = dealer.take<float>(job.all_tiles);
  job.products = dealer.take<float>(job.splits * p.hidden * p.channels);
  job.totals = dealer.take<float>(job.splits * p.hidden);
  job.w2_sums = dealer.take<float>(job.splits * p.slots * p.hidden);
  bytes = dealer.used();
  job.grad = cuda::operand(q.grad_out, f.dtype, q.grad_slot, p.channels, q.grad_batch);
  job.grad_batch = q.grad_batch;
  job.out = cuda::operand(f.out, f.dtype, p.channels, p.channels);
  job.out_batch = p.slots * p.channels;
  job.lse = f.lse;
  job.grad_x = q.grad_x;
  job.grad_norm_weight = q.grad_norm_weight;
  job.grad_norm_bias = q.grad_norm_bias;
  job.grad_w1 = q.grad_w1;
  job.grad_b1 = q.grad_b1;
  job.grad_w2 = q.grad_w2;
  job.grad_scale = q.grad_scale;
  return job;
}

template <class T>
const char* launch_all(SlimBackward& job, void* stream) {
  cuda::Slim& p = job.slim;
  cuda::hold<T>(p, cuda::shared_bytes<float>(cuda::kSlotBlock));
  const auto go = [&](int64_t blocks, int64_t shared) {
    return cuda::Launch{
        .blocks = blocks, .threads = cuda::kSlimThreads, .shared = shared, .stream = stream};
  };
  const char* error = cuda::launch<spread_kernel<T>>(
      go(job.all_tiles + cuda::parts_of(p.hidden, cuda::kSlimWarps),
         cuda::HiddenMemory<T>::bytes(p) + cuda::shared_bytes<float>(cuda::kSlotBlock)),
      job);
  if (error == nullptr)
    error = cuda::launch<lower_kernel<T>>(go(job.all_tiles, cuda::lower_shared<T>()), job);
  const int64_t across = cuda::parts_of(p.channels, cuda::kRight<T>);
  if (error == nullptr)
    error = cuda::launch<resist_kernel<T>>(
        go(p.batch * cuda::parts_of(p.tokens, cuda::kLeft) * across, cuda::resist_shared<T>()),
        job);
  const int64_t second =
      cuda::parts_of(p.slots, cuda::kLeft) * cuda::parts_of(p.hidden, cuda::kRight<T>);
  if (error == nullptr)
    error = cuda::launch<collect_kernel<T>>(
        go((token_blocks<T>(p) + second) * job.splits, cuda::CollectMemory<T>::bytes()), job);
  if (error != nullptr) return error;
  const int64_t channels = cuda::parts_of(p.channels, cuda::kFinishChannels);
  const int64_t weights = cuda::parts_of(p.slots * p.hidden, cuda::kSlimThreads);
  return cuda::launch<finish_kernel<T>>(
      go(channels + weights + cuda::parts_of(p.hidden, cuda::kSlimThreads) + 1,
         cuda::shared_bytes<float>(2 * cuda::kSlimThreads)),
      job, channels, weights);
}

bool widens(const SlimTokens& p) { return p.dtype != DType::kBFloat16 || p.slots < kFewSlots; }

}  // namespace

int64_t slim_tokens_backward_cuda_scratch(const SlimTokensBackward& p) {
  int64_t bytes = 0;
  if (widens(p.forward))
    job_of<float>(p, bytes);
  else
    job_of<BFloat16>(p, bytes);
  return bytes;
}

const char* slim_tokens_backward_cuda(const SlimTokensBackward& p, void* stream) {
  int64_t bytes = 0;
  if (widens(p.forward)) {
    SlimBackward job = job_of<float>(p, bytes);
    return launch_all<float>(job, stream);
  }
  SlimBackward job = job_of<BFloat16>(p, bytes);
  return launch_all<BFloat16>(job, stream);
}

}  // namespace tk
