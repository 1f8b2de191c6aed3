// What a compaction of key/value caches tells its kernels by value: records of tensors, layers and
// lists of integers, as many layers as one launch takes.
#pragma once

#include "cuda/rows.cuh"

namespace tk::compact {

constexpr int kMostLayers = 128;
// Integers of a table; a kernel takes 32764 bytes of parameters, and few cost a launch less.
constexpr int kMany = 3900, kFew = 460;
// What a block moves of one head between two looks at the index.
constexpr int64_t kUnitBytes = 16384;
constexpr int64_t kSliceBytes = 64;  // a column slice is no narrower
constexpr int kStage = 1024;         // rows that a block plans together

// Records say of each other where they are, counted in integers of the table.
struct Plane {  // a tensor; the records of planes are the last ones, from the end on
  const char* from;
  char* to;
  uint16_t kind, layer;
  uint16_t word;   // bytes that move as one; of a key that turns, of its two halves alike
  uint16_t turns;  // whether it holds keys that turn
};

// Strides in bytes. Paged, from_batch is the stride of blocks.
struct Kind {
  int64_t from_batch, from_head, from_row, to_batch, to_head, to_row;
  int64_t heads, tokens, row_bytes;
};

struct Layer {
  uint16_t index, lengths, old_positions, new_positions;  // 0: none
};

struct List {
  const void* values;
  uint16_t strides;
  uint16_t wide;
  int32_t heads;  // 1 where shared
};

struct Strides {
  int64_t batch, head, entry;
};

struct Index {
  List kept;
  int64_t batch, count;
  int64_t *lengths, *positions;
};

// The block table of a paged cache.
struct Pages {
  const void* table;  // null: the cache is not paged
  int64_t batch_stride, stride;
  int64_t most_blocks, block_count, block_size;
  int32_t shift;  // block_size is 1 << shift, or −1
  bool wide;
  bool first, last;  // of the launches of a call
  int64_t* freed;
  int64_t* longest;  // (B, 2): lengths before and after, handed from launch to launch
};

struct Common {
  int64_t batch, half;
  const float* inv_freq;
  int64_t index_rows, index_chunks;  // of the index with most, to be planned; 0: they are already
  Pages pages;
  int32_t planes, per_layer, plans, lengths;  // plans, lengths: layers with their own, or 1
  int32_t slices;                             // columns wanted where rows move one after the other
  DType key_dtype;
  bool fill, in_place;
};

template <int kWords>
struct Table {
  Common common;
  int64_t words[kWords];
};

template <class Record>
constexpr int kWordsOf = (sizeof(Record) + 7) / 8;

// Copied word by word, as parameters of a kernel are read best.
template <class Record, int kWords>
__device__ Record record(const Table<kWords>& table, int at) {
  int64_t words[kWordsOf<Record>];
#pragma unroll
  for (int i = 0; i < kWordsOf<Record>; ++i) words[i] = table.words[at + i];
  Record result;
  memcpy(&result, words, sizeof result);
  return result;
}

template <int kWords>
__device__ Plane plane_of(const Table<kWords>& table, int64_t plane) {
  return record<Plane>(table, kWords - kWordsOf<Plane> * static_cast<int>(plane + 1));
}

// How a plane is cut: rows of one unit, or columns where rows move one after the other.
__host__ __device__ inline int64_t unit_rows(const Common& common, int64_t row_bytes) {
  const int64_t wanted = (common.fill ? 4 : 1) * kUnitBytes / (row_bytes < 1 ? 1 : row_bytes);
  return wanted < 1 ? 1 : wanted > kStage ? kStage : wanted;
}

__host__ __device__ inline int64_t columns(const Common& common, int64_t line_bytes) {
  const int64_t most = line_bytes / kSliceBytes;
  return most < 1 ? 1 : most < common.slices ? most : common.slices;
}

// The places of a row of the index that are looked at: filling, kept rows beyond the new length and
// holes below it, as many of the one as of the other; of keys that turn all.
__host__ __device__ inline int64_t most_moves(const Common& common, const Kind& kind, int64_t count,
                                              bool turns) {
  const bool few = common.fill && common.in_place && !turns && kind.tokens / 2 < count;
  return few ? kind.tokens / 2 : count;
}

__host__ __device__ inline int64_t parts_of(const Common& common, const Kind& kind, int64_t count,
                                            bool turns) {
  if (common.in_place && !common.fill)
    return columns(common, turns ? kind.row_bytes / 2 : kind.row_bytes);
  const int64_t each = unit_rows(common, kind.row_bytes);
  return (most_moves(common, kind, count, turns) + each - 1) / each;
}

// Compacts, in as few launches as there are layers for; with `pages` a paged cache.
const char* run(const CompactKv& p, const Pages& pages, void* stream);

}  // namespace tk::compact
