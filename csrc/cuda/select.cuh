// The best tokens of one row of scores, by one block or a cluster of them: a radix search for the
// last score that is good enough, then a scan that gives the chosen tokens in ascending order,
// lowest ties first.
#pragma once

#include "cuda/select_team.cuh"

namespace tk::cuda {

// Scores become integers of the same order, 16-bit ones in the upper half: NaN lowest, −0 equal to
// +0. Below and above them there is room for tokens that never and that always win.
constexpr uint32_t kNever = 0, kNan = 1u << 16, kAlways = 0xffff0000u;

__device__ inline uint32_t ordered(float score) {
  const float one_zero = score + 0.0f;
  uint32_t bits;
  memcpy(&bits, &one_zero, sizeof bits);
  if (score != score) return kNan;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

template <class T>
__device__ uint32_t ordered(T score) {
  const float wide = widen(score);
  const uint32_t bits = wide == 0 ? 0 : score.bits;
  if (wide != wide) return kNan;
  return (bits >> 15 ? ~bits : bits | 0x8000u) << 16;
}

enum class Rule {
  kByScore,
  kKeptFirst,  // kept tokens always win
  kKeptOnly,   // the others never do
  kThreshold   // all that reach it or are kept
};

struct ScoreRow {
  const void* scores;
  DType dtype;
  int64_t stride;
  const bool* keep;  // or null
  int64_t keep_stride;
  int tokens;  // fewer than 2^30
};

// Tokens first … end − 1 of a row of scores as tiles of kKeys keys per thread: thread t holds
// tokens t, t + threads, … of a tile. What fits one tile is loaded once.
class ScoreKeys {
 public:
  static constexpr int kKeys = SelectMemory::kKeys;

  const ScoreRow row;
  Rule rule;
  const int first, end, tiles;
  uint32_t key[kKeys];

  // Of `blocks` blocks that divide the row, words of 32 tokens each, number `rank`.
  __device__ ScoreKeys(const ScoreRow& scores, Rule first_rule, float least, int rank, int blocks)
      : row(scores),
        rule(first_rule),
        first(share_of(rank, blocks)),
        end(share_of(rank + 1, blocks)),
        tiles((end - first + kKeys * threads() - 1) / (kKeys * threads())),
        threshold_(least) {}

  __device__ int token(int tile, int i) const {
    return first + (tile * kKeys + i) * threads() + thread();
  }

  __device__ bool kept(int n) const {
    return row.keep != nullptr &&
           load<unsigned char, kReadOnly>(row.keep + n * row.keep_stride) != 0;
  }

  // The key of a score alone.
  __device__ uint32_t key_of(int n) const {
    if (row.dtype == DType::kFloat32) return ordered(at<float>(n));
    return row.dtype == DType::kFloat16 ? ordered(at<Half>(n)) : ordered(at<BFloat16>(n));
  }

  __device__ void load_tile(int tile, bool again) {
    if (tiles == 1 && again) return;
    if (row.dtype == DType::kFloat32) {
      load_as<float>(tile);
    } else if (row.dtype == DType::kFloat16) {
      load_as<Half>(tile);
    } else {
      load_as<BFloat16>(tile);
    }
  }

 private:
  __device__ int share_of(int rank, int blocks) const {
    if (blocks == 1) return rank * row.tokens;
    const auto words = static_cast<uint32_t>((row.tokens + kWarp - 1) / kWarp);
    const auto before = begin_of(static_cast<uint32_t>(rank), words, static_cast<uint32_t>(blocks));
    return rank == blocks ? row.tokens : static_cast<int>(before) * kWarp;
  }

  template <class T>
  __device__ T at(int n) const {
    return load<T, kReadOnly>(static_cast<const T*>(row.scores) + n * row.stride);
  }

  template <class T>
  __device__ void load_as(int tile) {
    T score[kKeys] = {};
    bool here[kKeys] = {};
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int n = token(tile, i);
      if (n < end) {
        score[i] = at<T>(n);
        here[i] = rule != Rule::kByScore && kept(n);
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
      key[i] = token(tile, i) < end ? ruled(score[i], here[i]) : kNever;
  }

  template <class T>
  __device__ uint32_t ruled(T score, bool is_kept) const {
    if (rule == Rule::kThreshold) return is_kept || widen(score) >= threshold_ ? kAlways : kNever;
    if (rule == Rule::kKeptFirst && is_kept) return kAlways;
    if (rule == Rule::kKeptOnly && !is_kept) return kNever;
    return ordered(score);
  }

  const float threshold_;
};

// The sum over the block, in all threads; `sums` holds one entry per warp.
template <class T>
__device__ T block_sum(T value, T* sums) {
  const T mine = warp_sum(value);
  if (lane() == 0) sums[warp()] = mine;
  sync();
  T total = 0;
  for (int w = 0; w < warps(); ++w) total += sums[w];
  sync();
  return total;
}

template <class Team>
__device__ uint32_t count_kept(const ScoreKeys& keys, const SelectMemory& memory,
                               const Team& team) {
  uint32_t count = 0;
  for (int n = keys.first + thread(); n < keys.end; n += threads()) count += keys.kept(n);
  return team.sum(block_sum(count, memory.counts));
}

// Keys from `key` on are chosen, of those equal to it the first `ties`.
struct Bar {
  uint32_t key, ties;
};

// Adds up the copies, clears them, and finds the digit where, counted from the highest, the number
// of keys of all blocks reaches `need`.
template <class Team>
__device__ void find_digit(const SelectMemory& memory, uint32_t need, const Team& team, int round) {
  constexpr int kDigits = SelectMemory::kDigits, kCopies = SelectMemory::kCopies;
  using Count = typename Team::Count;
  uint32_t own = 0;
  const int digit = kDigits - 1 - thread();
  if (digit >= 0) {
    uint32_t* copies = memory.histogram + digit * kCopies;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      own += copies[c];
      copies[c] = 0;
    }
  }
  Count count = team.count(own, digit, round), reached = 0;
  Count* totals = memory.totals<Count>();
  if (digit >= 0) {
    reached = warp_scan(count);
    if (lane() == kWarp - 1) totals[warp()] = reached;
  }
  sync();
  if (digit >= 0) {
    for (int w = 0; w < warp(); ++w) reached += totals[w];
    const uint32_t all = Team::all(reached), here = Team::all(count);
    if (all >= need && all - here < need) {
      memory.words[0] = static_cast<uint32_t>(digit);
      memory.words[1] = all - here;
      memory.words[2] = here;
      memory.words[3] = Team::own(reached - count);
      memory.words[4] = Team::own(count);
    }
  }
  sync();
}

// The highest bar that `need` keys reach, byte by byte from the top; early where exactly as many
// share the bytes found so far as are still to be had. `mine` becomes how many of this block's keys
// lie above the bytes found, and how many share them.
template <class Team>
__device__ Bar find_bar(ScoreKeys& keys, uint32_t need, const SelectMemory& memory,
                        const Team& team, Found& mine) {
  constexpr int kCopies = SelectMemory::kCopies;
  if (need == 0) return {UINT32_MAX, 0};
  for (int i = thread(); i < SelectMemory::kDigits * kCopies; i += threads())
    memory.histogram[i] = 0;
  sync();
  const int lowest = keys.row.dtype == DType::kFloat32 ? 0 : 16;
  uint32_t bar = 0, known = 0;
  for (int shift = 24; shift >= lowest; shift -= 8) {
    for (int tile = 0; tile < keys.tiles; ++tile) {
      keys.load_tile(tile, shift != 24);
#pragma unroll
      for (int i = 0; i < ScoreKeys::kKeys; ++i) {
        const uint32_t digit = keys.key[i] >> shift & 255u;
        if (keys.token(tile, i) < keys.end && ((keys.key[i] ^ bar) & known) == 0)
          atomic_add(&memory.histogram[static_cast<int>(digit) * kCopies + lane() % kCopies], 1u);
      }
    }
    sync();
    find_digit(memory, need, team, shift / 8);
    bar |= memory.words[0] << shift;
    known |= 255u << shift;
    need -= memory.words[1];
    mine.above += memory.words[3];
    mine.ties = memory.words[4];
    if (memory.words[2] == need) break;
  }
  return {bar, need};
}

// Sums of all lower entries instead of the entries, by the first warp; their total behind them.
__device__ inline void scan_counts(uint32_t* counts, int entries) {
  if (warp() != 0) return;
  const int each = entries / kWarp, first = lane() * each;
  uint32_t mine = 0;
  for (int i = 0; i < each; ++i) mine += counts[first + i];
  uint32_t before = warp_scan(mine) - mine;
  for (int i = 0; i < each; ++i) {
    const uint32_t here = counts[first + i];
    counts[first + i] = before;
    before += here;
  }
  if (lane() == kWarp - 1) counts[entries] = before;
}

// Calls emit(rank, token) for every token from the bar on, ranks ascending with the tokens, and
// word(w, bits) once for every 32 tokens, with a bit for each that was chosen. `before`: what lower
// blocks have found. Returns how many tokens it and they have chosen.
template <class Emit, class Word>
__device__ uint32_t choose(ScoreKeys& keys, Bar bar, bool loaded, Found before,
                           const SelectMemory& memory, const Emit& emit, const Word& word) {
  constexpr int kKeys = ScoreKeys::kKeys;
  const int entries = kKeys * warps();
  uint32_t above_before = before.above, ties_before = before.ties;
  for (int tile = 0; tile < keys.tiles; ++tile) {
    keys.load_tile(tile, loaded);
    Lanes above[kKeys], ties[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const bool here = keys.token(tile, i) < keys.end;
      above[i] = ballot(here && keys.key[i] > bar.key);
      ties[i] = ballot(here && keys.key[i] == bar.key);
      if (lane() == 0)
        memory.counts[i * warps() + warp()] =
            static_cast<uint32_t>(count_bits(above[i]) | count_bits(ties[i]) << 16);
    }
    sync();
    scan_counts(memory.counts, entries);
    sync();
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const uint32_t lower = memory.counts[i * warps() + warp()];
      const auto higher = static_cast<uint32_t>(count_bits(above[i] & lanes_below()));
      const auto equal = static_cast<uint32_t>(count_bits(ties[i] & lanes_below()));
      const uint32_t tie = ties_before + (lower >> 16) + equal;
      const uint32_t taken = tie < bar.ties ? tie : bar.ties;
      const bool chosen =
          (above[i] >> lane() & 1u) != 0 || ((ties[i] >> lane() & 1u) != 0 && tie < bar.ties);
      const int n = keys.token(tile, i);
      if (chosen) emit(above_before + (lower & 0xffffu) + higher + taken, n);
      const Lanes bits = ballot(chosen);
      if (lane() == 0 && n < keys.end) word(n / kWarp, bits);
    }
    above_before += memory.counts[entries] & 0xffffu;
    ties_before += memory.counts[entries] >> 16;
    sync();
  }
  return above_before + (ties_before < bar.ties ? ties_before : bar.ties);
}

// How many tokens of this block Rule::kThreshold chooses.
__device__ inline uint32_t count_always(ScoreKeys& keys, const SelectMemory& memory) {
  uint32_t count = 0;
  for (int tile = 0; tile < keys.tiles; ++tile) {
    keys.load_tile(tile, false);
#pragma unroll
    for (int i = 0; i < ScoreKeys::kKeys; ++i) count += keys.key[i] == kAlways;
  }
  return block_sum(count, memory.counts);
}

// Selects `need` tokens, or with Rule::kThreshold all that it chooses, and returns how many this
// block and lower ones have chosen. All threads of all blocks call it; it ends with a barrier of
// the block.
template <class Team, class Emit, class Word>
__device__ uint32_t select_tokens(ScoreKeys& keys, uint32_t need, const SelectMemory& memory,
                                  const Team& team, const Emit& emit, const Word& word) {
  Found mine{};
  Bar bar{kAlways, UINT32_MAX};
  if (keys.rule == Rule::kThreshold) {
    if (Team::kMany) mine.ties = count_always(keys, memory);
  } else {
    if (keys.row.keep != nullptr)
      keys.rule = count_kept(keys, memory, team) < need ? Rule::kKeptFirst : Rule::kKeptOnly;
    bar = find_bar(keys, need, memory, team, mine);
  }
  const bool loaded = keys.rule == Rule::kThreshold ? Team::kMany : need > 0;
  return choose(keys, bar, loaded, team.before(mine), memory, emit, word);
}

}  // namespace tk::cuda
