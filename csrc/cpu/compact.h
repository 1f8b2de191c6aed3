// What both compactions of a key/value cache share: every index row is checked and planned, rows
// are copied or rotated wherever they lie, and the work is cut for the threads.
#pragma once

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

using Rows = CompactKv::Rows;
using Index = CompactKv::Index;

// What a thread copies of one tensor and head between two looks at the work list.
constexpr int64_t kChunkBytes = 1 << 16;
// Below this a second thread costs more than it saves.
constexpr int64_t kGrainBytes = 1 << 18;
// How far ahead of the copy rows are asked for.
constexpr int64_t kAheadBytes = 1 << 13;
// Angles whose cosine and sine are kept on the stack.
constexpr int64_t kAngles = 256;

TK_INLINE int64_t at(const Rows& rows, int64_t b, int64_t g, int64_t i) {
  const int64_t offset = b * rows.batch_stride + g * rows.head_stride + i * rows.stride;
  if (rows.wide) return static_cast<const int64_t*>(rows.values)[offset];
  return static_cast<const int32_t*>(rows.values)[offset];
}

template <class T>
TK_INLINE const T& of_layer(const T* values, int64_t count, int64_t layer) {
  return values[count == 1 ? 0 : layer];
}

TK_INLINE int64_t row_of(const Rows& rows, int64_t b, int64_t g) {
  return (rows.batch == 1 ? 0 : b) * rows.heads + (rows.heads == 1 ? 0 : g);
}

// The first entry of a checked row, of `count`, whose value is at least `value`.
TK_INLINE int64_t lower_bound(const Rows& kept, int64_t b, int64_t g, int64_t count,
                              int64_t value) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (at(kept, b, g, middle) < value) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// Checks one index row (ascending, -1 behind the last) and writes its length and where each slot is
// filled from.
bool plan_row(const Index& index, int64_t row, bool fill) {
  const Rows& kept = index.kept;
  const int64_t b = row / kept.heads, g = row % kept.heads;
  int64_t* positions = index.positions + row * kept.count;
  int64_t count = 0;
  for (int64_t previous = -1; count < kept.count; ++count) {
    const int64_t value = at(kept, b, g, count);
    if (value == -1) break;
    if (value <= previous) return false;
    positions[count] = previous = value;
  }
  index.lengths[row] = count;
  for (int64_t i = count; i < kept.count; ++i) {
    if (at(kept, b, g, i) != -1) return false;
    positions[i] = -1;
  }
  if (!fill) return true;
  const int64_t beyond = lower_bound(kept, b, g, count, count);
  int64_t stays = 0, moves = beyond;
  for (int64_t slot = 0; slot < count; ++slot) {
    const bool in_place = stays < beyond && at(kept, b, g, stays) == slot;
    positions[slot] = at(kept, b, g, in_place ? stays++ : moves++);
  }
  return true;
}

constexpr const char* kBadIndex =
    "index: allowed ascending positions below the length, -1 behind the last, got others";
constexpr const char* kBadLengths = "lengths: allowed 0 … T, got others";
constexpr const char* kBadPositions = "rope: allowed positions of 32 bits, got others";

const char* plan(const CompactKv& p, const Pool& pool) {
  int bad = 0;
  for (int64_t i = 0; i < p.index_count; ++i) {
    const Index& index = p.indices[i];
    const int64_t grain = larger<int64_t>(1, (1 << 15) / larger<int64_t>(1, index.kept.count));
    parallel_for(pool, index.kept.batch * index.kept.heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (!plan_row(index, row, p.fill)) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
      }
    });
  }
  return bad ? kBadIndex : nullptr;
}

// Every row against the tokens its layer has.
const char* check_lengths(const CompactKv& p) {
  for (int64_t layer = 0; layer < p.layer_count; ++layer) {
    const Index& index = of_layer(p.indices, p.index_count, layer);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t g = 0; g < p.layers[layer].heads; ++g) {
        int64_t tokens = p.layers[layer].tokens;
        if (p.lengths) {
          const int64_t length = at(of_layer(p.lengths, p.length_count, layer), b, g, 0);
          if (length < 0 || length > tokens) return kBadLengths;
          tokens = length;
        }
        const int64_t count = index.lengths[row_of(index.kept, b, g)];
        if (count > 0 && at(index.kept, b, g, count - 1) >= tokens) return kBadIndex;
      }
    }
  }
  return nullptr;
}

// The difference of two such positions times a frequency is an angle that can still be reduced.
const char* check_positions(const Rows* rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t row = 0; row < rows[i].batch * rows[i].heads; ++row) {
      for (int64_t entry = 0; entry < rows[i].count; ++entry) {
        const int64_t value = at(rows[i], row / rows[i].heads, row % rows[i].heads, entry);
        if (value != static_cast<int32_t>(value)) return kBadPositions;
      }
    }
  }
  return nullptr;
}

const char* check(const CompactKv& p, const Pool& pool) {
  const char* complaint = plan(p, pool);
  if (!complaint) complaint = check_lengths(p);
  if (!complaint && p.inv_freq) complaint = check_positions(p.old_positions, p.old_count);
  if (!complaint && p.inv_freq) complaint = check_positions(p.new_positions, p.new_count);
  return complaint;
}

// A Move is one tensor of one sample and head: slot j of `length` receives the row at positions[j].
// `source` and `target` tell where rows of `bytes` are; they are asked for `ahead` slots before the
// move where the result is larger than the cache (`streaming`).
template <class Move>
TK_INLINE void ask_for(const Move& move, int64_t slot) {
  if (slot >= move.length) return;
  const char* from = move.source(move.positions[slot]);
  if (from == move.target(slot)) return;
  for (int64_t i = 0; i < move.bytes; i += 64) __builtin_prefetch(from + i, 0, 0);
}

// Kept rows are too irregular for the processor to foresee, so they are asked for ahead of the
// move, as lines that nobody reads twice: past the second cache they come sooner.
template <class Move>
TK_INLINE void ask_ahead(const Move& move, int64_t slot) {
  if (!move.streaming) return;
  for (int64_t i = 0; i < move.ahead && slot == 0; ++i) ask_for(move, i);
  ask_for(move, slot + move.ahead);
}

template <class Move>
void copy_rows(const Move& move, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    ask_ahead(move, slot);
    const char* from = move.source(move.positions[slot]);
    char* to = move.target(slot);
    if (from != to) copy_row(to, from, move.bytes, move.streaming);
  }
}

typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef int64_t Longs __attribute__((vector_size(8 * kLanes)));

// Cosine and sine, error below 2 ulp of 1 while |angle| < 2^50: the multiple of π/2 is taken off in
// double.
TK_INLINE void cos_sin(Floats angle, Floats* cosine, Floats* sine) {
  const Doubles wide = __builtin_convertvector(angle, Doubles);
  const Doubles shifted =
      wide * 0.63661977236758134308 + 6755399441055744.0;  // 1.5·2^52: rounds to an integer
  const Doubles turns = shifted - 6755399441055744.0;
  const Doubles rest = (wide - turns * 1.57079632679489655800) - turns * 6.12323399573676603587e-17;
  const Ints quadrant = __builtin_convertvector(reinterpret_cast<Longs>(shifted), Ints);
  const Floats r = __builtin_convertvector(rest, Floats);
  const Floats z = r * r;
  const Floats s = r + r * z * ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f);
  const Floats c =
      ((z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      z * 0.5f + 1.0f;
  const Ints odd = -(quadrant & 1);
  const Ints minus_sine = (quadrant & 2) << 30, minus_cosine = ((quadrant + 1) & 2) << 30;
  *sine = reinterpret_cast<Floats>(reinterpret_cast<Ints>(select(odd, c, s)) ^ minus_sine);
  *cosine = reinterpret_cast<Floats>(reinterpret_cast<Ints>(select(odd, s, c)) ^ minus_cosine);
}

// Rotate-half pairs (i, half + i), `count` of them from `first`: to = from turned by the angles.
template <class T>
TK_INLINE void rotate_row(const T* from, T* to, int64_t half, int64_t count, const float* cosine,
                          const float* sine) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(smaller<int64_t>(kLanes, count - i));
    const Floats x = load(from + i, lanes), y = load(from + half + i, lanes);
    const Floats c = load(cosine + i), s = load(sine + i);
    store(to + i, x * c - y * s, lanes);
    store(to + half + i, y * c + x * s, lanes);
  }
}

// The entry of the index that slot after slot was filled from: entries that stay and entries that
// move, each ascending.
struct Entries {
  const Rows& kept;
  int64_t b, g, beyond, stays, moves;
  bool fill;

  TK_INLINE Entries(const CompactKv& p, const Index& index, int64_t b, int64_t g, int64_t begin)
      : kept(index.kept), b(b), g(g), beyond(0), stays(begin), moves(0), fill(p.fill) {
    if (!fill) return;
    const int64_t count = index.lengths[row_of(kept, b, g)];
    beyond = lower_bound(kept, b, g, count, count);
    stays = lower_bound(kept, b, g, beyond, begin);
    moves = beyond + (begin - stays);
  }

  TK_INLINE int64_t next(int64_t slot, int64_t position) {
    return !fill || position == slot ? stays++ : moves++;
  }
};

// Keys whose position does not change move as bytes, the others are turned by (new − old) ·
// inv_freq.
template <class T, class Move>
void rotate_rows(const CompactKv& p, const Move& move, int64_t layer, int64_t b, int64_t g,
                 int64_t begin, int64_t end) {
  const Rows& old_positions = of_layer(p.old_positions, p.old_count, layer);
  const Rows& new_positions = of_layer(p.new_positions, p.new_count, layer);
  const Index& index = of_layer(p.indices, p.index_count, layer);
  float cosine[kAngles], sine[kAngles];
  for (int64_t first = 0; first < p.half; first += kAngles) {
    const int64_t count = smaller(kAngles, p.half - first);
    Entries entries(p, index, b, g, begin);
    int64_t turned = 0;
    for (int64_t slot = begin; slot < end; ++slot) {
      if (first == 0) ask_ahead(move, slot);
      const int64_t position = move.positions[slot];
      const int64_t entry = entries.next(slot, position);
      const int64_t difference = at(new_positions, b, g, entry) - at(old_positions, b, g, entry);
      const T* from = reinterpret_cast<const T*>(move.source(position)) + first;
      T* to = reinterpret_cast<T*>(move.target(slot)) + first;
      if (difference == 0) {
        if (from == to) continue;
        std::memcpy(to, from, sizeof(T) * static_cast<size_t>(count));
        std::memcpy(to + p.half, from + p.half, sizeof(T) * static_cast<size_t>(count));
        continue;
      }
      for (int64_t i = 0; i < count && difference != turned; i += kLanes) {
        const int lanes = static_cast<int>(smaller<int64_t>(kLanes, count - i));
        Floats c, s;
        cos_sin(load(p.inv_freq + first + i, lanes) * static_cast<float>(difference), &c, &s);
        store(cosine + i, c);
        store(sine + i, s);
      }
      turned = difference;
      rotate_row(from, to, p.half, count, cosine, sine);
    }
  }
}

// How one tensor's work is cut. In place and in order, rows must move one after the other: then the
// row itself is cut, in columns.
struct Cut {
  int64_t heads, bytes, slots;  // walks of a sample, bytes of a row, slots of a walk
  int64_t parts, part;          // part: slots of one unit, or bytes of a row
  bool columns, rotate;
};

// For a tensor whose rows of `bytes` move in `heads` walks per sample.
TK_INLINE Cut cut(const CompactKv& p, int64_t tensor, int64_t heads, int64_t bytes, int threads) {
  const int64_t slots = of_layer(p.indices, p.index_count, tensor / p.per_layer).kept.count;
  const bool rotate = p.inv_freq && tensor % p.per_layer == 0;
  if (p.in_place && !p.fill) {
    const int64_t rows = larger<int64_t>(1, p.batch * heads * p.layer_count * p.per_layer);
    const int64_t wanted =
        rotate ? 1 : larger<int64_t>(1, smaller(ceil_div(threads, rows), bytes / 64));
    const int64_t part = larger<int64_t>(1, ceil_div(bytes / wanted, 64) * 64);
    return {heads, bytes, slots, larger<int64_t>(1, ceil_div(bytes, part)), part, true, rotate};
  }
  const int64_t part = larger<int64_t>(1, kChunkBytes / larger<int64_t>(1, bytes));
  return {heads, bytes, slots, ceil_div(slots, part), part, false, rotate};
}

// What one unit moves: of one sample and head the slots begin … end − 1, of their rows `bytes` from
// `column` on. Behind `end` and before `last` nothing is kept.
struct Part {
  int64_t layer, b, g;
  const int64_t* positions;
  int64_t length, column, bytes, begin, end, last;
};

TK_INLINE Part part_of(const CompactKv& p, int64_t tensor, const Cut& cut, int64_t unit) {
  const int64_t layer = tensor / p.per_layer, part = unit % cut.parts, head = unit / cut.parts;
  const int64_t b = head / cut.heads, g = head % cut.heads;
  const Index& index = of_layer(p.indices, p.index_count, layer);
  const int64_t row = row_of(index.kept, b, g), length = index.lengths[row];
  const int64_t column = cut.columns ? part * cut.part : 0;
  const int64_t begin = cut.columns ? 0 : part * cut.part;
  const int64_t last = cut.columns ? cut.slots : smaller(begin + cut.part, cut.slots);
  return {layer,
          b,
          g,
          index.positions + row * cut.slots,
          length,
          column,
          cut.columns ? smaller(cut.part, cut.bytes - column) : cut.bytes,
          begin,
          larger(begin, smaller(last, length)),
          last};
}

template <class Move>
TK_INLINE void move_part(const CompactKv& p, const Move& move, const Cut& cut, const Part& part) {
  if (!cut.rotate) return copy_rows(move, part.begin, part.end);
  dispatch(p.key_dtype, [&](auto zero) {
    rotate_rows<decltype(zero)>(p, move, part.layer, part.b, part.g, part.begin, part.end);
  });
}

// Shares the units of all tensors, cut as cut_of(tensor) tells, among the threads:
// move(tensor, cut, unit, streaming).
template <class CutOf, class MoveUnit>
void move_all(const CompactKv& p, const Pool& pool, const CutOf& cut_of, const MoveUnit& move) {
  const int64_t tensors = p.layer_count * p.per_layer;
  int64_t units = 0, total = 0;
  for (int64_t tensor = 0; tensor < tensors; ++tensor) {
    const Cut c = cut_of(tensor);
    units += p.batch * c.heads * c.parts;
    total += p.batch * c.heads * c.slots * c.bytes;
  }
  const int64_t unit_bytes = larger<int64_t>(1, total / larger<int64_t>(1, units));
  const int64_t grain = larger<int64_t>(1, kGrainBytes / unit_bytes);
  parallel_for(pool, units, grain, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t tensor = 0; tensor < tensors && first < end; ++tensor) {
      const Cut c = cut_of(tensor);
      const int64_t count = p.batch * c.heads * c.parts;
      for (int64_t unit = larger(begin, first); unit < smaller(end, first + count); ++unit) {
        move(tensor, c, unit - first, total > kStreamingBytes);
      }
      first += count;
    }
    if (total > kStreamingBytes) streaming_done();
  });
}

}  // namespace
}  // namespace tk::TK_ISA
