// The gradient of gather_topk on a GPU: every row of the input's gradient is written once, from the
// row that was chosen or as zeros; with a fused row a launch before it weighs the dropped tokens.
#include "cuda/rows.cuh"
#include "cuda/values.cuh"

namespace tk {
namespace {

using Fuse = GatherTopk::Fuse;

constexpr int kBlocksEach = 4;                      // of kThreads on one multiprocessor
constexpr int64_t kBytesPerBlock = 16 * 1024;       // that are worth one more block
constexpr int kMapRoom = 8192, kSpreadRoom = 1024;  // rows that a block looks up at a time
constexpr int64_t kMaxChunks = 512;

struct Job {
  GatherTopkBackward p;
  uint32_t parts;   // of the rows of an image
  int room;         // rows that the arena has a place for
  int chunk;        // tokens of an image that one block weighs, a function of N alone
  uint32_t chunks;  // of an image
  int32_t* places;  // (B, N): the gradient's row of a token and one more, 0 where it was dropped
  float* shares;    // (B, N): ⟨x, gradient of the fused row⟩
  float* sums;      // (B, chunks, 2): of the dropped tokens Σ weight, Σ weight · share

  __host__ __device__ int64_t extra() const { return p.prefix + (p.fuse != Fuse::kNone); }
};

// Rows of an image in the gradient; none where its offsets are not those of a forward call.
struct ImageRows {
  int64_t start, first, count;  // first row (−1: none), first entry of the index, chosen tokens
};

__device__ ImageRows rows_of(const Job& job, int64_t image) {
  const GatherTopkBackward& p = job.p;
  const int64_t start = p.offsets[image], end = p.offsets[image + 1];
  const int64_t first = start - image * job.extra(), count = end - start - job.extra();
  const int64_t entries = p.rows - p.batch * job.extra();
  const bool good = start >= 0 && count >= 0 && count <= p.tokens && end <= p.rows && first >= 0 &&
                    first + count <= entries;
  if (!good) return {-1, 0, 0};
  return {start, first, count};
}

// map[i] becomes the row of the gradient that goes to row first + i of the input, and one more; 0
// where none does. All threads call it; it ends with a barrier.
__device__ void find_places(const GatherTopkBackward& p, const ImageRows& rows, int64_t first,
                            int count, int32_t* map) {
  for (int i = cuda::thread(); i < count; i += cuda::threads()) {
    const int64_t row = first + i;
    map[i] = rows.start >= 0 && row < p.prefix ? static_cast<int32_t>(row + 1) : 0;
  }
  cuda::sync();
  for (int64_t i = cuda::thread(); i < rows.count; i += cuda::threads()) {
    const int64_t n = p.index[rows.first + i], at = p.prefix + n - first;
    if (n >= 0 && n < p.tokens && at >= 0 && at < count)
      cuda::atomic_max(&map[at], static_cast<int32_t>(p.prefix + i + 1));
  }
  cuda::sync();
}

__global__ void __launch_bounds__(cuda::kThreads, kBlocksEach)
    scatter_kernel(const __grid_constant__ Job job) {
  const GatherTopkBackward& p = job.p;
  const auto number = static_cast<uint32_t>(cuda::block());
  const uint32_t image = number / job.parts, part = number - image * job.parts;
  cuda::Arena arena;
  auto* map = arena.shared<int32_t>(job.room);
  const ImageRows rows = rows_of(job, image);
  const auto length = static_cast<uint32_t>(p.prefix + p.tokens);
  const int64_t stop = cuda::begin_of(part + 1, length, job.parts);
  for (int64_t first = cuda::begin_of(part, length, job.parts); first < stop; first += job.room) {
    const int count = static_cast<int>(stop - first < job.room ? stop - first : job.room);
    find_places(p, rows, first, count, map);
    for (int t = 0; t < p.tensor_count; ++t) {
      const int64_t bytes = p.tensors[t].channels * (p.tensors[t].dtype == DType::kFloat32 ? 4 : 2);
      const char* from = static_cast<const char*>(p.tensors[t].from) + rows.start * bytes;
      char* to = static_cast<char*>(p.tensors[t].to) + (image * int64_t{length} + first) * bytes;
      const int word = cuda::word_of(cuda::place_of(from) | cuda::place_of(to) | bytes);
      cuda::move_rows(count, bytes, word, cuda::thread(), cuda::threads(),
                      [=](int64_t r) -> cuda::MovedRow {
                        const int32_t row = map[r];
                        return {row == 0 ? nullptr : from + (row - 1) * bytes, to + r * bytes};
                      });
    }
    cuda::sync();
  }
}

// ⟨x, g⟩ by one warp, in all its lanes.
template <class T, bool wide>
__device__ float dot(const T* x, const T* g, int64_t channels) {
  constexpr int64_t kStep = cuda::kWarp * cuda::kPerVector<T>;
  float total = 0;
#pragma unroll(wide ? 4 : 1)
  for (int64_t c = int64_t{cuda::lane()} * cuda::kPerVector<T>; c < channels; c += kStep) {
    const auto a = cuda::load_part<T, wide>(x, c, channels);
    const auto b = cuda::load_part<T, wide>(g, c, channels);
#pragma unroll
    for (int v = 0; v < cuda::kPerVector<T>; ++v)
      total += cuda::widen(a.at[v]) * cuda::widen(b.at[v]);
  }
  return cuda::warp_sum(total);
}

template <class T>
__device__ float dot(const GatherTopkBackward::Tensor& tensor, int64_t x_at, int64_t row) {
  const T* x = static_cast<const T*>(tensor.x) + x_at;
  const T* g = static_cast<const T*>(tensor.from) + row * tensor.channels;
  const int64_t places =
      (tensor.x_batch_stride | tensor.x_token_stride | tensor.channels) * int64_t{sizeof(T)};
  const bool wide =
      cuda::word_of(places | cuda::place_of(tensor.x) | cuda::place_of(tensor.from)) == 16;
  return wide ? dot<T, true>(x, g, tensor.channels) : dot<T, false>(x, g, tensor.channels);
}

// The products of a dropped token with the gradient of the fused row, of all tensors.
__device__ float share_of(const GatherTopkBackward& p, int64_t image, int64_t token, int64_t row) {
  float share = 0;
  for (int t = 0; t < p.tensor_count; ++t) {
    const auto& tensor = p.tensors[t];
    const int64_t at = image * tensor.x_batch_stride + (p.prefix + token) * tensor.x_token_stride;
    share += tensor.dtype == DType::kFloat32   ? dot<float>(tensor, at, row)
             : tensor.dtype == DType::kFloat16 ? dot<Half>(tensor, at, row)
                                               : dot<BFloat16>(tensor, at, row);
  }
  return share;
}

__device__ float weight_of(const GatherTopkBackward& p, int64_t image, int64_t token) {
  return cuda::score_of(p.scores, p.scores_dtype,
                        image * p.scores_batch_stride + token * p.scores_token_stride);
}

__global__ void __launch_bounds__(cuda::kThreads, kBlocksEach - 1)
    weigh_kernel(const __grid_constant__ Job job) {
  const GatherTopkBackward& p = job.p;
  const auto number = static_cast<uint32_t>(cuda::block());
  const uint32_t image = number / job.chunks, chunk = number - image * job.chunks;
  cuda::Arena arena;
  auto* map = arena.shared<int32_t>(job.chunk);
  auto* shares = arena.shared<float>(job.chunk);
  const ImageRows rows = rows_of(job, image);
  const int64_t first = int64_t{chunk} * job.chunk, left = p.tokens - first;
  const int count = static_cast<int>(left < job.chunk ? left : job.chunk);
  find_places(p, rows, p.prefix + first, count, map);
  for (int i = cuda::warp(); i < count; i += cuda::warps()) {
    const bool dropped = map[i] == 0 && rows.start >= 0;
    const float share =
        dropped ? share_of(p, image, first + i, rows.start + p.prefix + rows.count) : 0.0f;
    if (cuda::lane() == 0) shares[i] = share;
  }
  cuda::sync();
  for (int i = cuda::thread(); i < count; i += cuda::threads()) {
    job.places[image * p.tokens + first + i] = map[i];
    job.shares[image * p.tokens + first + i] = shares[i];
  }
  if (cuda::warp() != 0) return;
  float weight = 0, product = 0;
  for (int i = cuda::lane(); i < count; i += cuda::kWarp) {
    if (map[i] != 0) continue;
    const float here = weight_of(p, image, first + i);
    weight += here;
    product += here * shares[i];
  }
  weight = cuda::warp_sum(weight);
  product = cuda::warp_sum(product);
  if (cuda::lane() != 0) return;
  job.sums[2 * number] = weight;
  job.sums[2 * number + 1] = product;
}

// What the weights of an image are divided by, and what is taken off the shares: Σ s and the mean
// share for a mean whose weights do not add up to 0, else 1 and 0.
struct Scale {
  float total, mean;
};

__device__ Scale scale_of(const Job& job, int64_t image) {
  if (job.p.fuse != Fuse::kMean) return {1, 0};
  float weight = 0, product = 0;
  for (uint32_t i = static_cast<uint32_t>(cuda::lane()); i < job.chunks; i += cuda::kWarp) {
    const float* sums = job.sums + 2 * (image * job.chunks + i);
    weight += sums[0];
    product += sums[1];
  }
  weight = cuda::warp_sum(weight);
  product = cuda::warp_sum(product);
  if (weight == 0) return {1, 0};
  return {weight, product / weight};
}

// Rows 0 … rows−1 of `to`: number i is factor[i] times row map[i] − 1 of `from`.
template <class T, int N>
__device__ void spread_rows(const T* from, T* to, int rows, int64_t channels, const int32_t* map,
                            const float* factor) {
  using V = cuda::Vector<T, N>;
  cuda::RowCursor at(channels / N, cuda::thread(), cuda::threads());
  while (at.row < rows) {
    V values[cuda::kWordsInFlight] = {};
    float factors[cuda::kWordsInFlight] = {};
    T* targets[cuda::kWordsInFlight] = {};
#pragma unroll
    for (int i = 0; i < cuda::kWordsInFlight; ++i, at.next()) {
      if (at.row >= rows) continue;
      const int32_t row = map[at.row];
      factors[i] = factor[at.row];
      targets[i] = to + at.row * channels + at.word * N;
      if (row > 0)
        values[i] = cuda::load<V, cuda::kReadOnly>(from + (row - 1) * channels + at.word * N);
    }
#pragma unroll
    for (int i = 0; i < cuda::kWordsInFlight; ++i) {
      if (targets[i] == nullptr) continue;
#pragma unroll
      for (int v = 0; v < N; ++v) {
        if (factors[i] != 1)
          values[i].at[v] = cuda::narrow<T>(cuda::widen(values[i].at[v]) * factors[i]);
      }
      cuda::store<cuda::kStream>(targets[i], values[i]);
    }
  }
}

template <class T>
__device__ void spread_tensor(const GatherTopkBackward::Tensor& tensor, int64_t start, int64_t row,
                              int rows, const int32_t* map, const float* factor) {
  const int64_t channels = tensor.channels;
  if (channels == 0) return;
  const T* from = static_cast<const T*>(tensor.from) + start * channels;
  T* to = static_cast<T*>(tensor.to) + row * channels;
  const bool wide = cuda::word_of(channels * int64_t{sizeof(T)} | cuda::place_of(tensor.from) |
                                  cuda::place_of(tensor.to)) == 16;
  if (wide) {
    spread_rows<T, cuda::kPerVector<T>>(from, to, rows, channels, map, factor);
  } else {
    spread_rows<T, 1>(from, to, rows, channels, map, factor);
  }
}

// Where row first + i of an image comes from and by what it is multiplied, and on the way the
// gradient of its score.
__device__ void look_up(const Job& job, int64_t image, const ImageRows& rows, const Scale& scale,
                        int64_t first, int count, int32_t* map, float* factor) {
  const GatherTopkBackward& p = job.p;
  const auto fused = static_cast<int32_t>(p.prefix + rows.count + 1);
  for (int i = cuda::thread(); i < count; i += cuda::threads()) {
    const int64_t token = first + i - p.prefix, at = image * p.tokens + token;
    int32_t row = static_cast<int32_t>(first + i + 1);
    factor[i] = 1;
    if (token >= 0) {
      row = job.places[at];
      const bool dropped = row == 0;
      if (dropped) {
        row = fused;
        factor[i] = weight_of(p, image, token) / scale.total;
      }
      p.scores_gradient[at] = dropped ? (job.shares[at] - scale.mean) / scale.total : 0.0f;
    }
    map[i] = rows.start >= 0 ? row : 0;
  }
}

__global__ void __launch_bounds__(cuda::kThreads, kBlocksEach)
    spread_kernel(const __grid_constant__ Job job) {
  const GatherTopkBackward& p = job.p;
  const auto number = static_cast<uint32_t>(cuda::block());
  const uint32_t image = number / job.parts, part = number - image * job.parts;
  cuda::Arena arena;
  auto* map = arena.shared<int32_t>(job.room);
  auto* factor = arena.shared<float>(job.room);
  const ImageRows rows = rows_of(job, image);
  const Scale scale = scale_of(job, image);
  const auto length = static_cast<uint32_t>(p.prefix + p.tokens);
  const int64_t stop = cuda::begin_of(part + 1, length, job.parts);
  for (int64_t first = cuda::begin_of(part, length, job.parts); first < stop; first += job.room) {
    const int count = static_cast<int>(stop - first < job.room ? stop - first : job.room);
    look_up(job, image, rows, scale, first, count, map, factor);
    cuda::sync();
    for (int t = 0; t < p.tensor_count; ++t) {
      const auto& tensor = p.tensors[t];
      const int64_t row = image * int64_t{length} + first;
      if (tensor.dtype == DType::kFloat32) {
        spread_tensor<float>(tensor, rows.start, row, count, map, factor);
      } else if (tensor.dtype == DType::kFloat16) {
        spread_tensor<Half>(tensor, rows.start, row, count, map, factor);
      } else {
        spread_tensor<BFloat16>(tensor, rows.start, row, count, map, factor);
      }
    }
    cuda::sync();
  }
}

int chunk_of(const GatherTopkBackward& p) {
  int chunk = 64;
  while (chunk * kMaxChunks < p.tokens) chunk *= 2;
  return chunk;
}

int64_t chunks_of(const GatherTopkBackward& p) {
  return (p.tokens + chunk_of(p) - 1) / chunk_of(p);
}

// As many parts of each image as make blocks enough, each worth its while.
void set_parts(Job& job, int64_t room) {
  const GatherTopkBackward& p = job.p;
  const int64_t rows = p.prefix + p.tokens;
  int64_t bytes = 0;
  for (int t = 0; t < p.tensor_count; ++t)
    bytes += rows * p.tensors[t].channels * size_of(p.tensors[t].dtype);
  const int64_t wanted = 2 * kBlocksEach * cuda::multiprocessors() / p.batch + 1;
  const int64_t useful = bytes / kBytesPerBlock + 1;
  int64_t parts = wanted < useful ? wanted : useful;
  if (parts > rows && rows > 0) parts = rows;
  job.parts = static_cast<uint32_t>(parts);
  const int64_t each = rows / parts + 1;
  job.room = static_cast<int>(each < room ? each : room);
}

}  // namespace

int64_t gather_topk_backward_cuda_scratch(const GatherTopkBackward& p) {
  return p.fuse == Fuse::kNone ? 0 : p.batch * (p.tokens * 8 + chunks_of(p) * 8);
}

const char* gather_topk_backward_cuda(const GatherTopkBackward& p, void* stream) {
  if (p.batch == 0) return nullptr;
  Job job{};
  job.p = p;
  const bool fused = p.fuse != Fuse::kNone;
  set_parts(job, fused ? kSpreadRoom : kMapRoom);
  const int64_t map = cuda::shared_bytes<int32_t>(job.room);
  cuda::Launch how{
      .blocks = p.batch * job.parts, .threads = cuda::kThreads, .shared = map, .stream = stream};
  if (!fused) return cuda::launch<scatter_kernel>(how, job);
  job.chunk = chunk_of(p);
  job.chunks = static_cast<uint32_t>(chunks_of(p));
  job.places = static_cast<int32_t*>(p.scratch);
  job.shares = reinterpret_cast<float*>(job.places + p.batch * p.tokens);
  job.sums = job.shares + p.batch * p.tokens;
  const int64_t shared =
      cuda::shared_bytes<int32_t>(job.chunk) + cuda::shared_bytes<float>(job.chunk);
  const char* error = cuda::launch<weigh_kernel>({.blocks = p.batch * job.chunks,
                                                  .threads = cuda::kThreads,
                                                  .shared = shared,
                                                  .stream = stream},
                                                 job);
  how.shared = map + cuda::shared_bytes<float>(job.room);
  return error != nullptr ? error : cuda::launch<spread_kernel>(how, job);
}

}  // namespace tk
