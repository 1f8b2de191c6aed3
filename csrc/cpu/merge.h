// What both merges do with token rows: squared norms, weighted sums, copies; and how far they go
// before they look back. Internal to one object file, like simd.h.
#pragma once

#include "cpu/rows.h"

namespace tk::TK_ISA {
namespace {

// Windows are measured, then placed, then written: three phases, on stretches of this many bytes,
// which are still in the last-level cache when they are read again. Each phase ends with a barrier,
// so that much shorter stretches would wait more than they read.
constexpr int64_t kStretchBytes = int64_t{4} << 20;

// A range of work smaller than this is not worth another thread.
constexpr int64_t kGrainBytes = int64_t{1} << 16;

constexpr float kSmallestNorm = 1e-8f;

TK_INLINE float square_root(float value) { return __builtin_sqrtf(value); }

// 2·kLanes consecutive elements, in an order that is no business of anyone who sums over all of
// them or stores them as a pair again: bfloat16 come as even and odd ones, which costs half of
// widening them in order.
struct Pair {
  Floats a, b;
};

constexpr int kPair = 2 * kLanes;

template <class T>
TK_INLINE Pair load_pair(const T* from) {
  return {load(from), load(from + kLanes)};
}

template <class T>
TK_INLINE void store_pair(T* to, Pair value) {
  store(to, value.a);
  store(to + kLanes, value.b);
}

constexpr int32_t kHigh = -65536;  // the upper half of 32 bits

TK_INLINE Pair load_pair(const BFloat16* from) {
  Ints both;
  std::memcpy(&both, from, sizeof both);
  return {reinterpret_cast<Floats>(both << 16), reinterpret_cast<Floats>(both & kHigh)};
}

// Bits rounded to their upper half, to nearest even; a NaN stays a NaN.
TK_INLINE Ints round_high(Floats value) {
  const Ints bits = reinterpret_cast<Ints>(value);
  return value == value ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}

TK_INLINE void store_pair(BFloat16* to, Pair value) {
  const Ints both = (round_high(value.a) >> 16 & 0xffff) | (round_high(value.b) & kHigh);
  std::memcpy(to, &both, sizeof both);
}

TK_INLINE int lanes_left(int64_t channels, int64_t c) {
  return static_cast<int>(smaller<int64_t>(kLanes, channels - c));
}

// ‖row‖², in one order that depends on the number of channels alone.
template <class T>
TK_INLINE float sum_of_squares(const T* row, int64_t channels) {
  Floats s0{}, s1{}, s2{}, s3{};
  int64_t c = 0;
  for (; c + 2 * kPair <= channels; c += 2 * kPair) {
    const Pair x = load_pair(row + c), y = load_pair(row + c + kPair);
    s0 += x.a * x.a;
    s1 += x.b * x.b;
    s2 += y.a * y.a;
    s3 += y.b * y.b;
  }
  for (; c < channels; c += kLanes) {
    const Floats value = load_some(row + c, lanes_left(channels, c));
    s0 += value * value;
  }
  return sum((s0 + s1) + (s2 + s3));
}

TK_INLINE void add_pair(Pair& sum, Pair value, Floats weight) {
  sum.a += value.a * weight;
  sum.b += value.b * weight;
}

// Calls pairs(channel, pair) and then rest(channel, vector, count) with Σ weight · row over the
// tokens that `visit` enumerates as (row, weight), for all channels. Many channels of all tokens at
// a time, so that the sums stay in registers.
template <class T, class Visit, class Pairs, class Rest>
TK_INLINE void weighted_sum(int64_t channels, const Visit& visit, const Pairs& pairs,
                            const Rest& rest) {
  int64_t c = 0;
  for (; c + 4 * kPair <= channels; c += 4 * kPair) {
    Pair s0{}, s1{}, s2{}, s3{};
    visit([&](const T* row, float weight) {
      const Floats w = splat(weight);
      add_pair(s0, load_pair(row + c), w);
      add_pair(s1, load_pair(row + c + kPair), w);
      add_pair(s2, load_pair(row + c + 2 * kPair), w);
      add_pair(s3, load_pair(row + c + 3 * kPair), w);
    });
    pairs(c, s0);
    pairs(c + kPair, s1);
    pairs(c + 2 * kPair, s2);
    pairs(c + 3 * kPair, s3);
  }
  for (; c + kPair <= channels; c += kPair) {
    Pair s{};
    visit([&](const T* row, float weight) { add_pair(s, load_pair(row + c), splat(weight)); });
    pairs(c, s);
  }
  for (; c < channels; c += kLanes) {
    const int count = lanes_left(channels, c);
    Floats s{};
    visit([&](const T* row, float weight) { s += load_some(row + c, count) * splat(weight); });
    rest(c, s, count);
  }
}

// Whole cache lines, aligned, past the cache.
template <class T>
TK_INLINE void stream_pair(T* to, Pair value) {
  T lines[kPair];
  store_pair(lines, value);
  for (int i = 0; i < kPair; i += static_cast<int>(64 / sizeof(T))) {
    stream_line(reinterpret_cast<char*>(to + i), reinterpret_cast<const char*>(lines + i));
  }
}

// Sums over their total. Where the result is rounded to half the bits, a factor is as good as a
// division, which takes longer than reading the tokens, unless the factor overflows.
template <class T>
struct Divisor {
  bool divides;
  Floats value;

  TK_INLINE explicit Divisor(float total)
      : divides(sizeof(T) == 4 || __builtin_fabsf(total) < 1e-38f),
        value(splat(divides ? total : 1.0f / total)) {}
  TK_INLINE Floats operator()(Floats sum) const { return divides ? sum / value : sum * value; }
};

// The mean Σ weight · row / total, into `to`.
template <class T, class Visit>
TK_INLINE void weighted_mean(T* to, float total, int64_t channels, bool streaming,
                             const Visit& visit) {
  const Divisor<T> mean_of(total);
  const bool lines =
      streaming && kPair * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
  weighted_sum<T>(
      channels, visit,
      [&](int64_t c, Pair s) {
        const Pair mean{mean_of(s.a), mean_of(s.b)};
        if (lines) return stream_pair(to + c, mean);
        store_pair(to + c, mean);
      },
      [&](int64_t c, Floats s, int count) { store_some(to + c, mean_of(s), count); });
}

template <class T>
TK_INLINE void copy_token(T* to, const T* from, int64_t channels, bool streaming) {
  const auto bytes = static_cast<int64_t>(sizeof(T)) * channels;
  copy_row(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from), bytes, streaming);
}

}  // namespace
}  // namespace tk::TK_ISA
