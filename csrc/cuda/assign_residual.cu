// assign_residual on a GPU: all codebooks are packed, then one launch takes blocks of tokens
// through all rounds. What is left over of a token stays in shared memory in float32; tokens of
// which a search is not sure, seldom any, are compared with all codes by their own block.
#include "cuda/code_search.cuh"

namespace tk {
namespace {

using cuda::BlockShape;
using cuda::Metric;
using cuda::Numbers;
using cuda::Packed;
using cuda::SearchMemory;

constexpr int kMostThreads = 256;

struct ChainJob {
  AssignResidual p;
  Packed packed;
  bool x_wide;
  BlockShape shape;
  float* rest;  // (blocks, rows of one, rest_stride) where a block has no room for its own, or null
};

// Between two residuals.
__host__ __device__ int rest_stride(int64_t dim) { return static_cast<int>((dim + 7) / 8 * 8 + 4); }

__host__ __device__ int64_t rest_numbers(const Packed& packed, const BlockShape& shape) {
  return int64_t{shape.rows()} * rest_stride(packed.book.dim);
}

// What a block keeps beside a search.
struct ChainMemory {
  SearchMemory search;
  float* rest;  // (rows, rest_stride)
  int32_t *picks, *seconds, *unsure;
  uint32_t* count;  // of unsure
  uint64_t* key;

  __device__ ChainMemory(cuda::Arena& arena, const ChainJob& s)
      : search(arena, s.packed, s.shape),
        picks(arena.shared<int32_t>(s.shape.rows())),
        seconds(arena.shared<int32_t>(s.shape.rows())),
        unsure(arena.shared<int32_t>(s.shape.rows())),
        count(arena.shared<uint32_t>(1)),
        key(arena.shared<uint64_t>(1)) {
    const int64_t count = rest_numbers(s.packed, s.shape);
    rest = s.rest == nullptr ? arena.shared<float>(count) : s.rest + cuda::block() * count;
  }

  static int64_t bytes(const Packed& packed, const BlockShape& shape, bool on_chip) {
    return SearchMemory::bytes(packed, shape) +
           (on_chip ? cuda::shared_bytes<float>(rest_numbers(packed, shape)) : 0) +
           3 * cuda::shared_bytes<int32_t>(shape.rows()) + cuda::shared_bytes<uint32_t>(1) +
           cuda::shared_bytes<uint64_t>(1);
  }
};

__device__ Numbers rest_of(const ChainJob& s, const ChainMemory& memory, int64_t r) {
  const float* rest = memory.rest + r * rest_stride(s.p.codebooks.dim);
  return {rest, DType::kFloat32, 1, true};
}

__device__ Numbers code_of(const ChainJob& s, int64_t round, int64_t code) {
  return cuda::code_at(s.p.codebooks, s.packed.wide, round, code);
}

// The nearest of all codes, by the whole block.
__device__ void compare_exactly(const ChainJob& s, const ChainMemory& memory, int64_t round,
                                int row) {
  if (cuda::thread() == 0) *memory.key = 0;
  cuda::sync();
  const Numbers x = rest_of(s, memory, row);
  uint64_t best = 0;
  for (int64_t k = cuda::thread(); k < s.p.codebooks.codes; k += cuda::threads()) {
    if (!(cuda::terms_of(s.packed, round, k).at[1] > cuda::kNever)) continue;
    const float total = cuda::total_of(x, code_of(s, round, k), s.packed.dim(), true);
    const float score = cuda::score_of(total, Metric::kL2, 1.0f);
    const uint64_t key = score > -cuda::kInfinity ? cuda::key_of(score, k) : 0;
    best = key > best ? key : best;
  }
  best = cuda::warp_max(best);
  if (cuda::lane() == 0 && best != 0) cuda::atomic_max(memory.key, best);
  cuda::sync();
  if (cuda::thread() == 0) memory.picks[row] = static_cast<int32_t>(cuda::code_of(*memory.key));
  cuda::sync();
}

// The better of two codes where there is a choice, exactly; teams take rows.
__device__ void choose(const ChainJob& s, const ChainMemory& memory, int64_t round) {
  for (int r = cuda::thread() / cuda::kTeam; r < s.shape.rows();
       r += cuda::threads() / cuda::kTeam) {
    const int32_t first = memory.picks[r], second = memory.seconds[r];
    const bool choice = second >= 0;
    if (!cuda::any(choice)) continue;
    const Numbers x = rest_of(s, memory, r);
    const int dim = s.packed.dim();
    const float a = cuda::team_total(x, code_of(s, round, first), dim, true, choice);
    const float b = cuda::team_total(x, code_of(s, round, choice ? second : 0), dim, true, choice);
    const float near = cuda::score_of(a, Metric::kL2, 1), other = cuda::score_of(b, Metric::kL2, 1);
    cuda::warp_sync();  // all lanes have read `picks`
    if (choice && cuda::lane() % cuda::kTeam == 0 &&
        (other > near || (other == near && second < first)))
      memory.picks[r] = second;
  }
}

template <class T, int parts>
__device__ void run_round(const ChainJob& s, const ChainMemory& memory, int64_t round,
                          int64_t first, int there) {
  const Packed& packed = s.packed;
  const auto rest = [&](int64_t r) { return rest_of(s, memory, r); };
  if (cuda::thread() == 0) *memory.count = 0;
  cuda::read_bounds(packed, round, memory.search.bounds);
  cuda::pack_tokens<T>(packed, round, s.shape, there, memory.search, rest);
  cuda::search_block<T, parts>(packed, round, 0, packed.count, s.shape, memory.search);
  for (int r = cuda::thread(); r < s.shape.rows(); r += cuda::threads()) {
    const cuda::Verdict verdict =
        verdict_of(memory.search.found[r * s.shape.column_warps], memory.search.windows[r]);
    memory.picks[r] = verdict.first;
    memory.seconds[r] = verdict.sure ? verdict.second : -1;
    if (!verdict.sure) memory.unsure[cuda::atomic_add(memory.count, 1u)] = static_cast<int32_t>(r);
  }
  cuda::sync();
  choose(s, memory, round);
  cuda::sync();
  const auto unsure = static_cast<int>(*memory.count);
  for (int i = 0; i < unsure; ++i) compare_exactly(s, memory, round, memory.unsure[i]);
  const int dim = packed.dim(), stride = rest_stride(dim);
  for (int r = cuda::thread() / cuda::kTeam; r < there; r += cuda::threads() / cuda::kTeam) {
    const int32_t pick = memory.picks[r];
    const Numbers code = code_of(s, round, pick);
    for (int d = cuda::lane() % cuda::kTeam * 8; d < dim; d += cuda::kTeam * 8) {
      float values[8];
      code.eight(d, dim, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) memory.rest[r * stride + d + i] -= values[i];
    }
    if (cuda::lane() % cuda::kTeam == 0)
      s.p.index[(first + r) * s.p.codebooks.groups + round] = pick;
  }
  cuda::sync();
}

template <class T, int parts>
__global__ void __launch_bounds__(kMostThreads) chain_kernel(const __grid_constant__ ChainJob s) {
  cuda::Arena arena;
  const ChainMemory memory(arena, s);
  const int dim = s.packed.dim(), stride = rest_stride(dim), padded = stride - 4;
  const int64_t first = cuda::block() * s.shape.rows(), left = s.p.x.rows - first;
  const int there = static_cast<int>(left < s.shape.rows() ? left : s.shape.rows());
  for (int r = cuda::thread() / cuda::kTeam; r < s.shape.rows();
       r += cuda::threads() / cuda::kTeam) {
    const Numbers x = cuda::token_at(s.p.x, s.x_wide, first + (r < there ? r : 0), 0);
    for (int d = cuda::lane() % cuda::kTeam * 8; d < padded; d += cuda::kTeam * 8) {
      float values[8] = {};
      if (r < there) x.eight(d, dim, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) memory.rest[r * stride + d + i] = values[i];
    }
  }
  cuda::sync();
  for (int64_t round = 0; round < s.p.codebooks.groups; ++round)
    run_round<T, parts>(s, memory, round, first, there);
  for (int i = cuda::thread(); i < there * dim; i += cuda::threads()) {
    const float value = memory.rest[i / dim * stride + i % dim];
    const int64_t at = first * dim + i;
    if (s.p.x.dtype == DType::kFloat32)
      static_cast<float*>(s.p.residual)[at] = value;
    else if (s.p.x.dtype == DType::kFloat16)
      static_cast<Half*>(s.p.residual)[at] = cuda::narrow<Half>(value);
    else
      static_cast<BFloat16*>(s.p.residual)[at] = cuda::narrow<BFloat16>(value);
  }
}

// Blocks that should take the least time: changes no bit of the results.
BlockShape shape_of(const AssignResidual& p, const Packed& packed, bool on_chip) {
  const int64_t places = cuda::multiprocessors(), room = cuda::most_shared();
  BlockShape best{0, 0};
  int64_t least = INT64_MAX;
  for (int row_warps = 8; row_warps > 0; row_warps /= 2) {
    BlockShape shape{row_warps, 8 / row_warps};
    if (row_warps > 1 && p.x.rows <= shape.rows() / 2) continue;
    while (shape.column_warps > 0 && ChainMemory::bytes(packed, shape, on_chip) > room)
      shape.column_warps /= 2;
    if (shape.column_warps == 0) continue;
    const int64_t blocks = (p.x.rows + shape.rows() - 1) / shape.rows();
    const int64_t columns = (packed.count + shape.column_warps - 1) / shape.column_warps;
    const int64_t cost = (blocks + places - 1) / places *
                         cuda::cost_of(shape, columns * packed.chunks * packed.tiles);
    if (cost >= least) continue;
    least = cost;
    best = shape;
  }
  return best;
}

int64_t blocks_of(const ChainJob& s) { return (s.p.x.rows + s.shape.rows() - 1) / s.shape.rows(); }

int64_t plan(ChainJob& s, const AssignResidual& p) {
  s.p = p;
  s.packed = cuda::packed_of(p.codebooks, Metric::kL2, true);
  s.x_wide = cuda::lies_wide(p.x);
  s.shape = shape_of(p, s.packed, true);
  const bool on_chip = s.shape.row_warps > 0;
  if (!on_chip) s.shape = shape_of(p, s.packed, false);
  cuda::ScratchParts parts(p.scratch);
  cuda::take_packed(s.packed, 0, parts);
  if (!on_chip) s.rest = parts.take<float>(blocks_of(s) * rest_numbers(s.packed, s.shape));
  return parts.bytes();
}

}  // namespace

int64_t assign_residual_cuda_scratch(const AssignResidual& p) {
  if (p.x.rows == 0) return 0;
  ChainJob s{};
  return plan(s, p);
}

const char* assign_residual_cuda(const AssignResidual& p, void* stream) {
  if (p.x.rows == 0) return nullptr;
  ChainJob s{};
  plan(s, p);
  if (const char* error = cuda::prepare(s.packed, stream); error != nullptr) return error;
  const cuda::Launch how{.blocks = blocks_of(s),
                         .threads = s.shape.threads(),
                         .shared = ChainMemory::bytes(s.packed, s.shape, s.rest == nullptr),
                         .stream = stream};
  return s.packed.parts == 2 ? cuda::launch<chain_kernel<BFloat16, 2>>(how, s)
                             : cuda::launch<chain_kernel<BFloat16, 1>>(how, s);
}

}  // namespace tk
