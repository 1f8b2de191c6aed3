// Moves the kept positions of a key/value cache together: checks every index row, then copies or
// rotates rows, tensor by tensor.
#include "cpu/compact.h"

namespace tk::TK_ISA {
namespace {

// One tensor of one sample and head: slot j of `length` receives the row at positions[j].
struct Move {
  const char* from;
  char* to;
  int64_t from_row, to_row, bytes;
  const int64_t* positions;
  int64_t length;
  bool streaming;  // the result is larger than the cache
  int64_t ahead;   // how many slots ahead of the move rows are asked for

  TK_INLINE const char* source(int64_t position) const { return from + position * from_row; }
  TK_INLINE char* target(int64_t slot) const { return to + slot * to_row; }
};

void move_unit(const CompactKv& p, int64_t tensor, const Cut& cut, int64_t unit, bool streaming) {
  const CompactKv::Tensor& rows = p.tensors[tensor];
  const Part part = part_of(p, tensor, cut, unit);
  if (part.bytes == 0) return;
  const int64_t from = part.b * rows.from_batch + part.g * rows.from_head + part.column;
  const int64_t to = part.b * rows.to_batch + part.g * rows.to_head + part.column;
  const Move move{static_cast<const char*>(rows.from) + from,
                  static_cast<char*>(rows.to) + to,
                  rows.from_row,
                  rows.to_row,
                  part.bytes,
                  part.positions,
                  part.length,
                  streaming,
                  kAheadBytes / part.bytes};
  move_part(p, move, cut, part);
  if (p.in_place) return;
  for (int64_t slot = part.end; slot < part.last; ++slot) {
    zero_row(move.target(slot), part.bytes, streaming);
  }
}

}  // namespace

Status compact_kv(const CompactKv& p, const Pool& pool) {
  *p.complaint = check(p, pool);
  if (*p.complaint) return Status::kBadValue;
  move_all(
      p, pool,
      [&](int64_t tensor) {
        return cut(p, tensor, p.layers[tensor / p.per_layer].heads, p.tensors[tensor].row_bytes,
                   pool.threads);
      },
      [&](int64_t tensor, const Cut& c, int64_t unit, bool streaming) {
        move_unit(p, tensor, c, unit, streaming);
      });
  return Status::kOk;
}

int64_t compact_kv_scratch(const CompactKv&, int) { return 0; }

}  // namespace tk::TK_ISA
