// Checks of oa_project_points, and its CPU version: threads over points.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "oa_project.h"

namespace mmdet3d::oa_project {

Outputs make_outputs(const at::Tensor& points, const at::Tensor& matrices) {
  TORCH_CHECK(points.dim() == 3 && points.size(2) == 4, "oa_project_points: points must have shape (Q, Z, 4), got ",
              points.sizes());
  TORCH_CHECK(matrices.dim() == 4 && matrices.size(2) == 4 && matrices.size(3) == 4,
              "oa_project_points: image_from_points must have shape (B, N, 4, 4), got ", matrices.sizes());
  TORCH_CHECK(matrices.scalar_type() == points.scalar_type() && matrices.device() == points.device(),
              "oa_project_points: image_from_points must be ", points.scalar_type(), " on ", points.device(),
              " like points, got ", matrices.scalar_type(), " on ", matrices.device());
  const at::DimVector shape{matrices.size(1), matrices.size(0), points.size(0), points.size(1)};
  const at::DimVector pairs{shape[0], shape[1], shape[2], shape[3], 2};
  Outputs outputs{at::empty(pairs, points.options()), at::empty(shape, points.options()),
                  at::empty(shape, points.options().dtype(at::kBool))};
  TORCH_CHECK(std::get<0>(outputs).numel() <= std::numeric_limits<int32_t>::max(),
              "oa_project_points: the positions must have fewer than 2^31 elements, got shape ", pairs);
  return outputs;
}

namespace {

template <typename T>
MMDET3D_INLINE void run_all(const Job<T>& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) job.run(static_cast<int>(i));
}

MMDET3D_MULTIVERSION void run(const Job<float>& job, int64_t begin, int64_t end) { run_all(job, begin, end); }
MMDET3D_MULTIVERSION void run(const Job<double>& job, int64_t begin, int64_t end) { run_all(job, begin, end); }

Outputs project_points(const at::Tensor& points, const at::Tensor& matrices, double span_x, double span_y,
                       double min_depth) {
  const Outputs outputs = make_outputs(points, matrices);
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "oa_project_points", [&] {
    with_job<scalar_t>(points, matrices, span_x, span_y, min_depth, outputs, [](const auto& job, int64_t count) {
      at::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) { run(job, begin, end); });
    });
  });
  return outputs;
}

}  // namespace
}  // namespace mmdet3d::oa_project

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("oa_project_points", &mmdet3d::oa_project::project_points); }
