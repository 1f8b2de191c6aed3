// Codebooks packed for the tensor cores: every vector centred and cut into parts of 16 bits, in
// images that are copied into shared memory as they lie.
//
// An image has 64 rows of 128 bytes, of which the 16-byte units are exchanged so that eight
// neighbouring rows lie in different banks (unit u of row r stands at u ^ r % 8, as wgmma's
// 128-byte swizzle has it). A tile of 64 codes takes `chunks` images one after the other, 64
// components each in one part, or 32 first and 32 second parts; of few components several tiles
// share an image. Behind the last image of a tile stand factor and bias of its codes: a score is
// product · factor + bias.
//
// In one part are components of 16 bits as they came (centred where that costs nothing). float32
// goes in two parts of bfloat16, of whose products three are taken; of few components the three lie
// side by side, (e₁, e₂, e₁) against (x₁, x₁, x₂), as one part of thrice as many.
#pragma once

#include "cuda/codes.cuh"

namespace tk::cuda {

constexpr int kImageRows = 64, kRowBytes = 128;
constexpr int64_t kImageBytes = int64_t{kImageRows} * kRowBytes;
constexpr int kSlot = 16;      // terms that a multiply_add sums
constexpr int kPrepared = 32;  // codes of a block of prepare_kernel
constexpr int kCentreCodes = 64;
constexpr int64_t kAlignment = 1024;  // of an image

struct Packed {
  Codebooks book;
  Metric metric;
  bool wide;      // codes can be read 16 bytes at a time
  bool rounded;   // centred only where that leaves numbers of 16 bits
  int parts;      // 1 or 2
  bool joined;    // three products side by side in one part
  int slots;      // of 16 terms in a code
  int chunks;     // images of a tile
  int tiles;      // of an image; more than one only where chunks is 1
  int64_t count;  // of images side by side: 64·tiles codes each
  char* images;   // (G, count, chunks images and 64·tiles pairs of factor and bias)
  float* centre;  // (G, kMostDim)
  float* bounds;  // (G, prepared, 4) the largest length, rest and second part of a block's codes
  uint32_t* cleared[2];  // (cleared_count) words that the next launch finds 0
  int64_t cleared_count[2];

  __host__ __device__ int codes_of_image() const { return kImageRows * tiles; }
  __host__ __device__ int64_t term_bytes() const { return codes_of_image() * int64_t{8}; }
  __host__ __device__ int64_t column_bytes() const { return chunks * kImageBytes + term_bytes(); }
  __host__ __device__ int64_t prepared() const { return count * codes_of_image() / kPrepared; }
  __host__ __device__ int slots_of_chunk() const { return parts == 2 ? 2 : 4; }
  __host__ __device__ int dim() const { return static_cast<int>(book.dim); }
  __device__ char* column(int64_t group, int64_t number) const {
    return images + (group * count + number) * column_bytes();
  }
  __device__ const float* terms(int64_t group, int64_t number) const {
    return reinterpret_cast<const float*>(column(group, number) + chunks * kImageBytes);
  }
};

// Factor and bias of a code.
__device__ inline Vector<float, 2> terms_of(const Packed& p, int64_t group, int64_t code) {
  const int64_t each = p.codes_of_image();
  return load<Vector<float, 2>>(p.terms(group, code / each) + code % each * 2);
}

// How codebooks are packed: `chained` where tokens are float32 whatever they came as.
inline Packed packed_of(const Codebooks& book, Metric metric, bool chained) {
  Packed p{};
  p.book = book;
  p.metric = metric;
  p.wide = lies_wide(book);
  const bool whole = chained || book.dtype == DType::kFloat32;
  p.rounded = !whole;
  p.joined = whole && 3 * book.dim <= 4 * kSlot;
  p.parts = whole && !p.joined ? 2 : 1;
  const int terms = (p.joined ? 3 : 1) * p.dim();
  p.slots = (terms + kSlot - 1) / kSlot;
  p.chunks = (p.slots + p.slots_of_chunk() - 1) / p.slots_of_chunk();
  p.tiles = p.chunks > 1 ? 1 : p.slots_of_chunk() / p.slots;
  p.count = (book.codes + p.codes_of_image() - 1) / p.codes_of_image();
  return p;
}

// Parts of the scratch memory, each at a multiple of kAlignment.
class ScratchParts {
 public:
  explicit ScratchParts(void* base) : base_(static_cast<char*>(base)) {
    const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base));
    at_ = (kAlignment - at % kAlignment) % kAlignment;
  }

  template <class V>
  V* take(int64_t count) {
    V* part = reinterpret_cast<V*>(base_ + at_);
    at_ += (count * int64_t{sizeof(V)} + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }
  int64_t bytes() const { return at_ + kAlignment; }

 private:
  char* base_;
  int64_t at_;
};

inline void take_packed(Packed& p, int64_t counters, ScratchParts& parts) {
  p.images = parts.take<char>(p.book.groups * p.count * p.column_bytes());
  p.centre = parts.take<float>(p.book.groups * kMostDim);
  p.bounds = parts.take<float>(p.book.groups * p.prepared() * 4);
  p.cleared[0] = parts.take<uint32_t>(counters);
  p.cleared_count[0] = counters;
}

// The nearest number of 16 bits; beyond float16 its largest.
template <class T>
__device__ T nearest(float x) {
  return narrow<T>(x);
}
template <>
__device__ inline Half nearest<Half>(float x) {
  return narrow<Half>(larger(smaller(x, 65504.0f), -65504.0f));
}

// Squares of the lengths of a vector, of its second part, of what its parts leave over.
struct Lengths {
  float whole = 0, second = 0, left = 0;
};

__device__ inline float team_sum(float value) {
  for (int step = kTeam / 2; step > 0; step /= 2) value += shuffle_xor(value, step);
  return value;
}

// First and second part of a number; what they leave over is added to `lengths`.
template <class T>
__device__ void cut(float x, bool twice, T (&parts)[2], Lengths& lengths) {
  lengths.whole = fused(x, x, lengths.whole);
  parts[0] = nearest<T>(x);
  x -= widen(parts[0]);
  if (twice) {
    lengths.second = fused(x, x, lengths.second);
    parts[1] = nearest<T>(x);
    x -= widen(parts[1]);
  }
  lengths.left = fused(x, x, lengths.left);
}

// Packs one vector per team into a row of the images. eight(d, values) gives components d … d+7,
// place(chunk, unit) says where a unit of the row stands; the vector's own begin at `first_unit`.
template <class T, class Eight, class Place>
__device__ Lengths pack_vector(const Packed& p, bool is_code, int first_unit, const Eight& eight,
                               const Place& place) {
  const int mine = lane() % kTeam, dim = p.dim();
  Lengths lengths;
  if (p.joined) {
    const auto put = [&](int at, uint16_t bits) {
      store(place(0, first_unit + at / 8) + at % 8 * 2, bits);
    };
    for (int d = mine; d < dim; d += kTeam) {
      float values[8], value = 0;
      T parts[2];
      eight(d - d % 8, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) value = d % 8 == i ? values[i] : value;
      cut(value, true, parts, lengths);
      put(d, parts[0].bits);
      put(d + dim, is_code ? parts[1].bits : parts[0].bits);
      put(d + 2 * dim, is_code ? parts[0].bits : parts[1].bits);
    }
    for (int at = 3 * dim + mine; at < p.slots * kSlot; at += kTeam) put(at, 0);
  } else {
    const int across = p.parts == 2 ? 4 : 8;  // units of components in a row
    for (int unit = mine; unit < 2 * p.slots; unit += kTeam) {
      float values[8];
      Vector<uint16_t, 8> numbers[2];
      eight(unit * 8, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        T parts[2];
        cut(values[i], p.parts == 2, parts, lengths);
        numbers[0].at[i] = parts[0].bits;
        if (p.parts == 2) numbers[1].at[i] = parts[1].bits;
      }
      store(place(unit / across, first_unit + unit % across), numbers[0]);
      if (p.parts == 2) store(place(unit / across, 4 + unit % across), numbers[1]);
    }
  }
  return {team_sum(lengths.whole), team_sum(lengths.second), team_sum(lengths.left)};
}

__device__ inline int64_t place_in_image(int row, int unit) {
  return row * int64_t{kRowBytes} + ((unit ^ row % 8) * 16);
}

// The i-th of evenly spaced codes.
__device__ inline int64_t spaced_code(const Packed& p, int64_t i) {
  return p.book.codes < kCentreCodes ? i : i * p.book.codes / kCentreCodes;
}

__device__ inline int64_t spaced_codes(const Packed& p) {
  return p.book.codes < kCentreCodes ? p.book.codes : kCentreCodes;
}

// Component d of the mean of 64 evenly spaced codes, as far as they are finite. Where numbers are
// to stay numbers of 16 bits: only if it lies far from 0 beside how the codes vary, and rounded;
// then most differences to it are exact, as the numbers themselves are.
__device__ inline float find_centre(const Packed& p, int64_t group, int d) {
  if (p.metric != Metric::kL2 || d >= p.dim()) return 0;
  const int64_t count = spaced_codes(p);
  float sum = 0, seen = 0, apart = 0;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) {
    const float e = code_at(p.book, false, group, spaced_code(p, i)).one(d);
    sum += is_finite(e) ? e : 0.0f;
    seen += is_finite(e) ? 1.0f : 0.0f;
  }
  float mean = sum / larger(seen, 1.0f);
  if (p.rounded) {
    for (int64_t i = 0; i < count; ++i) {
      const float e = code_at(p.book, false, group, spaced_code(p, i)).one(d);
      apart = is_finite(e) ? fused(e - mean, e - mean, apart) : apart;
    }
    const bool far = mean * mean * seen > 16.0f * apart;
    const float near = p.book.dtype == DType::kFloat16 ? widen(nearest<Half>(mean))
                                                       : widen(nearest<BFloat16>(mean));
    mean = far ? near : 0.0f;
  }
  return is_finite(mean) ? mean : 0.0f;
}

// Whether one of the evenly spaced codes, whose first components are `firsts`, equals this one and
// comes before it. Such a code is never chosen; without it, codes that are all one, or not yet
// used, leave no doubt which is the nearest. Asked of each lane of a team for its share.
__device__ inline bool seen_before(const Packed& p, int64_t group, int64_t code,
                                   const Numbers& numbers, const float* firsts) {
  const float first = numbers.one(0);
  for (int64_t i = lane() % kTeam; i < spaced_codes(p); i += kTeam) {
    const int64_t other = spaced_code(p, i);
    if (other >= code) return false;
    if (firsts[i] != first) continue;
    const Numbers before = code_at(p.book, p.wide, group, other);
    int d = 1;
    while (d < p.dim() && before.one(d) == numbers.one(d)) ++d;
    if (d == p.dim()) return true;
  }
  return false;
}

// Packs 32 codes; notes how long they are, and what the parts leave over.
template <class T>
__device__ void prepare_codes(const Packed& p, int64_t group, int64_t first, const float* centre,
                              const float* firsts, float* found) {
  const int64_t code = first + thread() / kTeam, image = code / p.codes_of_image();
  const int within = static_cast<int>(code % p.codes_of_image());
  const int row = within % kImageRows, dim = p.dim();
  char* column = p.column(group, image);
  const bool there = code < p.book.codes;
  const Numbers numbers = code_at(p.book, p.wide, group, there ? code : 0);
  bool whole = there;
  const Lengths squares = pack_vector<T>(
      p, true, within / kImageRows * 2 * p.slots,
      [&](int d, float (&values)[8]) {
        numbers.eight(d, dim, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          whole = whole && is_finite(values[i]);
          values[i] -= centre[d + i];
          if (!there || !is_finite(values[i])) values[i] = 0;
        }
      },
      [&](int chunk, int unit) {
        return column + chunk * kImageBytes + place_in_image(row, unit);
      });
  const Lanes team = (Lanes{1} << kTeam) - 1, shift = static_cast<Lanes>(lane() / kTeam * kTeam);
  const bool all_whole = (ballot(whole) >> shift & team) == team;
  const bool seen = there && seen_before(p, group, code, numbers, firsts);
  const bool needed = (ballot(seen) >> shift & team) == 0;
  const bool l2 = p.metric == Metric::kL2, cosine = p.metric == Metric::kCosine;
  float factor = 1, bias = l2 ? -0.5f * squares.whole : 0.0f;
  if (cosine) factor = 1.0f / larger(sqrtf(squares.whole), 1e-12f);
  const bool usable = all_whole && needed && bias > kNever && is_finite(squares.whole);
  if (!usable) factor = 0, bias = kNever;  // whatever the product is, it does not count
  if (lane() % kTeam != 0) return;
  store(const_cast<float*>(p.terms(group, image)) + within * 2, Vector<float, 2>{{factor, bias}});
  float* mine = found + thread() / kTeam * 4;
  mine[0] = usable ? factor * sqrtf(squares.whole) : 0.0f;
  mine[1] = usable ? factor * sqrtf(squares.left) : 0.0f;
  mine[2] = usable ? factor * sqrtf(squares.second) : 0.0f;
}

namespace {

// One block per 32 codes. Clears the counters of the next launch.
__global__ void __launch_bounds__(kThreads, 2) prepare_kernel(const __grid_constant__ Packed p) {
  Arena arena;
  auto* centre = arena.shared<float>(kMostDim);
  auto* firsts = arena.shared<float>(kCentreCodes);
  auto* found = arena.shared<float>(kPrepared * 4);
#pragma unroll
  for (int part = 0; part < 2; ++part)
    for_each(p.cleared_count[part], [&](int64_t i) { p.cleared[part][i] = 0; });
  const int64_t group = block() / p.prepared(), part = block() % p.prepared();
  for (int d = thread(); d < kMostDim; d += threads()) {
    centre[d] = find_centre(p, group, d);
    if (part == 0) p.centre[group * kMostDim + d] = centre[d];
  }
  for (int i = thread(); i < spaced_codes(p); i += threads())
    firsts[i] = code_at(p.book, false, group, spaced_code(p, i)).one(0);
  sync();
  if (p.rounded && p.book.dtype == DType::kFloat16)
    prepare_codes<Half>(p, group, part * kPrepared, centre, firsts, found);
  else
    prepare_codes<BFloat16>(p, group, part * kPrepared, centre, firsts, found);
  sync();
  if (thread() >= 3) return;
  float most = 0;
  for (int i = 0; i < kPrepared; ++i) most = larger(most, found[i * 4 + thread()]);
  p.bounds[block() * 4 + thread()] = most;
}

}  // namespace

static inline const char* prepare(const Packed& p, void* stream) {
  static_assert(kPrepared * kTeam == kThreads);
  return launch<prepare_kernel>(
      {.blocks = p.book.groups * p.prepared(),
       .threads = kThreads,
       .shared = shared_bytes<float>(kMostDim) + shared_bytes<float>(kCentreCodes) +
                 shared_bytes<float>(kPrepared * 4),
       .stream = stream},
      p);
}

}  // namespace tk::cuda
