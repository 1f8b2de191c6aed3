// accumulate_codes on a GPU: rows are sorted by code, each code's in ascending order, by counting;
// then every code adds up its own, in an order that follows from their number alone: many of them
// in pieces, whose sums the warp that ends last adds up.
#include "cuda/look_back.cuh"
#include "cuda/sum_rows.cuh"
#include "cuda/token_rows.cuh"

namespace tk {
namespace {

// Rows sorted at a time, counts, and sums of pieces: they bound the scratch.
constexpr int64_t kRoundItems = int64_t{1} << 22;
constexpr int64_t kCountRoom = 3 << 20;
constexpr int64_t kPieceRoom = 1 << 20;
constexpr int64_t kMostChunks = 512;
constexpr int64_t kChunkRows = 256;   // at least
constexpr int kInFlight = 4;          // loads that a lane has asked for before it uses the first
constexpr int64_t kPieceRows = 1024;  // at least

struct LongCode {
  int64_t code;
  uint32_t first_piece, pieces;
};

// Rows [first, first + rows) of all groups. A flat code is g·K + k; chunks are ranges of rows.
struct Round {
  int64_t first, rows, chunks, chunk_rows, flat_codes, tiles;
  // A code of more than two pieces of so many rows is added up piece by piece.
  int64_t piece_rows, most_pieces, most_long;
  uint64_t* words;   // (tiles) for the look-back, the ticket, and codes in pieces with these below
  uint32_t* counts;  // (chunks, flat codes): of a chunk; then of the chunks before it
  uint32_t* begins;  // (flat codes + 1) where each code's rows begin in `sorted`
  uint32_t* sorted;  // (rows · G) rows of the round
  LongCode* longs;   // (most_long), their pieces one behind the other
  uint32_t* done;    // (most_long, column blocks) pieces that have been added up
  float* partial;    // (most_pieces, padded columns)
};

int64_t round_rows(const AccumulateCodes& p) {
  const int64_t most = p.groups < kRoundItems ? kRoundItems / p.groups : 1;
  return p.x.rows < most ? p.x.rows : most;
}

// Columns that a warp adds up at a time, 16 bytes in each lane; and the blocks of them in a row.
__host__ __device__ int64_t block_columns(DType dtype) {
  return cuda::kWarp * (dtype == DType::kFloat32 ? 4 : 8);
}

__host__ __device__ int64_t blocks_of(const AccumulateCodes& p) {
  const int64_t columns = block_columns(p.x.dtype);
  return (p.dim + columns - 1) / columns;
}

__host__ __device__ int64_t padded(int64_t columns) { return (columns + 3) / 4 * 4; }

// The most there can be: whole ones, and one more for every code that has more than two.
int64_t pieces_of(const AccumulateCodes& p, const Round& r) {
  return 3 * r.rows * p.groups / (2 * r.piece_rows);
}

Round round_of(const AccumulateCodes& p) {
  Round r{};
  r.flat_codes = p.groups * p.codes;
  r.tiles = (r.flat_codes + cuda::kThreads - 1) / cuda::kThreads;
  r.rows = round_rows(p);
  const int64_t room = r.flat_codes < kCountRoom ? kCountRoom / r.flat_codes : 1;
  const int64_t most = room < kMostChunks ? room : kMostChunks;
  const int64_t each = (r.rows + most - 1) / most;
  r.chunk_rows = each < kChunkRows ? kChunkRows : each;
  r.chunks = (r.rows + r.chunk_rows - 1) / r.chunk_rows;
  r.piece_rows = kPieceRows;
  while (pieces_of(p, r) * padded(p.dim) > kPieceRoom) r.piece_rows *= 2;
  r.most_pieces = pieces_of(p, r);
  r.most_long = r.rows * p.groups / (2 * r.piece_rows);
  char* at = static_cast<char*>(p.scratch);
  r.partial = reinterpret_cast<float*>(at);
  r.longs = reinterpret_cast<LongCode*>(r.partial + r.most_pieces * padded(p.dim));
  r.words = reinterpret_cast<uint64_t*>(r.longs + r.most_long);
  r.counts = reinterpret_cast<uint32_t*>(r.words + r.tiles + 2);
  r.begins = r.counts + r.chunks * r.flat_codes;
  r.sorted = r.begins + r.flat_codes + 1;
  r.done = r.sorted + r.rows * p.groups;
  return r;
}

// The code of a row; −1 where it counts nowhere, which is all that a GPU does about a bad one.
__device__ int32_t code_at(const AccumulateCodes& p, int64_t row, int64_t group) {
  const int64_t code = cuda::load<int64_t, cuda::kReadOnly>(p.index + row * p.groups + group);
  return code >= 0 && code < p.codes ? static_cast<int32_t>(code) : -1;
}

// One block per chunk and group: how many of its rows have each code. Clears what the look-back of
// the next launch needs.
__global__ void __launch_bounds__(cuda::kThreads)
    count_kernel(const __grid_constant__ AccumulateCodes p, const __grid_constant__ Round r) {
  cuda::for_each(r.tiles + 2, [&](int64_t i) { r.words[i] = 0; });
  for (int64_t item = cuda::block(); item < r.chunks * p.groups; item += cuda::blocks()) {
    const int64_t chunk = item / p.groups, group = item % p.groups;
    uint32_t* counts = r.counts + item * p.codes;
    for (int64_t k = cuda::thread(); k < p.codes; k += cuda::threads()) counts[k] = 0;
    cuda::sync();
    const int64_t behind = (chunk + 1) * r.chunk_rows, end = behind < r.rows ? behind : r.rows;
    for (int64_t i = chunk * r.chunk_rows + cuda::thread(); i < end; i += cuda::threads()) {
      const int32_t code = code_at(p, r.first + i, group);
      if (code >= 0) cuda::atomic_add(counts + code, 1u);
    }
  }
}

// Counts of the chunks before each one, for a flat code; returns those of all chunks.
__device__ uint32_t scan_chunks(const Round& r, int64_t code) {
  constexpr int kChunks = 8;
  uint32_t sum = 0;
  for (int64_t chunk = 0; chunk < r.chunks; chunk += kChunks) {
    uint32_t values[kChunks] = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (chunk + i < r.chunks) values[i] = r.counts[(chunk + i) * r.flat_codes + code];
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (chunk + i < r.chunks) r.counts[(chunk + i) * r.flat_codes + code] = sum;
      sum += values[i];
    }
  }
  return sum;
}

// Enters a code in the list of those in pieces. Who comes first has nothing to do with the sums.
__device__ void enter(const AccumulateCodes& p, const Round& r, int64_t code, uint32_t count) {
  const auto pieces = static_cast<uint32_t>((count + r.piece_rows - 1) / r.piece_rows);
  const uint64_t before =
      cuda::atomic_add(r.words + r.tiles + 1, uint64_t{1} << 32 | uint64_t{pieces});
  const auto place = static_cast<int64_t>(before >> 32);
  r.longs[place] = {code, static_cast<uint32_t>(before), pieces};
  const int64_t blocks = blocks_of(p);
  for (int64_t i = 0; i < blocks; ++i) r.done[place * blocks + i] = 0;
}

// One thread per flat code: where its rows begin.
__global__ void __launch_bounds__(cuda::kThreads)
    begin_kernel(const __grid_constant__ AccumulateCodes p, const __grid_constant__ Round r) {
  cuda::Arena arena;
  uint32_t* slot = arena.shared<uint32_t>(1);
  uint32_t* sums = arena.shared<uint32_t>(cuda::kThreads / cuda::kWarp);
  int64_t* before = arena.shared<int64_t>(1);
  const int64_t tile = cuda::ticket(reinterpret_cast<uint32_t*>(r.words + r.tiles), slot);
  const int64_t code = tile * cuda::kThreads + cuda::thread();
  const bool there = code < r.flat_codes;
  const uint32_t count = there ? scan_chunks(r, code) : 0;
  if (there) p.counts[code] = count + (r.first > 0 ? p.counts[code] : 0);
  uint32_t total;
  const uint32_t below = cuda::sum_below(count, sums, total);
  if (cuda::warp() == 0) {
    const int64_t sum = cuda::look_back(r.words, tile, total);
    if (cuda::lane() == 0) *before = sum;
  }
  cuda::sync();
  const uint32_t begin = static_cast<uint32_t>(*before) + below;
  if (there) r.begins[code] = begin;
  if (count > 2 * r.piece_rows) enter(p, r, code, count);
  if (code == r.flat_codes - 1) r.begins[r.flat_codes] = begin + count;
}

// One warp per chunk and group: every row to its place, ascending because the warp goes through
// them in order.
__global__ void __launch_bounds__(cuda::kThreads)
    sort_kernel(const __grid_constant__ AccumulateCodes p, const __grid_constant__ Round r) {
  const int64_t step = cuda::blocks() * cuda::warps(), items = r.chunks * p.groups;
  for (int64_t item = cuda::block() * cuda::warps() + cuda::warp(); item < items; item += step) {
    const int64_t chunk = item / p.groups, group = item % p.groups;
    uint32_t* counts = r.counts + item * p.codes;
    const uint32_t* begins = r.begins + group * p.codes;
    const int64_t behind = (chunk + 1) * r.chunk_rows, end = behind < r.rows ? behind : r.rows;
    for (int64_t row = chunk * r.chunk_rows; row < end; row += kInFlight * cuda::kWarp) {
      int32_t codes[kInFlight];
      uint32_t places[kInFlight];
      cuda::Lanes alike[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t mine = row + i * cuda::kWarp + cuda::lane();
        codes[i] = mine < end ? code_at(p, r.first + mine, group) : -1;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        alike[i] = cuda::match(static_cast<uint32_t>(codes[i]));
        places[i] = 0;
        if (codes[i] >= 0 && cuda::lane() == cuda::lowest_bit(alike[i])) {
          const auto many = static_cast<uint32_t>(cuda::count_bits(alike[i]));
          places[i] = begins[codes[i]] + cuda::atomic_add(counts + codes[i], many);
        }
        cuda::warp_sync();
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const uint32_t first = cuda::shuffle(places[i], cuda::lowest_bit(alike[i]));
        const int below = cuda::count_bits(alike[i] & cuda::lanes_below());
        const auto mine = static_cast<uint32_t>(row + i * cuda::kWarp + cuda::lane());
        if (codes[i] >= 0) r.sorted[first + static_cast<uint32_t>(below)] = mine;
      }
    }
  }
}

// The last code in pieces whose first one is not behind `piece`; a warp together.
__device__ int64_t code_of_piece(const Round& r, int64_t codes, uint32_t piece) {
  int64_t low = 0;
  while (codes - low > 1) {
    const int64_t middle = low + (codes - low) / 2;
    (r.longs[middle].first_piece <= piece ? low : codes) = middle;
  }
  return low;
}

// What a warp adds up: a block of columns, from `d` on, of a code or a piece of it.
struct Task {
  int64_t code, d;
  int begin, end;
  int place;  // of a piece, that of its code in the list; else −1
};

__device__ Task task_of(const AccumulateCodes& p, const Round& r, int64_t item, int64_t pieces,
                        int64_t codes) {
  const int64_t blocks = blocks_of(p), number = item / blocks;
  const int64_t d = (item - number * blocks) * block_columns(p.x.dtype);
  if (number < pieces) {
    const int64_t place = code_of_piece(r, codes, static_cast<uint32_t>(number));
    const LongCode code = r.longs[place];
    const int64_t begin = r.begins[code.code] + (number - code.first_piece) * r.piece_rows;
    const int64_t end = r.begins[code.code + 1], behind = begin + r.piece_rows;
    return {code.code, d, static_cast<int>(begin), static_cast<int>(behind < end ? behind : end),
            static_cast<int>(place)};
  }
  const int64_t code = number - pieces;
  return {code, d, static_cast<int>(r.begins[code]), static_cast<int>(r.begins[code + 1]), -1};
}

// Whether the warp is the last of those that add up this block of columns of a code in pieces.
__device__ bool is_last(const AccumulateCodes& p, const Round& r, const Task& task) {
  uint32_t before = 0;
  cuda::warp_sync();
  if (cuda::lane() == 0) {
    cuda::fence();
    const int64_t block = task.d / block_columns(p.x.dtype);
    before = cuda::atomic_add(r.done + task.place * blocks_of(p) + block, 1u);
    cuda::fence();
  }
  const uint32_t all = cuda::shuffle(before, 0) + 1;
  cuda::warp_sync();  // what lane 0 sees the others see
  return all == r.longs[task.place].pieces;
}

__device__ void sum_pieces(const AccumulateCodes& p, const Round& r, const Task& task) {
  const LongCode code = r.longs[task.place];
  const int64_t stride = padded(p.dim), columns = block_columns(DType::kFloat32);
  const int64_t behind = task.d + block_columns(p.x.dtype), end = behind < p.dim ? behind : p.dim;
#pragma unroll 1
  for (int64_t d = task.d; d < end; d += columns) {
    const float* all = r.partial + code.first_piece * stride + d;
    float* to = p.sums + code.code * p.dim + d;
    cuda::sum_rows<float, true, cuda::kKeep>(
        0, static_cast<int>(code.pieces), end - d < columns ? end - d : columns, 1,
        [=](int i) { return all + i * stride; },
        [=](int64_t column, float sum) { to[column] = r.first > 0 ? to[column] + sum : sum; });
  }
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(cuda::kThreads, kVectors ? 3 : 2)
    sum_kernel(const __grid_constant__ AccumulateCodes p, const __grid_constant__ Round r) {
  const uint64_t entered = r.words[r.tiles + 1];
  const auto pieces = static_cast<int64_t>(entered & UINT32_MAX);
  const int64_t step = cuda::blocks() * cuda::warps();
  const int64_t items = (pieces + r.flat_codes) * blocks_of(p);
#pragma unroll 1
  for (int64_t i = cuda::block() * cuda::warps() + cuda::warp(); i < items; i += step) {
    const Task task = task_of(p, r, i, pieces, static_cast<int64_t>(entered >> 32));
    const bool whole = task.place < 0;
    if (whole && task.end - task.begin > 2 * r.piece_rows) continue;
    const int64_t left = p.dim - task.d, columns = block_columns(p.x.dtype);
    cuda::sum_rows<T, kVectors, cuda::kReadOnly>(
        task.begin, task.end, left < columns ? left : columns, p.x.stride,
        [&](int number) {
          const int64_t at = cuda::offset_of(p.x, r.first + r.sorted[number], task.code / p.codes);
          return static_cast<const T*>(p.x.data) + at + task.d * p.x.stride;
        },
        [&](int64_t column, float sum) {
          float* to = whole ? p.sums + task.code * p.dim + task.d
                            : r.partial + i / blocks_of(p) * padded(p.dim) + task.d;
          to[column] = whole && r.first > 0 ? to[column] + sum : sum;
        });
    if (!whole && is_last(p, r, task)) sum_pieces(p, r, task);
  }
}

// Whether every row begins where 16 bytes may be loaded at once, and ends there.
bool is_aligned(const TokenRows& x, int64_t dim) {
  int64_t places = dim | x.group_stride;
  for (int d = 0; d < x.dims; ++d) places |= x.strides[d];
  const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data));
  return x.stride == 1 && (places * size_of(x.dtype) | at) % 16 == 0;
}

const char* add_round(const AccumulateCodes& p, const Round& r, void* stream) {
  const auto grid = [&](int64_t items, int64_t each) {
    return cuda::Launch{
        .blocks = cuda::blocks_for(items, each), .threads = cuda::kThreads, .stream = stream};
  };
  constexpr int64_t kWarps = cuda::kThreads / cuda::kWarp;
  const int64_t items = r.chunks * p.groups;
  const char* error = cuda::launch<count_kernel>(grid(items > 0 ? items : 1, 1), p, r);
  if (error != nullptr) return error;
  cuda::Launch begins = grid(0, 1);
  begins.blocks = r.tiles;
  begins.shared = cuda::shared_bytes<uint32_t>(1) + cuda::shared_bytes<uint32_t>(kWarps) +
                  cuda::shared_bytes<int64_t>(1);
  error = cuda::launch<begin_kernel>(begins, p, r);
  if (error == nullptr) error = cuda::launch<sort_kernel>(grid(items, kWarps), p, r);
  if (error != nullptr) return error;
  dispatch(p.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const cuda::Launch how = grid((r.flat_codes + r.most_pieces) * blocks_of(p), kWarps);
    error = is_aligned(p.x, p.dim) ? cuda::launch<sum_kernel<T, true>>(how, p, r)
                                   : cuda::launch<sum_kernel<T, false>>(how, p, r);
  });
  return error;
}

}  // namespace

int64_t accumulate_codes_cuda_scratch(const AccumulateCodes& p) {
  if (p.groups == 0) return 0;
  const Round r = round_of(p);
  const int64_t ints = r.chunks * r.flat_codes + r.flat_codes + 1 + r.rows * p.groups +
                       r.most_long * blocks_of(p) + r.most_pieces * padded(p.dim);
  return (r.tiles + 2) * int64_t{sizeof(uint64_t)} + r.most_long * int64_t{sizeof(LongCode)} +
         ints * int64_t{sizeof(uint32_t)};
}

const char* accumulate_codes_cuda(const AccumulateCodes& p, void* stream) {
  if (p.groups == 0) return nullptr;
  Round r = round_of(p);
  const int64_t each = r.rows;
  const char* error = nullptr;
  do {
    r.rows = p.x.rows - r.first < each ? p.x.rows - r.first : each;
    r.chunks = (r.rows + r.chunk_rows - 1) / r.chunk_rows;
    error = add_round(p, r, stream);
    r.first += r.rows;
  } while (error == nullptr && r.first < p.x.rows);
  return error;
}

}  // namespace tk
