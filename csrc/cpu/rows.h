// Copies rows of bytes, past the cache where the output is too large to stay in it.
#pragma once

#include "cpu/simd.h"

namespace tk::TK_ISA {
namespace {

// Outputs beyond this size leave the last-level cache before anyone reads them, so writing them
// need not fetch their lines first.
constexpr int64_t kStreamingBytes = int64_t{16} << 20;

#if defined(__AVX512F__)
TK_INLINE void stream_line(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX2__)
TK_INLINE void stream_line(char* to, const char* from) {
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
}
#else
TK_INLINE void stream_line(char* to, const char* from) { std::memcpy(to, from, 64); }
#endif

// After the last streamed row of a task, before its thread says it is done.
TK_INLINE void streaming_done() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

TK_INLINE void copy_row(char* to, const char* from, int64_t bytes, bool streaming) {
  if (!streaming || bytes < 256) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63u);
  if (head > 0) std::memcpy(to, from, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + 64 <= bytes; at += 64) stream_line(to + at, from + at);
  if (at < bytes) std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
}

TK_INLINE void zero_row(char* to, int64_t bytes, bool streaming) {
  if (!streaming || bytes < 256) {
    std::memset(to, 0, static_cast<size_t>(bytes));
    return;
  }
  alignas(64) static constexpr char kZeros[64] = {};
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63u);
  std::memset(to, 0, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + 64 <= bytes; at += 64) stream_line(to + at, kZeros);
  std::memset(to + at, 0, static_cast<size_t>(bytes - at));
}

}  // namespace
}  // namespace tk::TK_ISA
