// accumulate_codes on a GPU: rows are sorted by code, each code's in ascending order, by counting;
// then every code adds up its own, in an order that follows from their number alone.
#include "cuda/look_back.cuh"

namespace tk {
namespace {

constexpr int64_t kRoundItems = int64_t{1} << 22;  // are sorted at a time: bounds the scratch
constexpr int64_t kMostChunks = 512;
constexpr int64_t kChunkRows = 256;  // at least
constexpr int kInFlight = 4;         // loads that a lane has asked for before it uses the first

// Rows [first, first + rows) of all groups. A flat code is g·K + k; chunks are ranges of rows.
struct Round {
  int64_t first, rows, chunks, chunk_rows, flat_codes, tiles;
  uint64_t* words;   // (tiles) for the look-back, and the ticket
  uint32_t* counts;  // (chunks, flat codes): of a chunk; then of the chunks before it
  uint32_t* begins;  // (flat codes + 1) where each code's rows begin in `sorted`
  uint32_t* sorted;  // (rows · G) rows of the round
};

int64_t round_rows(const AccumulateCodes& p) {
  const int64_t most = p.groups < kRoundItems ? kRoundItems / p.groups : 1;
  return p.x.rows < most ? p.x.rows : most;
}

Round round_of(const AccumulateCodes& p) {
  Round r{};
  r.flat_codes = p.groups * p.codes;
  r.tiles = (r.flat_codes + cuda::kThreads - 1) / cuda::kThreads;
  r.rows = round_rows(p);
  const int64_t room = r.flat_codes < kRoundItems ? kRoundItems / r.flat_codes : 1;
  const int64_t most = room < kMostChunks ? room : kMostChunks;
  const int64_t each = (r.rows + most - 1) / most;
  r.chunk_rows = each < kChunkRows ? kChunkRows : each;
  r.chunks = (r.rows + r.chunk_rows - 1) / r.chunk_rows;
  char* at = static_cast<char*>(p.scratch);
  r.words = reinterpret_cast<uint64_t*>(at);
  at += (r.tiles + 1) * int64_t{sizeof(uint64_t)};
  r.counts = reinterpret_cast<uint32_t*>(at);
  r.begins = r.counts + r.chunks * r.flat_codes;
  r.sorted = r.begins + r.flat_codes + 1;
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
  cuda::for_each(r.tiles + 1, [&](int64_t i) { r.words[i] = 0; });
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

__device__ int64_t offset_of(const TokenRows& x, int64_t row, int64_t group) {
  int64_t offset = group * x.group_stride;
#pragma unroll 1
  for (int d = x.dims - 1; d > 0; --d) {
    const int64_t rest = row / x.sizes[d];
    offset += (row - rest * x.sizes[d]) * x.strides[d];
    row = rest;
  }
  return x.dims > 0 ? offset + row * x.strides[0] : offset;
}

// One warp per flat code. Teams of `span` lanes take row after row, 16 bytes of it each, then the
// teams are added up: the same lanes in the same order, whatever the alignment.
template <class T, bool kVectors>
__global__ void __launch_bounds__(cuda::kThreads)
    sum_kernel(const __grid_constant__ AccumulateCodes p, const __grid_constant__ Round r) {
  constexpr int kWide = 16 / sizeof(T);
  using V = cuda::Vector<T, kWide>;
  int span = 1;
  while (span < cuda::kWarp && int64_t{span} * kWide < p.dim) span *= 2;
  const int teams = cuda::kWarp / span, team = cuda::lane() / span;
  const int64_t mine = int64_t{cuda::lane() % span} * kWide;
  const int64_t step = cuda::blocks() * cuda::warps();
  for (int64_t code = cuda::block() * cuda::warps() + cuda::warp(); code < r.flat_codes;
       code += step) {
    const int64_t group = code / p.codes, begin = r.begins[code], end = r.begins[code + 1];
    for (int64_t d = 0; d < p.dim; d += int64_t{span} * kWide) {
      float sums[kWide] = {};
      for (int64_t i = begin + team; i < end; i += int64_t{kInFlight} * teams) {
        V values[kInFlight] = {};
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int64_t number = i + int64_t{j} * teams;
          if (number >= end || d + mine >= p.dim) continue;
          const int64_t at = offset_of(p.x, r.first + r.sorted[number], group);
          const T* from = static_cast<const T*>(p.x.data) + at + (d + mine) * p.x.stride;
          if constexpr (kVectors) {
            values[j] = cuda::load<V, cuda::kReadOnly>(from);
          } else {
#pragma unroll
            for (int w = 0; w < kWide; ++w) {
              if (d + mine + w < p.dim)
                values[j].at[w] = cuda::load<T, cuda::kReadOnly>(from + w * p.x.stride);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
          for (int w = 0; w < kWide; ++w) sums[w] += cuda::widen(values[j].at[w]);
        }
      }
      float* to = p.sums + code * p.dim + d + mine;
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        for (int with = span; with < cuda::kWarp; with *= 2)
          sums[w] += cuda::shuffle_xor(sums[w], with);
        if (team == 0 && d + mine + w < p.dim) to[w] = r.first > 0 ? to[w] + sums[w] : sums[w];
      }
    }
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
    const cuda::Launch how = grid(r.flat_codes, kWarps);
    error = is_aligned(p.x, p.dim) ? cuda::launch<sum_kernel<T, true>>(how, p, r)
                                   : cuda::launch<sum_kernel<T, false>>(how, p, r);
  });
  return error;
}

}  // namespace

int64_t accumulate_codes_cuda_scratch(const AccumulateCodes& p) {
  if (p.groups == 0) return 0;
  const Round r = round_of(p);
  const int64_t ints = r.chunks * r.flat_codes + r.flat_codes + 1 + r.rows * p.groups;
  return (r.tiles + 1) * int64_t{sizeof(uint64_t)} + ints * int64_t{sizeof(uint32_t)};
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
