// How the rows of a compaction move: a block plans some rows of one head of one tensor, then
// carries them as words, or turns them when they are keys.
#pragma once

#include "cuda/compact_plan.cuh"

namespace tk::compact {

// Where a row comes from and goes to, in bytes.
struct Hop {
  int64_t from;  // −1: zeros
  int64_t to;    // −1: nothing moves
};

// Cosine and sine, error below 2 ulp of 1 while |angle| < 2^50: the multiple of π/2 is taken off in
// double.
__device__ inline void cos_sin(float angle, float* cosine, float* sine) {
  const double wide = angle;
  const double shifted = wide * 0.63661977236758134308 + 6755399441055744.0;  // 1.5·2^52
  const double turns = shifted - 6755399441055744.0;
  const double rest = (wide - turns * 1.57079632679489655800) - turns * 6.12323399573676603587e-17;
  int64_t quadrant;
  memcpy(&quadrant, &shifted, sizeof quadrant);
  const auto r = static_cast<float>(rest);
  const float z = r * r;
  const float s = r + r * z * ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f);
  const float c =
      ((z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      z * 0.5f + 1.0f;
  const float sine_of = (quadrant & 1) != 0 ? c : s, cosine_of = (quadrant & 1) != 0 ? s : c;
  *sine = (quadrant & 2) != 0 ? -sine_of : sine_of;
  *cosine = ((quadrant + 1) & 2) != 0 ? -cosine_of : cosine_of;
}

// A carrier fetches one word of the row at some bytes, and lands it.
template <class Word>
struct Plain {
  using Value = Word;
  static constexpr int kInFlight = 4;
  const char* from;
  char* to;

  __device__ Value fetch(int64_t row_at, int word) const {
    return cuda::load<Word>(from + row_at + word * int64_t{sizeof(Word)});
  }
  __device__ void land(int64_t row_at, int, int word, const Value& value) const {
    cuda::store(to + row_at + word * int64_t{sizeof(Word)}, value);
  }
};

// Rotate-half pairs (i, half + i), N of them at once.
template <class T, int N>
struct Turning {
  using Part = cuda::Vector<T, N>;
  struct Value {
    Part low, high;
  };
  static constexpr int kInFlight = 1;
  const char* from;
  char* to;
  int64_t half;           // D / 2
  const float* inv_freq;  // of the first word
  const float* turns;     // new − old position of each row

  __device__ Value fetch(int64_t row_at, int word) const {
    const char* at = from + row_at + word * int64_t{sizeof(Part)};
    return {cuda::load<Part>(at), cuda::load<Part>(at + half * int64_t{sizeof(T)})};
  }
  __device__ void land(int64_t row_at, int row, int word, Value value) const {
    const float by = turns[row];
#pragma unroll
    for (int i = 0; i < N && by != 0; ++i) {
      float cosine, sine;
      cos_sin(by * inv_freq[word * N + i], &cosine, &sine);
      const float x = cuda::widen(value.low.at[i]), y = cuda::widen(value.high.at[i]);
      value.low.at[i] = cuda::narrow<T>(x * cosine - y * sine);
      value.high.at[i] = cuda::narrow<T>(y * cosine + x * sine);
    }
    char* at = to + row_at + word * int64_t{sizeof(Part)};
    cuda::store(at, value.low);
    cuda::store(at + half * int64_t{sizeof(T)}, value.high);
  }
};

// A thread's words of the planned rows, row after row: neighbours are with neighbouring words.
struct Cursor {
  int row, word, words, row_step, word_step;

  __device__ explicit Cursor(int words_of_row) : words(words_of_row) {
    row = cuda::thread() / words;
    word = cuda::thread() - row * words;
    row_step = cuda::threads() / words;
    word_step = cuda::threads() - row_step * words;
  }

  __device__ void next() {
    row += row_step;
    word += word_step;
    if (word >= words) {
      word -= words;
      ++row;
    }
  }
};

template <class Carrier>
struct Flight {
  typename Carrier::Value values[Carrier::kInFlight];

  __device__ void fetch(const Carrier& carrier, const Hop* hops, int rows, Cursor& at) {
#pragma unroll
    for (int i = 0; i < Carrier::kInFlight; ++i) {
      values[i] = {};
      if (at.row < rows && hops[at.row].from >= 0)
        values[i] = carrier.fetch(hops[at.row].from, at.word);
      at.next();
    }
  }

  __device__ void land(const Carrier& carrier, const Hop* hops, int rows, Cursor& at) {
#pragma unroll
    for (int i = 0; i < Carrier::kInFlight; ++i) {
      if (at.row < rows && hops[at.row].to >= 0)
        carrier.land(hops[at.row].to, at.row, at.word, values[i]);
      at.next();
    }
  }
};

// Carries the planned rows, `words` words each. Where they must move one after the other a tile is
// fetched by all before it lands; its slots lie below all that the next tile reads, which therefore
// is fetched before. So it is, too, where a tile is one word of each thread.
template <bool kOrdered, class Carrier>
__device__ void carry(const Carrier& carrier, const Hop* hops, int rows, int words) {
  const int64_t total = int64_t{rows} * words;
  const int64_t tile = int64_t{Carrier::kInFlight} * cuda::threads();
  Cursor ahead(words), behind = ahead;
  Flight<Carrier> flight;
  if constexpr (kOrdered || Carrier::kInFlight == 1) {
    flight.fetch(carrier, hops, rows, ahead);
#pragma unroll 1
    for (int64_t begin = 0; begin < total; begin += tile) {
      Flight<Carrier> next;
      next.fetch(carrier, hops, rows, ahead);
      if constexpr (kOrdered) cuda::sync();
      flight.land(carrier, hops, rows, behind);
      flight = next;
    }
  } else {
#pragma unroll 1
    for (int64_t begin = 0; begin < total; begin += tile) {
      flight.fetch(carrier, hops, rows, ahead);
      flight.land(carrier, hops, rows, behind);
    }
  }
}

// What a block serves: some columns of one head of a tensor.
struct Lane {
  const char* from;
  char* to;
  int64_t first_word;
  int words;
};

template <bool kOrdered>
__device__ void carry_bytes(const Lane& lane, int word, const Hop* hops, int rows) {
  const int64_t at = lane.first_word * word;
  const char* from = lane.from + at;
  char* to = lane.to + at;
  switch (word) {
    case 16:
      using Word = cuda::Vector<uint32_t, 4>;
      return carry<kOrdered>(Plain<Word>{from, to}, hops, rows, lane.words);
    case 8:
      return carry<kOrdered>(Plain<uint64_t>{from, to}, hops, rows, lane.words);
    case 4:
      return carry<kOrdered>(Plain<uint32_t>{from, to}, hops, rows, lane.words);
    case 2:
      return carry<kOrdered>(Plain<uint16_t>{from, to}, hops, rows, lane.words);
    default:
      return carry<kOrdered>(Plain<uint8_t>{from, to}, hops, rows, lane.words);
  }
}

template <bool kOrdered, class T>
__device__ void carry_keys_of(const Lane& lane, int word, const Common& common, const Hop* hops,
                              const float* turns, int rows) {
  constexpr int kSize = sizeof(T), kWide = 16 / kSize;
  const int64_t at = lane.first_word * word;
  const char* from = lane.from + at;
  char* to = lane.to + at;
  const float* inv_freq = common.inv_freq + at / kSize;
  if (word == 16) {
    using Wide = Turning<T, kWide>;
    carry<kOrdered>(Wide{from, to, common.half, inv_freq, turns}, hops, rows, lane.words);
  } else {
    using Narrow = Turning<T, 1>;
    carry<kOrdered>(Narrow{from, to, common.half, inv_freq, turns}, hops, rows, lane.words);
  }
}

template <bool kOrdered>
__device__ void carry_keys(const Lane& lane, int word, const Common& common, const Hop* hops,
                           const float* turns, int rows) {
  switch (common.key_dtype) {
    case DType::kFloat32:
      return carry_keys_of<kOrdered, float>(lane, word, common, hops, turns, rows);
    case DType::kFloat16:
      return carry_keys_of<kOrdered, Half>(lane, word, common, hops, turns, rows);
    default:
      return carry_keys_of<kOrdered, BFloat16>(lane, word, common, hops, turns, rows);
  }
}

// The places of rows in one head of a tensor.
struct Places {
  int64_t from_row, to_row, from_block;
  const char* blocks;  // of the sample; null: rows lie one behind the other
};

// −1 where the pool has no such block.
__device__ inline int64_t place_of(const Pages& pages, const Places& places, int64_t position,
                                   int64_t row_stride) {
  if (places.blocks == nullptr) return position * row_stride;
  const int64_t number = pages.shift < 0 ? position / pages.block_size : position >> pages.shift;
  const int64_t id = block_of(pages, places.blocks, number);
  return id < 0 ? -1 : id * places.from_block + (position - number * pages.block_size) * row_stride;
}

// By how much an entry turns; false where a position is beyond 32 bits.
struct Angle {
  Row old_positions, new_positions;

  __device__ bool of(int64_t entry, float* by) const {
    const int64_t before = old_positions[entry], after = new_positions[entry];
    *by = static_cast<float>(after - before);
    return before == static_cast<int32_t>(before) && after == static_cast<int32_t>(after);
  }
};

template <bool kTurns>
__device__ void stage(const Common& common, const Walk& walk, const Places& places, bool is_key,
                      const Angle& angle, int64_t first, int rows, Hop* hops, float* turns) {
  for (int i = cuda::thread(); i < rows; i += cuda::threads()) {
    const Step step = step_of(walk, first + i);
    bool good = step.position >= 0;
    float by = 0;
    if constexpr (kTurns) {
      if (is_key && good) good = angle.of(step.entry, &by);
      turns[i] = by;
    }
    Hop hop{-1, -1};
    if (good) hop.from = place_of(common.pages, places, step.position, places.from_row);
    if (!common.in_place) {
      hop.to = step.slot * places.to_row;
    } else if (hop.from >= 0 && (step.position != step.slot || by != 0)) {
      hop.to = place_of(common.pages, places, step.slot, places.to_row);
    }
    if (hop.to < 0) hop.from = -1;
    hops[i] = hop;
  }
}

// Moves what one block has of a tensor: some rows of a head, or some of its columns.
template <bool kOrdered, bool kTurns, int kWords>
__device__ void serve(const Table<kWords>& table, int64_t number, Hop* hops, float* turns) {
  const Common& common = table.common;
  const Plane plane = plane_of(table, number);
  const auto kind = record<Kind>(table, plane.kind);
  const auto layer = record<Layer>(table, plane.layer);
  const auto index = record<Index>(table, layer.index);
  const bool is_key = kTurns && plane.turns != 0;
  const int64_t parts = parts_of(common, kind, index.count, is_key);
  const auto words = static_cast<int>((is_key ? kind.row_bytes / 2 : kind.row_bytes) / plane.word);
  if (words == 0 || cuda::block() >= common.batch * kind.heads * parts) return;
  const int64_t head = cuda::block() / parts, part = cuda::block() - head * parts;
  const int64_t b = head / kind.heads, g = head - b * kind.heads;
  int64_t limit = kind.tokens;
  if (layer.lengths != 0) {
    const int64_t length = row_of(table, layer.lengths, b, g)[0];
    limit = length < limit ? length : limit;
  }
  const Walk walk =
      walk_of(row_of(table, index.kept, b, g), index.count, limit, common, common.in_place, is_key);
  const bool paged = common.pages.table != nullptr;
  const Places places{kind.from_row, kind.to_row, kind.from_batch,
                      paged ? blocks_of(common.pages, b) : nullptr};
  const int64_t image = paged ? 0 : b;
  Lane lane{plane.from + image * kind.from_batch + g * kind.from_head,
            plane.to + image * kind.to_batch + g * kind.to_head, 0, words};
  Angle angle{};
  if (is_key)
    angle = {row_of(table, layer.old_positions, b, g), row_of(table, layer.new_positions, b, g)};
  const int64_t end = moves_of(walk);
  const auto move = [&](int64_t first, int64_t most) {
    const auto rows = static_cast<int>(end - first < most ? end - first : most);
    stage<kTurns>(common, walk, places, is_key, angle, first, rows, hops, turns);
    cuda::sync();
    if (is_key) {
      carry_keys<kOrdered>(lane, plane.word, common, hops, turns, rows);
    } else {
      carry_bytes<kOrdered>(lane, plane.word, hops, rows);
    }
  };
  if constexpr (kOrdered) {
    lane.first_word = words * part / parts;
    lane.words = static_cast<int>(words * (part + 1) / parts - lane.first_word);
#pragma unroll 1
    for (int64_t first = 0; first < end; first += kStage) {
      cuda::sync();  // all rows planned before have landed
      move(first, kStage);
    }
  } else {
    const int64_t most = unit_rows(common, kind.row_bytes);
    if (part * most < end) move(part * most, most);
  }
}

}  // namespace tk::compact
