// Fills the struct of a compaction from the lists of a call, for either binding.
#pragma once

#include "tokenkernels.h"

namespace tk::bind {

// All that points into lists, when these are complete.
template <class Call>
void set_pointers(Call& call) {
  CompactKv& p = call.p;
  p.layers = call.layers.data();
  p.tensors = call.tensors.data();
  p.indices = call.indices.data();
  p.lengths = call.lengths.empty() ? nullptr : call.lengths.data();
  p.old_positions = call.old_positions.data();
  p.new_positions = call.new_positions.data();
  p.layer_count = static_cast<int64_t>(call.layers.size());
  p.index_count = static_cast<int64_t>(call.indices.size());
  p.length_count = static_cast<int64_t>(call.lengths.size());
  p.old_count = static_cast<int64_t>(call.old_positions.size());
  p.new_count = static_cast<int64_t>(call.new_positions.size());
}

}  // namespace tk::bind
