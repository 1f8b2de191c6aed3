// Moves the kept positions of a paged key/value cache to the front blocks of each sample on a GPU:
// compact_kv in place, its rows found through the block table.
#include "cuda/compact_table.cuh"

namespace tk {

const char* compact_kv_paged_cuda(const CompactKvPaged& p, void* stream) {
  compact::Pages pages{};
  pages.table = p.table;
  pages.batch_stride = p.table_batch_stride;
  pages.stride = p.table_stride;
  pages.most_blocks = p.max_blocks;
  pages.block_count = p.block_count;
  pages.block_size = p.block_size;
  const bool power = (p.block_size & (p.block_size - 1)) == 0;
  pages.shift = power ? __builtin_ctzll(static_cast<unsigned long long>(p.block_size)) : -1;
  pages.wide = p.wide;
  pages.freed = p.freed;
  pages.longest = static_cast<int64_t*>(p.scratch);
  return compact::run(p.cache, pages, stream);
}

int64_t compact_kv_paged_cuda_scratch(const CompactKvPaged& p) {
  return p.cache.batch * 2 * int64_t{sizeof(int64_t)};
}

}  // namespace tk
