// CPU version of oa_assign_queries: threads over cameras and samples.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "oa_assign.h"

namespace mmdet3d::oa_assign {
namespace {

at::Tensor assign_queries(const at::Tensor& seen) {
  check_inputs(seen);
  const auto mask = seen.contiguous();
  const auto options = seen.options().dtype(at::kInt);
  const at::Tensor position = at::empty(seen.sizes(), options), query = at::empty(seen.sizes(), options);
  const at::Tensor length = at::empty(seen.sizes().slice(0, 2), options), source = at::empty(seen.sizes(), options);
  const bool* is_seen = mask.const_data_ptr<bool>();
  int32_t *places = position.mutable_data_ptr<int32_t>(), *lists = query.mutable_data_ptr<int32_t>();
  int32_t *lengths = length.mutable_data_ptr<int32_t>(), *result = source.mutable_data_ptr<int32_t>();
  const int queries = static_cast<int>(seen.size(2));
  at::parallel_for(0, length.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; ++list) {
      int32_t count = 0;
      for (int q = 0; q < queries; ++q) {
        const int64_t row = list * queries + q;
        places[row] = is_seen[row] ? count : -1;
        if (is_seen[row]) lists[list * queries + count++] = q;
      }
      lengths[list] = count;
    }
  });
  const Lists found{places, lists, lengths, static_cast<int>(seen.size(0)), static_cast<int>(seen.size(1)), queries};
  at::parallel_for(0, seen.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) result[row] = found.find_source(static_cast<int>(row));
  });
  return source;
}

}  // namespace
}  // namespace mmdet3d::oa_assign

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("oa_assign_queries", &mmdet3d::oa_assign::assign_queries); }
