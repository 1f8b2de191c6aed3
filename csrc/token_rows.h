// Fills the struct of rows from sizes and strides, for either binding.
#pragma once

#include "tokenkernels.h"

namespace tk::bind {

// (…, D), or (…, G, D) with `grouped`: `dims` sizes and strides, in elements. Leading dimensions
// that lie in one stride are joined; false where more than TokenRows::kMaxDims are left.
inline bool set_rows(const int64_t* sizes, const int64_t* strides, int64_t dims, bool grouped,
                     TokenRows& rows) {
  const int64_t leading = dims - 1 - grouped;
  rows.stride = strides[dims - 1];
  rows.group_stride = grouped ? strides[dims - 2] : 0;
  rows.rows = 1;
  rows.dims = 0;
  for (int64_t i = 0; i < leading; ++i) {
    rows.rows *= sizes[i];
    if (sizes[i] == 1) continue;
    const int last = rows.dims - 1;
    if (last >= 0 && rows.strides[last] == sizes[i] * strides[i]) {
      rows.sizes[last] *= sizes[i];
      rows.strides[last] = strides[i];
      continue;
    }
    if (rows.dims == TokenRows::kMaxDims) return false;
    rows.sizes[rows.dims] = sizes[i];
    rows.strides[rows.dims++] = strides[i];
  }
  return true;
}

}  // namespace tk::bind
