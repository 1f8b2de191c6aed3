// The C++ API of vector quantisation: nearest codes, residual chains, statistics. Part of
// tokenkernels.h.
#pragma once

#include <cstdint>

#include "numeric.h"
#include "pool.h"

namespace tk {

// Vectors of D elements under any number of leading dimensions: row r is the r-th of them in C
// order. With groups, the last leading dimension is set apart: element (r, g, d) lies at offset(r)
// + g·group_stride + d·stride.
struct TokenRows {
  static constexpr int kMaxDims = 8;
  const void* data;
  DType dtype;
  int64_t rows;  // ∏ sizes
  int dims;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t group_stride, stride;
};

// G codebooks of K codes; element (g, k, d) lies at g·group_stride + k·code_stride + d·stride.
struct Codebooks {
  const void* data;
  DType dtype;
  int64_t groups, codes, dim;
  int64_t group_stride, code_stride, stride;
};

// assign_nearest: the nearest of K codes for every row of every group, never an N×K matrix. Outputs
// are contiguous.
struct AssignNearest {
  TokenRows x;         // (rows, G, D)
  Codebooks codebook;  // (G, K, D)
  enum class Metric : int32_t { kL2, kCosine, kDot } metric;
  int64_t* index;   // (rows, G)
  float* distance;  // (rows, G) or null: ‖x−e‖², 1 − cos, −⟨x,e⟩
  void* codes;  // (rows, G, D) of the codebook's dtype, or null: the rows of the codebook, as they
                // are
  void* scratch;
};
Status assign_nearest(const AssignNearest& params, const Pool& pool);
int64_t assign_nearest_scratch(const AssignNearest& params, int threads);
const char* assign_nearest_cuda(const AssignNearest& params, void* stream);
int64_t assign_nearest_cuda_scratch(const AssignNearest& params);

// assign_residual: Q rounds of the l2 search, each on what the rounds before left over. Outputs are
// contiguous.
struct AssignResidual {
  TokenRows x;          // (rows, 1, D)
  Codebooks codebooks;  // (Q, K, D)
  int64_t* index;       // (rows, Q)
  void* residual;       // (rows, D) of x's dtype: x minus its Q codes, rounded once
  void* scratch;
};
Status assign_residual(const AssignResidual& params, const Pool& pool);
int64_t assign_residual_scratch(const AssignResidual& params, int threads);
const char* assign_residual_cuda(const AssignResidual& params, void* stream);
int64_t assign_residual_cuda_scratch(const AssignResidual& params);

// accumulate_codes: how many rows chose each code, and their sum, in ascending order of rows
// whatever the number of threads.
struct AccumulateCodes {
  TokenRows x;           // (rows, G, D)
  const int64_t* index;  // (rows, G) contiguous; −1: this row counts nowhere; anything else outside
                         // 0…K−1 is a bad value
  int64_t groups, codes, dim;
  int64_t* counts;  // (G, K)
  float* sums;      // (G, K, D)
  void* scratch;
};
Status accumulate_codes(const AccumulateCodes& params, const Pool& pool);
int64_t accumulate_codes_scratch(const AccumulateCodes& params, int threads);
const char* accumulate_codes_cuda(const AccumulateCodes& params, void* stream);
int64_t accumulate_codes_cuda_scratch(const AccumulateCodes& params);

}  // namespace tk
