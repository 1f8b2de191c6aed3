// Rows that move as bytes, whatever their dtype: words of up to 16 bytes, four in flight per
// thread.
#pragma once

#include "cuda/launch.cuh"

namespace tk::cuda {

constexpr int kWordsInFlight = 4;

__device__ inline int64_t place_of(const void* address) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(address));
}

// The widest word of at most 16 bytes that divides all that was or-ed into `places`: addresses,
// strides and sizes in bytes.
__host__ __device__ inline int word_of(int64_t places) {
  return static_cast<int>((places | 16) & -(places | 16));
}

// Where part number `part` of `parts` begins that divide `all` evenly; `part` may be `parts`.
__device__ inline uint32_t begin_of(uint32_t part, uint32_t all, uint32_t parts) {
  const uint32_t each = all / parts, more = all - each * parts;
  return part * each + (part < more ? part : more);
}

// Every `workers`-th word of rows of `words` words, row after row, from word `worker` on.
// Neighbours are with neighbouring words, and all are busy however short the rows.
struct RowCursor {
  int64_t row, word, words;
  int row_step, word_step;

  __device__ RowCursor(int64_t words_of_row, int worker, int workers) : words(words_of_row) {
    const int length = words < INT32_MAX ? static_cast<int>(words) : INT32_MAX;
    row = worker / length;
    word = worker % length;
    row_step = workers / length;
    word_step = workers % length;
  }

  __device__ void next() {
    row += row_step;
    word += word_step;
    if (word >= words) {
      word -= words;
      ++row;
    }
  }
};

struct MovedRow {
  const char* from;  // null: zeros
  char* to;
};

template <class Word, Hint hint, class Row>
__device__ void move_words(int64_t rows, int64_t words, int worker, int workers, const Row& row) {
  RowCursor at(words, worker, workers);
  while (at.row < rows) {
    MovedRow moved[kWordsInFlight];
    Word values[kWordsInFlight] = {};
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      moved[i] = {nullptr, nullptr};
      if (at.row < rows) {
        moved[i] = row(at.row);
        const int64_t byte = at.word * int64_t{sizeof(Word)};
        if (moved[i].from != nullptr) moved[i].from += byte;
        moved[i].to += byte;
      }
      at.next();
    }
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      if (moved[i].from != nullptr) values[i] = load<Word, hint>(moved[i].from);
    }
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      if (moved[i].to != nullptr) store<kStream>(moved[i].to, values[i]);
    }
  }
}

// Moves rows 0 … rows−1 of `row_bytes` each, words of `word` bytes, divided among `workers`
// threads; row(r) gives the MovedRow. With kReadOnly nobody writes what is read; in place, kKeep.
template <Hint hint = kReadOnly, class Row>
__device__ void move_rows(int64_t rows, int64_t row_bytes, int word, int worker, int workers,
                          const Row& row) {
  if (row_bytes == 0) return;
  switch (word) {
    case 16:
      return move_words<Vector<uint32_t, 4>, hint>(rows, row_bytes / 16, worker, workers, row);
    case 8:
      return move_words<Vector<uint32_t, 2>, hint>(rows, row_bytes / 8, worker, workers, row);
    case 4:
      return move_words<uint32_t, hint>(rows, row_bytes / 4, worker, workers, row);
    case 2:
      return move_words<uint16_t, hint>(rows, row_bytes / 2, worker, workers, row);
    default:
      return move_words<uint8_t, hint>(rows, row_bytes, worker, workers, row);
  }
}

}  // namespace tk::cuda
