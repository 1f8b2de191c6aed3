// What launch.cuh means on the CPU: its primitives as calls of the executor. Included by launch.cuh
// only, compiled with the hooks of the thread sanitizer.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "cuda_on_host/executor.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ [[gnu::noinline]]
#define TK_INLINE [[gnu::always_inline]] inline

namespace tk::cuda {

namespace host {

enum class Change : uint8_t { kAdd, kMin, kMax, kOr, kStore, kCompare, kLoad };
void read(void* to, const void* from, size_t bytes);
void write(void* to, const void* from, size_t bytes);
uint64_t atomic(void* place, size_t bytes, bool negative, Change change, uint64_t value,
                uint64_t expected);

// "… [with auto kernel = tk::{anonymous}::fill_kernel; Args = …]": the part that names the kernel.
inline const char* name_in(std::string_view signature, std::string& name) {
  const size_t from = signature.find("kernel = ") + 9;
  name = signature.substr(from, signature.find_first_of(";]", from) - from);
  for (const char* part : {"tk::", "{anonymous}::"}) {
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.erase(at, std::strlen(part));
  }
  return name.c_str();
}

template <class T>
TK_INLINE Words giving(const T& value) {
  static_assert(sizeof(T) <= sizeof(Words));
  Words give{};
  std::memcpy(&give, &value, sizeof value);
  return give;
}

template <class T>
TK_INLINE T gotten(const Words& words) {
  T value;
  std::memcpy(&value, &words, sizeof value);
  return value;
}

void settle_shuffle(Exchanges lanes, uint32_t mask);
void settle_ballot(Exchanges lanes, uint32_t mask);
void settle_match(Exchanges lanes, uint32_t mask);
void settle_sync(Exchanges lanes, uint32_t mask);
void settle_nothing(Exchanges lanes, uint32_t mask);

inline constexpr Meeting kWarpSync = {"warp_sync", settle_sync};
inline constexpr Meeting kShuffle = {"shuffle", settle_shuffle};
inline constexpr Meeting kShuffleUp = {"shuffle_up", settle_shuffle};
inline constexpr Meeting kShuffleDown = {"shuffle_down", settle_shuffle};
inline constexpr Meeting kShuffleXor = {"shuffle_xor", settle_shuffle};
inline constexpr Meeting kBallot = {"ballot", settle_ballot};
inline constexpr Meeting kMatch = {"match", settle_match};
extern const Meeting kReduceAdd, kReduceAnd, kReduceOr;
extern const Meeting kReduceMin[2], kReduceMax[2];  // of unsigned, of signed numbers

}  // namespace host

// Launches.

inline int64_t most_shared() { return 227 * 1024; }

template <auto kernel>
int most_cluster() {
  return 8;
}

template <auto kernel, class... Params>
const char* launch_as(void (*)(Params...), const char* name, const Launch& how,
                      std::type_identity_t<Params>... params) {
  auto body = [&] { kernel(params...); };
  host::run({name,
             {how.blocks, how.blocks_y, how.blocks_z},
             how.threads,
             how.cluster,
             how.shared,
             [](void* context) { (*static_cast<decltype(body)*>(context))(); },
             &body});
  return nullptr;
}

template <auto kernel, class... Args>
const char* launch(const Launch& how, Args&&... args) {
  if (how.blocks == 0 || how.blocks_y == 0 || how.blocks_z == 0) return nullptr;
  std::string name;
  if (how.blocks < 0 || how.blocks_y < 0 || how.blocks_z < 0 || how.blocks > 0x7fffffff ||
      how.blocks_y > 65535 || how.blocks_z > 65535 || how.threads < 1 || how.threads > 1024 ||
      how.threads % kWarp != 0 || how.cluster < 1 || how.cluster > 8 ||
      how.blocks % how.cluster != 0 || how.shared < 0 || how.shared > most_shared())
    return "cuda_on_host: a launch that no GPU takes";
  return launch_as<kernel>(kernel, host::name_in(__PRETTY_FUNCTION__, name), how,
                           std::forward<Args>(args)...);
}

inline const char* zero(void* to, int64_t bytes, void*) {
  if (host::note({"memset", {1, 1, 1}, 1, 1, 0, nullptr, nullptr})) return nullptr;
  std::memset(to, 0, static_cast<size_t>(bytes));
  return nullptr;
}

inline int64_t multiprocessors() { return host::multiprocessors(); }

// Coordinates and barriers.

TK_INLINE int thread() { return host::thread_here(); }
TK_INLINE int threads() { return host::threads_here(); }
TK_INLINE int lane() { return thread() % kWarp; }
TK_INLINE int64_t block() { return host::block_here(0); }
TK_INLINE int64_t block_y() { return host::block_here(1); }
TK_INLINE int64_t block_z() { return host::block_here(2); }
TK_INLINE int64_t blocks() { return host::blocks_here(); }

TK_INLINE void sync(TK_SITE) { host::barrier(false, site); }
TK_INLINE int sync_count(bool condition, TK_SITE) { return host::barrier(condition, site); }
TK_INLINE bool sync_any(bool condition, TK_SITE) { return host::barrier(condition, site) != 0; }
TK_INLINE bool sync_all(bool condition, TK_SITE) {
  return host::barrier(condition, site) == threads();
}

namespace detail {

constexpr int64_t kGap = 16;  // between two arrays, so that running over the end of one shows

TK_INLINE void* shared_array(int64_t at, int64_t bytes) { return host::take_shared(at, bytes); }

}  // namespace detail

// Warps.

TK_INLINE void warp_sync(Lanes mask = kAllLanes, TK_SITE) {
  host::exchange(host::kWarpSync, {mask}, site, {});
}

namespace host {

template <class T>
TK_INLINE T shuffled(const Meeting& how, const T& value, int from, Lanes mask, Site site) {
  return gotten<T>(exchange(how, {mask, from}, site, giving(value)));
}

}  // namespace host

template <class T>
TK_INLINE T shuffle(const T& value, int from, Lanes mask = kAllLanes, TK_SITE) {
  return host::shuffled(host::kShuffle, value, from & 31, mask, site);
}

template <class T>
TK_INLINE T shuffle_up(const T& value, int by, Lanes mask = kAllLanes, TK_SITE) {
  const int mine = lane(), from = mine - by;
  return host::shuffled(host::kShuffleUp, value, from < 0 ? mine : from, mask, site);
}

template <class T>
TK_INLINE T shuffle_down(const T& value, int by, Lanes mask = kAllLanes, TK_SITE) {
  const int mine = lane(), from = mine + by;
  return host::shuffled(host::kShuffleDown, value, from > 31 ? mine : from, mask, site);
}

template <class T>
TK_INLINE T shuffle_xor(const T& value, int with, Lanes mask = kAllLanes, TK_SITE) {
  return host::shuffled(host::kShuffleXor, value, (lane() ^ with) & 31, mask, site);
}

TK_INLINE Lanes ballot(bool condition, Lanes mask = kAllLanes, TK_SITE) {
  return host::gotten<Lanes>(host::exchange(host::kBallot, {mask}, site, {condition, 0}));
}

template <class T>
TK_INLINE Lanes match(T value, Lanes mask = kAllLanes, TK_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  return host::gotten<Lanes>(host::exchange(host::kMatch, {mask}, site, host::giving(value)));
}

namespace host {

template <class T>
TK_INLINE T reduce(const Meeting& how, T value, Lanes mask, Site site) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
  return gotten<T>(exchange(how, {mask}, site, giving(value)));
}

}  // namespace host

template <class T>
TK_INLINE T reduce_add(T value, Lanes mask = kAllLanes, TK_SITE) {
  return host::reduce(host::kReduceAdd, value, mask, site);
}
template <class T>
TK_INLINE T reduce_min(T value, Lanes mask = kAllLanes, TK_SITE) {
  return host::reduce(host::kReduceMin[std::is_signed_v<T>], value, mask, site);
}
template <class T>
TK_INLINE T reduce_max(T value, Lanes mask = kAllLanes, TK_SITE) {
  return host::reduce(host::kReduceMax[std::is_signed_v<T>], value, mask, site);
}
TK_INLINE uint32_t reduce_and(uint32_t value, Lanes mask = kAllLanes, TK_SITE) {
  return host::reduce(host::kReduceAnd, value, mask, site);
}
TK_INLINE uint32_t reduce_or(uint32_t value, Lanes mask = kAllLanes, TK_SITE) {
  return host::reduce(host::kReduceOr, value, mask, site);
}

// Bits of a word, numbers.

TK_INLINE int count_bits(uint32_t word) { return std::popcount(word); }
TK_INLINE int lowest_bit(uint32_t word) { return word == 0 ? -1 : std::countr_zero(word); }
TK_INLINE int highest_bit(uint32_t word) { return 31 - std::countl_zero(word); }

template <class T>
TK_INLINE float widen(T value) {
  return to_float(value);
}
template <class T>
TK_INLINE T narrow(float value) {
  return from_float<T>(value);
}

TK_INLINE float rounded_product(float left, float right) { return left * right; }

TK_INLINE float exp2_flushed(float value) { return value < -126.0f ? 0.0f : std::exp2(value); }

// Memory.

template <class V, Hint hint = kKeep>
TK_INLINE V load(const void* from) {
  V value;
  host::read(&value, from, sizeof value);
  return value;
}

template <Hint hint = kKeep, class V>
TK_INLINE void store(void* to, const V& value) {
  static_assert(hint != kReadOnly);
  host::write(to, &value, sizeof value);
}

namespace host {

template <class T>
TK_INLINE T change(T* place, Change how, T value, T expected = {}) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  return static_cast<T>(atomic(const_cast<std::remove_const_t<T>*>(place), sizeof(T),
                               std::is_signed_v<T>, how, static_cast<uint64_t>(value),
                               static_cast<uint64_t>(expected)));
}

}  // namespace host

template <class T>
TK_INLINE T atomic_add(T* to, T value) {
  return host::change(to, host::Change::kAdd, value);
}
template <class T>
TK_INLINE T atomic_min(T* to, T value) {
  return host::change(to, host::Change::kMin, value);
}
template <class T>
TK_INLINE T atomic_max(T* to, T value) {
  return host::change(to, host::Change::kMax, value);
}
template <class T>
TK_INLINE T atomic_or(T* to, T value) {
  return host::change(to, host::Change::kOr, value);
}
template <class T>
TK_INLINE T atomic_exchange(T* to, T value) {
  return host::change(to, host::Change::kStore, value);
}
template <class T>
TK_INLINE T atomic_compare_exchange(T* to, T expected, T value) {
  return host::change(to, host::Change::kCompare, value, expected);
}
template <class T>
TK_INLINE T load_acquire(const T* from) {
  return host::change(const_cast<T*>(from), host::Change::kLoad, T{});
}
template <class T>
TK_INLINE T load_relaxed(const T* from) {
  return host::change(const_cast<T*>(from), host::Change::kLoad, T{});
}
template <class T>
TK_INLINE void store_release(T* to, T value) {
  host::change(to, host::Change::kStore, value);
}
template <class T>
TK_INLINE void store_relaxed(T* to, T value) {
  host::change(to, host::Change::kStore, value);
}
TK_INLINE void fence() {}

template <class Condition>
TK_INLINE void wait_until(const Condition& condition, TK_SITE) {
  for (bool first = true; !condition(); first = false) host::yield(first, site);
}

}  // namespace tk::cuda
