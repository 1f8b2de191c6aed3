// What both merges do with token rows: squared norms, weighted sums, copies; and how far they go before they look back.
// Internal to one object file, like simd.h.
#pragma once

#include "cpu/rows.h"

namespace tk::TK_ISA {
namespace {

// Tokens are measured, then placed, then written: three phases, on stretches of this many bytes, which are still in a
// second-level cache when they are read again.
constexpr int64_t kStretchBytes = int64_t{2} << 20;

// A range of work smaller than this is not worth another thread.
constexpr int64_t kGrainBytes = int64_t{1} << 16;

constexpr int kBlock = 4;  // vectors of channels that are summed over all tokens of a window before the next ones

constexpr float kSmallestNorm = 1e-8f;

TK_INLINE float square_root(float value) { return __builtin_sqrtf(value); }

// The first `count` elements, mostly all of them: the partial load of a narrow instruction set goes through memory.
template <class T>
TK_INLINE Floats load_some(const T* from, int count) {
  return count == kLanes ? load(from) : load(from, count);
}

template <class T>
TK_INLINE void store_some(T* to, Floats value, int count) {
  if (count == kLanes) return store(to, value);
  store(to, value, count);
}

// ‖row‖², in one order that depends on the number of channels alone.
template <class T>
TK_INLINE float sum_of_squares(const T* row, int64_t channels) {
  Floats sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Floats value = load(row + c + v * kLanes);
      sums[v] += value * value;
    }
  }
  for (; c < channels; c += kLanes) {
    const Floats value = load_some(row + c, static_cast<int>(smaller<int64_t>(kLanes, channels - c)));
    sums[0] += value * value;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls finish(channel, vector, count) with Σ weight · row over the tokens that `visit` enumerates as (row, weight),
// for all channels, kLanes or fewer at a time.
template <class T, class Visit, class Finish>
TK_INLINE void weighted_sum(int64_t channels, const Visit& visit, const Finish& finish) {
  int64_t c = 0;
  for (; c + kBlock * kLanes <= channels; c += kBlock * kLanes) {
    Floats s0{}, s1{}, s2{}, s3{};
    visit([&](const T* row, float weight) {
      const Floats w = splat(weight);
      s0 += load(row + c) * w;
      s1 += load(row + c + kLanes) * w;
      s2 += load(row + c + 2 * kLanes) * w;
      s3 += load(row + c + 3 * kLanes) * w;
    });
    finish(c, s0, kLanes);
    finish(c + kLanes, s1, kLanes);
    finish(c + 2 * kLanes, s2, kLanes);
    finish(c + 3 * kLanes, s3, kLanes);
  }
  for (; c < channels; c += kLanes) {
    const int count = static_cast<int>(smaller<int64_t>(kLanes, channels - c));
    Floats s{};
    visit([&](const T* row, float weight) { s += load_some(row + c, count) * splat(weight); });
    finish(c, s, count);
  }
}

template <class T>
TK_INLINE void copy_token(T* to, const T* from, int64_t channels, bool streaming) {
  const auto bytes = static_cast<int64_t>(sizeof(T)) * channels;
  copy_row(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), bytes, streaming);
}

}  // namespace
}  // namespace tk::TK_ISA
