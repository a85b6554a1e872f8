// What the CPU and the CUDA version of oa_assign_queries share. The contract is in ../assignment.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>

#include <cstdint>
#include <limits>

namespace mmdet3d::oa_assign {

// The lists of queries that the cameras see.
struct Lists {
  const int32_t* position;  // (N, B, Q) place of a query in its list, -1 where it is not seen
  const int32_t* query;     // (N, B, Q) lists, of which the first `length` entries count
  const int32_t* length;    // (N, B)
  int cameras, batch, queries;

  // Query that the last camera with a list long enough has at the place where this one has query `row % queries`;
  // -1 where it is not seen. `row` counts (N, B, Q).
  C10_HOST_DEVICE inline int32_t find_source(int row) const {
    const int place = position[row], sample = row / queries % batch;
    if (place < 0) return -1;
    int camera = cameras - 1;
    while (length[camera * batch + sample] <= place) --camera;  // ends: the query's own list is long enough
    return query[(camera * batch + sample) * queries + place];
  }
};

inline void check_inputs(const at::Tensor& seen) {
  TORCH_CHECK(seen.dim() == 3 && seen.scalar_type() == at::kBool,
              "oa_assign_queries: seen must be a bool tensor of shape (N, B, Q), got ", seen.scalar_type(),
              " of shape ", seen.sizes());
  TORCH_CHECK(seen.numel() <= std::numeric_limits<int32_t>::max(),
              "oa_assign_queries: seen must have fewer than 2^31 elements, got shape ", seen.sizes());
}

}  // namespace mmdet3d::oa_assign
