// The best tokens of one row of scores, by one block: a radix search for the last score that is
// good enough, then a scan that gives the chosen tokens in ascending order, lowest ties first.
#pragma once

#include "cuda/launch.cuh"

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

// A row of scores as tiles of kKeys keys per thread: thread t holds tokens t, t + threads, … of a
// tile. What fits one tile is loaded once.
class ScoreKeys {
 public:
  static constexpr int kKeys = 8;

  const ScoreRow row;
  Rule rule;
  const int tiles;
  uint32_t key[kKeys];

  __device__ ScoreKeys(const ScoreRow& scores, Rule first_rule, float least)
      : row(scores),
        rule(first_rule),
        tiles((scores.tokens + kKeys * threads() - 1) / (kKeys * threads())),
        threshold_(least) {}

  __device__ int token(int tile, int i) const { return (tile * kKeys + i) * threads() + thread(); }

  __device__ bool kept(int n) const {
    return row.keep != nullptr &&
           load<unsigned char, kReadOnly>(row.keep + n * row.keep_stride) != 0;
  }

  // The key of a score alone.
  __device__ uint32_t key_of(int n) const {
    if (row.dtype == DType::kFloat32) return ordered(at<float>(n));
    return row.dtype == DType::kFloat16 ? ordered(at<Half>(n)) : ordered(at<BFloat16>(n));
  }

  __device__ void load_tile(int tile, bool first) {
    if (tiles == 1 && !first) return;
    if (row.dtype == DType::kFloat32) {
      load_as<float>(tile);
    } else if (row.dtype == DType::kFloat16) {
      load_as<Half>(tile);
    } else {
      load_as<BFloat16>(tile);
    }
  }

 private:
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
      if (n < row.tokens) {
        score[i] = at<T>(n);
        here[i] = rule != Rule::kByScore && kept(n);
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
      key[i] = token(tile, i) < row.tokens ? ruled(score[i], here[i]) : kNever;
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

// What a selection needs of the arena. Every lane counts in one of kCopies histograms, so that no
// more than four lanes meet even where all scores are equal.
struct SelectMemory {
  static constexpr int kDigits = 256, kCopies = 8;
  static constexpr int kCounts = ScoreKeys::kKeys * kWarp + 1, kWords = 3 + kDigits / kWarp;

  uint32_t* histogram;  // (kDigits, kCopies)
  uint32_t* counts;     // of warps and keys, their sum behind them
  uint32_t* words;      // digit, count above, count at it; the sums of eight warps

  __device__ explicit SelectMemory(Arena& arena)
      : histogram(arena.shared<uint32_t>(kDigits * kCopies)),
        counts(arena.shared<uint32_t>(kCounts)),
        words(arena.shared<uint32_t>(kWords)) {}

  static constexpr int64_t bytes() {
    return shared_bytes<uint32_t>(kDigits * kCopies) + shared_bytes<uint32_t>(kCounts) +
           shared_bytes<uint32_t>(kWords);
  }
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

__device__ inline uint32_t count_kept(const ScoreKeys& keys, const SelectMemory& memory) {
  uint32_t count = 0;
  for (int n = thread(); n < keys.row.tokens; n += threads()) count += keys.kept(n);
  return block_sum(count, memory.counts);
}

// Keys from `key` on are chosen, of those equal to it the first `ties`.
struct Bar {
  uint32_t key, ties;
};

// Adds up the copies, clears them, and finds the digit where, counted from the highest, the number
// of keys reaches `need`.
__device__ inline void find_digit(const SelectMemory& memory, uint32_t need) {
  constexpr int kDigits = SelectMemory::kDigits, kCopies = SelectMemory::kCopies;
  uint32_t *const totals = memory.words + 3, count = 0, reached = 0;
  const int digit = kDigits - 1 - thread();
  if (digit >= 0) {
    uint32_t* copies = memory.histogram + digit * kCopies;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      count += copies[c];
      copies[c] = 0;
    }
    reached = warp_scan(count);
    if (lane() == kWarp - 1) totals[warp()] = reached;
  }
  sync();
  if (digit >= 0) {
    for (int w = 0; w < warp(); ++w) reached += totals[w];
    if (reached >= need && reached - count < need) {
      memory.words[0] = static_cast<uint32_t>(digit);
      memory.words[1] = reached - count;
      memory.words[2] = count;
    }
  }
  sync();
}

// The highest bar that `need` keys reach, byte by byte from the top; early where exactly as many
// share the bytes found so far as are still to be had.
__device__ inline Bar find_bar(ScoreKeys& keys, uint32_t need, const SelectMemory& memory) {
  constexpr int kCopies = SelectMemory::kCopies;
  if (need == 0) return {UINT32_MAX, 0};
  for (int i = thread(); i < SelectMemory::kDigits * kCopies; i += threads())
    memory.histogram[i] = 0;
  sync();
  const int lowest = keys.row.dtype == DType::kFloat32 ? 0 : 16;
  uint32_t bar = 0, known = 0;
  for (int shift = 24; shift >= lowest; shift -= 8) {
    for (int tile = 0; tile < keys.tiles; ++tile) {
      keys.load_tile(tile, shift == 24);
#pragma unroll
      for (int i = 0; i < ScoreKeys::kKeys; ++i) {
        const uint32_t digit = keys.key[i] >> shift & 255u;
        if (keys.token(tile, i) < keys.row.tokens && ((keys.key[i] ^ bar) & known) == 0)
          atomic_add(&memory.histogram[static_cast<int>(digit) * kCopies + lane() % kCopies], 1u);
      }
    }
    sync();
    find_digit(memory, need);
    bar |= memory.words[0] << shift;
    known |= 255u << shift;
    need -= memory.words[1];
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
// word(w, bits) once for every 32 tokens, with a bit for each that was chosen. Returns how many.
template <class Emit, class Word>
__device__ uint32_t choose(ScoreKeys& keys, Bar bar, bool loaded, const SelectMemory& memory,
                           const Emit& emit, const Word& word) {
  constexpr int kKeys = ScoreKeys::kKeys;
  const int entries = kKeys * warps();
  uint32_t above_before = 0, ties_before = 0;
  for (int tile = 0; tile < keys.tiles; ++tile) {
    keys.load_tile(tile, !loaded);
    Lanes above[kKeys], ties[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const bool here = keys.token(tile, i) < keys.row.tokens;
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
      const uint32_t before = memory.counts[i * warps() + warp()];
      const auto higher = static_cast<uint32_t>(count_bits(above[i] & lanes_below()));
      const auto equal = static_cast<uint32_t>(count_bits(ties[i] & lanes_below()));
      const uint32_t tie = ties_before + (before >> 16) + equal;
      const uint32_t taken = tie < bar.ties ? tie : bar.ties;
      const bool chosen =
          (above[i] >> lane() & 1u) != 0 || ((ties[i] >> lane() & 1u) != 0 && tie < bar.ties);
      const int n = keys.token(tile, i);
      if (chosen) emit(above_before + (before & 0xffffu) + higher + taken, n);
      const Lanes bits = ballot(chosen);
      if (lane() == 0 && n < keys.row.tokens) word(n / kWarp, bits);
    }
    above_before += memory.counts[entries] & 0xffffu;
    ties_before += memory.counts[entries] >> 16;
    sync();
  }
  return above_before + (ties_before < bar.ties ? ties_before : bar.ties);
}

// Selects `need` tokens, or with Rule::kThreshold all that it chooses. All threads call it; it ends
// with a barrier.
template <class Emit, class Word>
__device__ uint32_t select_tokens(ScoreKeys& keys, uint32_t need, const SelectMemory& memory,
                                  const Emit& emit, const Word& word) {
  if (keys.rule == Rule::kThreshold)
    return choose(keys, {kAlways, UINT32_MAX}, false, memory, emit, word);
  if (keys.row.keep != nullptr)
    keys.rule = count_kept(keys, memory) < need ? Rule::kKeptFirst : Rule::kKeptOnly;
  const Bar bar = find_bar(keys, need, memory);
  return choose(keys, bar, need > 0, memory, emit, word);
}

}  // namespace tk::cuda
