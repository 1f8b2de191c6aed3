// assign_nearest on a GPU: codes are packed, then searched on the tensor cores; tokens of which the
// search is not sure, seldom any, are compared with all codes exactly by a third launch. Up to two
// dimensions, where many codes lie too close to tell, that launch does all.
#include "cuda/nearest_exact.cuh"
#include "cuda/search_hopper.cuh"

namespace tk {
namespace {

using cuda::BlockShape;
using cuda::Found;
using cuda::GroupProducts;
using cuda::NearestJob;
using cuda::Packed;
using cuda::SearchMemory;

constexpr int kMostThreads = 256;  // of a block of the search
constexpr int64_t kDirectDim = 2;

// What the splits of a block of tokens found, put together by the last of them to get here.
__device__ bool join_splits(const NearestJob& s, int64_t number, int64_t split, Found* found,
                            int* last) {
  const int rows = s.shape.rows(), stride = s.shape.column_warps;
  Found* mine = s.partial + (number * s.splits + split) * rows;
  for (int r = cuda::thread(); r < rows; r += cuda::threads()) mine[r] = found[r * stride];
  cuda::fence();
  cuda::sync();
  if (cuda::thread() == 0)
    *last = cuda::atomic_add(s.tickets + number, 1u) == static_cast<uint32_t>(s.splits - 1);
  cuda::sync();
  if (*last == 0) return false;
  cuda::fence();
  for (int r = cuda::thread(); r < rows; r += cuda::threads()) {
    Found all;
    for (int other = 0; other < s.splits; ++other) {
      const auto* from =
          reinterpret_cast<const uint32_t*>(s.partial + (number * s.splits + other) * rows + r);
      uint32_t words[sizeof(Found) / 4];
      for (int w = 0; w < static_cast<int>(sizeof(Found) / 4); ++w)
        words[w] = cuda::load_relaxed(from + w);
      Found part;
      memcpy(&part, words, sizeof part);
      all.join(part);
    }
    found[r * stride] = all;
  }
  return true;
}

// A block of tokens of one group against one split of its codes.
template <class T, int parts, bool by_groups>
__device__ void search_tokens(const NearestJob& s) {
  const AssignNearest& p = s.p;
  cuda::Arena arena;
  const SearchMemory memory(arena, s.packed, s.shape);
  const int rows = s.shape.rows();
  auto* picks = arena.shared<int32_t>(rows);
  auto* seconds = arena.shared<int32_t>(rows);
  auto* last = arena.shared<int>(1);
  const int64_t row_block = cuda::block() % s.row_blocks;
  const int64_t split = cuda::block() / s.row_blocks % s.splits;
  const int64_t group = cuda::block() / (s.row_blocks * s.splits);
  const int64_t first = row_block * rows, left = p.x.rows - first,
                there = left < rows ? left : rows;
  const auto token = [&](int64_t r) { return cuda::token_at(p.x, s.x_wide, first + r, group); };
  cuda::read_bounds(s.packed, group, memory.bounds);
  cuda::pack_tokens<T>(s.packed, group, s.shape, there, memory, token);
  const int64_t begin = split * s.each, behind = begin + s.each;
  const int64_t end = behind < s.packed.count ? behind : s.packed.count;
  if constexpr (by_groups)
    cuda::search_block_by_groups<T, parts>(s.packed, group, begin, end, s.shape, memory);
  else
    cuda::search_block<T, parts>(s.packed, group, begin, end, s.shape, memory);
  if (s.splits > 1 && !join_splits(s, group * s.row_blocks + row_block, split, memory.found, last))
    return;
  for (int r = cuda::thread(); r < there; r += cuda::threads()) {
    const cuda::Verdict verdict =
        verdict_of(memory.found[r * s.shape.column_warps], memory.windows[r]);
    picks[r] = verdict.sure ? verdict.first : -1;
    seconds[r] = verdict.second;
    if (verdict.sure) continue;
    const uint32_t place = cuda::atomic_add(s.listed + group, 1u);
    s.list[group * p.x.rows + place] = static_cast<uint32_t>(first + r);
    p.index[s.at(group, first + r)] = 0;  // the key of none
  }
  cuda::sync();
  finish(s, group, static_cast<int>(there), picks, seconds, [&](int r) { return first + r; });
}

template <class T, int parts, bool by_groups>
__global__ void __launch_bounds__(kMostThreads)
    search_kernel(const __grid_constant__ NearestJob s) {
  if constexpr (!by_groups || cuda::kGroupProducts) search_tokens<T, parts, by_groups>(s);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t search_bytes(const Packed& packed, const BlockShape& shape) {
  return SearchMemory::bytes(packed, shape) + 2 * cuda::shared_bytes<int32_t>(shape.rows()) +
         cuda::shared_bytes<int>(1);
}

// How tokens and codes are cut: what should take the least time, in steps of a warp, with as many
// splits as fill all multiprocessors once, twice or three times. It changes no bit of the results.
void choose_shape(NearestJob& s) {
  const int64_t places = cuda::multiprocessors(), room = cuda::most_shared();
  const int64_t count = s.packed.count;
  int64_t least = INT64_MAX;
  for (int row_warps = 8; row_warps > 0; row_warps /= 2) {
    BlockShape shape{row_warps, 8 / row_warps};
    if (row_warps > 1 && s.p.x.rows <= shape.rows() / 2) continue;
    while (shape.column_warps > 0 && search_bytes(s.packed, shape) > room) shape.column_warps /= 2;
    if (shape.column_warps == 0) continue;
    const int64_t row_blocks = ceil_div(s.p.x.rows, shape.rows());
    const int64_t blocks = row_blocks * s.p.codebook.groups;
    for (int64_t waves = 0; waves <= 3; ++waves) {
      const int64_t wanted = waves * places / blocks, most = wanted < count ? wanted : count;
      const int64_t each = ceil_div(count, most > 1 ? most : 1), splits = ceil_div(count, each);
      const int64_t steps = ceil_div(each, shape.column_warps) * s.packed.chunks * s.packed.tiles;
      const int64_t cost = ceil_div(blocks * splits, places) * cuda::cost_of(shape, steps);
      if (cost >= least) continue;
      least = cost;
      s.shape = shape;
      s.splits = static_cast<int>(splits);
      s.each = each;
      s.row_blocks = row_blocks;
    }
  }
}

// Groups instead (search_hopper.cuh), where that should be faster by a fifth. That changes no bit
// of the results either.
void choose_groups(NearestJob& s) {
  const int64_t rows = s.p.x.rows, room = cuda::most_shared(), places = cuda::multiprocessors();
  const BlockShape shape = cuda::group_shape(
      s.packed, [&](const BlockShape& tried) { return search_bytes(s.packed, tried) <= room; });
  const auto wanted = shape.stages > 0 ? cuda::group_products() : GroupProducts::kNowhere;
  if (wanted == GroupProducts::kNowhere) return;
  const int64_t row_blocks = ceil_div(rows, shape.rows());
  const int64_t blocks = row_blocks * s.p.codebook.groups, count = s.packed.count;
  const auto cost = [&](int64_t all, const BlockShape& cut, int64_t columns) {
    return ceil_div(all, places) * cuda::cost_of_block(s.packed, cut, columns);
  };
  int64_t least = cost(s.row_blocks * s.p.codebook.groups * s.splits, s.shape, s.each) * 5 / 6;
  if (wanted == GroupProducts::kWherever) least = INT64_MAX;
  for (int64_t waves = 0; waves <= 3; ++waves) {
    const int64_t parts = waves * places / blocks, most = parts < count ? parts : count;
    const int64_t each = cuda::whole_stages(ceil_div(count, most > 1 ? most : 1));
    const int64_t splits = ceil_div(count, each), wanted_cost = cost(blocks * splits, shape, each);
    if (wanted_cost >= least) continue;
    least = wanted_cost;
    s.shape = shape;
    s.splits = static_cast<int>(splits);
    s.each = each;
    s.row_blocks = row_blocks;
  }
}

// Everything that follows from shapes, and where scratch lies; returns its bytes.
int64_t plan(NearestJob& s, const AssignNearest& p) {
  s.p = p;
  s.packed = cuda::packed_of(p.codebook, p.metric, false);
  s.x_wide = cuda::lies_wide(p.x);
  s.direct = p.codebook.dim <= kDirectDim;
  const int64_t groups = p.codebook.groups;
  s.chunks = ceil_div(p.x.rows, cuda::kFewRows);
  choose_shape(s);
  choose_groups(s);
  const int64_t tickets = groups * s.row_blocks;
  cuda::ScratchParts parts(p.scratch);
  cuda::take_packed(s.packed, tickets + groups + groups * s.chunks, parts);
  s.tickets = s.packed.cleared[0];
  s.listed = s.tickets + tickets;
  s.done = s.listed + groups;
  s.list = parts.take<uint32_t>(s.direct ? 0 : groups * p.x.rows);
  s.partial =
      parts.take<Found>(s.splits > 1 && !s.direct ? tickets * s.splits * s.shape.rows() : 0);
  if (s.direct) {
    s.packed.cleared[1] = reinterpret_cast<uint32_t*>(p.index);
    s.packed.cleared_count[1] = groups * p.x.rows * 2;
  }
  return parts.bytes();
}

template <bool by_groups>
const char* launch_search(const NearestJob& s, const cuda::Launch& how) {
  if (s.packed.parts == 2) return cuda::launch<search_kernel<BFloat16, 2, by_groups>>(how, s);
  if (s.packed.rounded && s.p.codebook.dtype == DType::kFloat16)
    return cuda::launch<search_kernel<Half, 1, by_groups>>(how, s);
  return cuda::launch<search_kernel<BFloat16, 1, by_groups>>(how, s);
}

const char* search(const NearestJob& s, void* stream) {
  const cuda::Launch how{.blocks = s.row_blocks * s.splits * s.p.codebook.groups,
                         .threads = s.shape.threads(),
                         .shared = search_bytes(s.packed, s.shape),
                         .stream = stream};
  return s.shape.stages > 0 ? launch_search<true>(s, how) : launch_search<false>(s, how);
}

}  // namespace

int64_t assign_nearest_cuda_scratch(const AssignNearest& p) {
  if (p.x.rows == 0 || p.codebook.groups == 0) return 0;
  NearestJob s{};
  return plan(s, p);
}

const char* assign_nearest_cuda(const AssignNearest& p, void* stream) {
  if (p.x.rows == 0 || p.codebook.groups == 0) return nullptr;
  if (p.x.rows >> 32 != 0) return "x: more than 2^32 tokens";
  NearestJob s{};
  plan(s, p);
  if (p.codes != nullptr && p.codebook.stride == 1) {
    const Codebooks& book = p.codebook;
    const int64_t places = book.dim | book.code_stride | book.group_stride;
    s.word = cuda::word_of(places * size_of(book.dtype) |
                           static_cast<int64_t>(reinterpret_cast<uintptr_t>(book.data)) |
                           static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.codes)));
  }
  const char* error = cuda::prepare(s.packed, stream);
  if (error == nullptr && !s.direct) error = search(s, stream);
  if (error != nullptr) return error;
  return cuda::launch<cuda::exact_kernel>({.blocks = cuda::kExactBlocks * cuda::multiprocessors(),
                                           .threads = cuda::kExactThreads,
                                           .shared = cuda::ExactMemory::bytes(p.codebook.dim),
                                           .stream = stream},
                                          s);
}

}  // namespace tk
