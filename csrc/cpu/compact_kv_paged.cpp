// Moves the kept positions of a paged key/value cache to the front blocks of each sample: checks
// index and block table, then copies or rotates rows, whose places the table tells.
#include "cpu/compact.h"

namespace tk::TK_ISA {
namespace {

constexpr const char* kBadBlocks =
    "block_table: allowed blocks of the pool where rows are, those written once, got others";

// The blocks of one sample.
struct Blocks {
  const void* ids;
  int64_t stride, size;
  int shift;  // size is 1 << shift, or −1
  bool wide;

  TK_INLINE int64_t at(int64_t i) const {
    if (wide) return static_cast<const int64_t*>(ids)[i * stride];
    return static_cast<const int32_t*>(ids)[i * stride];
  }
  TK_INLINE int64_t of(int64_t position) const {
    return shift < 0 ? position / size : position >> shift;
  }
};

TK_INLINE Blocks blocks_of(const CompactKvPaged& p, int64_t b) {
  const int64_t offset = b * p.table_batch_stride * (p.wide ? 8 : 4), size = p.block_size;
  const int shift = (size & (size - 1)) == 0 ? __builtin_ctzll(static_cast<uint64_t>(size)) : -1;
  return {static_cast<const char*>(p.table) + offset, p.table_stride, size, shift, p.wide};
}

// One tensor of one sample and head: slot j of `length` receives the row at positions[j].
struct Move {
  char* rows;
  Blocks blocks;
  int64_t block_stride, row_stride, bytes;
  const int64_t* positions;
  int64_t length;
  bool streaming;  // the result is larger than the cache
  int64_t ahead;   // how many slots ahead of the move rows are asked for

  TK_INLINE char* target(int64_t slot) const {
    const int64_t block = blocks.of(slot);
    return rows + blocks.at(block) * block_stride + (slot - block * blocks.size) * row_stride;
  }
  TK_INLINE const char* source(int64_t position) const { return target(position); }
};

// The blocks that the longest of some lengths takes, of any layer and head.
template <class LengthAt>
TK_INLINE void take_longest(int64_t heads, const LengthAt& length_at, int64_t& longest) {
  for (int64_t g = 0; g < heads; ++g) longest = larger(longest, length_at(g));
}

int64_t blocks_before(const CompactKvPaged& p, int64_t b) {
  int64_t longest = 0;
  for (int64_t i = 0; i < p.cache.length_count; ++i) {
    const Rows& rows = p.cache.lengths[i];
    take_longest(rows.heads, [&](int64_t g) { return at(rows, b, g, 0); }, longest);
  }
  return smaller(p.max_blocks, longest / p.block_size + (longest % p.block_size > 0));
}

int64_t blocks_after(const CompactKvPaged& p, int64_t b) {
  int64_t longest = 0;
  for (int64_t i = 0; i < p.cache.index_count; ++i) {
    const Index& index = p.cache.indices[i];
    take_longest(
        index.kept.heads, [&](int64_t g) { return index.lengths[row_of(index.kept, b, g)]; },
        longest);
  }
  return ceil_div(longest, p.block_size);
}

// Marks the blocks of sample b that receive other rows.
void mark_moves(const CompactKvPaged& p, const Index& index, int64_t b, char* written) {
  for (int64_t g = 0; g < index.kept.heads; ++g) {
    const int64_t row = row_of(index.kept, b, g), length = index.lengths[row];
    const int64_t* positions = index.positions + row * index.kept.count;
    for (int64_t block = 0; block * p.block_size < length; ++block) {
      const int64_t end = smaller(length, (block + 1) * p.block_size);
      int64_t moves = 0;
      for (int64_t slot = block * p.block_size; slot < end; ++slot) {
        moves |= positions[slot] ^ slot;
      }
      if (moves) written[block] = 1;
    }
  }
}

// Marks those where keys of a layer are turned.
void mark_turns(const CompactKvPaged& p, int64_t layer, int64_t b, char* written) {
  const CompactKv& cache = p.cache;
  const Index& index = of_layer(cache.indices, cache.index_count, layer);
  const Rows& old_positions = of_layer(cache.old_positions, cache.old_count, layer);
  const Rows& new_positions = of_layer(cache.new_positions, cache.new_count, layer);
  const Blocks blocks = blocks_of(p, b);
  const bool shared = index.kept.heads == 1 && old_positions.heads == 1 && new_positions.heads == 1;
  const int64_t heads = cache.layers[layer].heads;
  for (int64_t g = 0; g < (shared ? smaller<int64_t>(1, heads) : heads); ++g) {
    const int64_t row = row_of(index.kept, b, g);
    const int64_t* positions = index.positions + row * index.kept.count;
    Entries entries(cache, index, b, g, 0);
    for (int64_t slot = 0; slot < index.lengths[row]; ++slot) {
      const int64_t entry = entries.next(slot, positions[slot]);
      if (at(new_positions, b, g, entry) != at(old_positions, b, g, entry)) {
        written[blocks.of(slot)] = 1;
      }
    }
  }
}

// Whether blocks with rows are in the pool, and those that are written stand in the table once.
// scratch: per sample and block whether it is written; per block of the pool how often it stands
// there, 0, 1 or more.
const char* check_blocks(const CompactKvPaged& p, const Pool& pool) {
  const CompactKv& cache = p.cache;
  char* written = static_cast<char*>(p.scratch);
  char* owners = written + cache.batch * p.max_blocks;
  const bool same = cache.index_count == 1 && cache.old_count == 1 && cache.new_count == 1;
  const int64_t layers = same ? 1 : cache.layer_count;
  parallel_for(pool, cache.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      char* mine = written + b * p.max_blocks;
      std::memset(mine, 0, static_cast<size_t>(p.max_blocks));
      for (int64_t i = 0; i < cache.index_count; ++i) mark_moves(p, cache.indices[i], b, mine);
      for (int64_t layer = 0; cache.inv_freq && layer < layers; ++layer) {
        mark_turns(p, layer, b, mine);
      }
    }
  });
  std::memset(owners, 0, static_cast<size_t>(p.block_count));
  for (int64_t b = 0; b < cache.batch; ++b) {
    const Blocks blocks = blocks_of(p, b);
    for (int64_t i = 0; i < blocks_before(p, b); ++i) {
      const int64_t id = blocks.at(i);
      if (id < 0 || id >= p.block_count) return kBadBlocks;
      owners[id] = static_cast<char>(smaller(2, owners[id] + 1));
    }
  }
  for (int64_t b = 0; b < cache.batch; ++b) {
    const Blocks blocks = blocks_of(p, b);
    for (int64_t i = 0; i < blocks_before(p, b); ++i) {
      if (written[b * p.max_blocks + i] && owners[blocks.at(i)] > 1) return kBadBlocks;
    }
  }
  return nullptr;
}

void tell_freed(const CompactKvPaged& p) {
  for (int64_t b = 0; b < p.cache.batch; ++b) {
    const Blocks blocks = blocks_of(p, b);
    const int64_t first = blocks_after(p, b), count = blocks_before(p, b) - first;
    for (int64_t i = 0; i < p.max_blocks; ++i) {
      p.freed[b * p.max_blocks + i] = i < count ? blocks.at(first + i) : -1;
    }
  }
}

// Heads that lie one behind the other and keep the same rows move as one.
TK_INLINE bool together(const CompactKv& p, int64_t tensor) {
  const int64_t layer = tensor / p.per_layer;
  const CompactKv::Tensor& rows = p.tensors[tensor];
  const bool rotate = p.inv_freq && tensor % p.per_layer == 0;
  return !rotate && of_layer(p.indices, p.index_count, layer).kept.heads == 1 &&
         rows.from_head == rows.row_bytes;
}

TK_INLINE Cut cut_of(const CompactKv& p, int64_t tensor, int threads) {
  const int64_t heads = p.layers[tensor / p.per_layer].heads, bytes = p.tensors[tensor].row_bytes;
  return together(p, tensor) ? cut(p, tensor, 1, heads * bytes, threads)
                             : cut(p, tensor, heads, bytes, threads);
}

void move_unit(const CompactKvPaged& p, int64_t tensor, const Cut& cut, int64_t unit,
               bool streaming) {
  const CompactKv::Tensor& rows = p.cache.tensors[tensor];
  const Part part = part_of(p.cache, tensor, cut, unit);
  if (part.bytes == 0) return;
  const Move move{static_cast<char*>(rows.to) + part.g * rows.from_head + part.column,
                  blocks_of(p, part.b),
                  rows.from_batch,
                  rows.from_row,
                  part.bytes,
                  part.positions,
                  part.length,
                  streaming,
                  kAheadBytes / part.bytes};
  move_part(p.cache, move, cut, part);
}

}  // namespace

Status compact_kv_paged(const CompactKvPaged& p, const Pool& pool) {
  const char* complaint = check(p.cache, pool);
  if (!complaint) complaint = check_blocks(p, pool);
  *p.cache.complaint = complaint;
  if (complaint) return Status::kBadValue;
  tell_freed(p);
  move_all(
      p.cache, pool, [&](int64_t tensor) { return cut_of(p.cache, tensor, pool.threads); },
      [&](int64_t tensor, const Cut& c, int64_t unit, bool streaming) {
        move_unit(p, tensor, c, unit, streaming);
      });
  return Status::kOk;
}

int64_t compact_kv_paged_scratch(const CompactKvPaged& p, int) {
  return p.cache.batch * p.max_blocks + p.block_count;
}

}  // namespace tk::TK_ISA
