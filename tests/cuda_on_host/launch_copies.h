// What launch.cuh means on the CPU, second part: copies beside the threads, gates, clusters.
#pragma once

#include "cuda_on_host/launch_host.h"

namespace tk::cuda {

namespace host {

void begin_copy(void* to, const void* from, size_t bytes, bool take);
void commit(bool stores);
void finish(bool stores, int left);
void begin_store(void* to, const void* from, size_t bytes);
void init_gate(void* gate, int arrivals);
void arrive(void* gate);
void copy_at_gate(void* gate, void* to, const void* from, size_t bytes);
void wait_gate(void* gate, uint32_t phase, Site site);
void fence_bulk();
void* shared_of(void* mine, int rank);

inline constexpr Meeting kCopyBulk = {"copy_bulk", settle_nothing};
inline constexpr Meeting kStoreBulk = {"store_bulk", settle_nothing};

}  // namespace host

template <int bytes>
TK_INLINE void copy_async(void* to, const void* from, bool take = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  host::begin_copy(to, from, bytes, take);
}

TK_INLINE void commit_copies() { host::commit(false); }

template <int left>
TK_INLINE void wait_copies() {
  host::finish(false, left);
}

TK_INLINE void init_gate(Gate* gate, int arrivals) { host::init_gate(gate, arrivals); }
TK_INLINE void arrive(Gate* gate) { host::arrive(gate); }
TK_INLINE void wait_gate(Gate* gate, uint32_t phase, TK_SITE) {
  host::wait_gate(gate, phase, site);
}

// The whole warp calls, one lane does it.
TK_INLINE void copy_bulk(void* to, const void* from, int64_t bytes, Gate* gate, TK_SITE) {
  host::exchange(host::kCopyBulk, {kAllLanes}, site, {});
  if (lane() == 0) host::copy_at_gate(gate, to, from, static_cast<size_t>(bytes));
}

TK_INLINE void store_bulk(void* to, const void* from, int64_t bytes, TK_SITE) {
  host::exchange(host::kStoreBulk, {kAllLanes}, site, {});
  if (lane() == 0) host::begin_store(to, from, static_cast<size_t>(bytes));
}

TK_INLINE void commit_stores() { host::commit(true); }

template <int left>
TK_INLINE void wait_stores(TK_SITE) {
  host::finish(true, left);
  warp_sync(kAllLanes, site);
}

TK_INLINE void fence_bulk() { host::fence_bulk(); }

TK_INLINE int cluster_rank() { return host::rank_here(); }
TK_INLINE int cluster_blocks() { return host::cluster_here(); }
TK_INLINE void sync_cluster(TK_SITE) { host::cluster_barrier(site); }

template <class T>
TK_INLINE T* shared_of(T* mine, int rank) {
  return static_cast<T*>(host::shared_of(mine, rank));
}

}  // namespace tk::cuda
