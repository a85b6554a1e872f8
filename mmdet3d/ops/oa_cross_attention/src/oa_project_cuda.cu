// CUDA version of oa_project_points: one thread for one point in one camera.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "oa_project.h"

namespace mmdet3d::oa_project {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) project_kernel(const Job<T> job, unsigned count) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) job.run(static_cast<int>(i));
}

Outputs project_points(const at::Tensor& points, const at::Tensor& matrices, double span_x, double span_y,
                       double min_depth) {
  const c10::cuda::CUDAGuard guard(points.device());
  const Outputs outputs = make_outputs(points, matrices);
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "oa_project_points", [&] {
    with_job<scalar_t>(points, matrices, span_x, span_y, min_depth, outputs,
                       [](const Job<scalar_t>& job, int64_t count) {
                         if (count == 0) return;  // a launch of no block is an error
                         const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
                         project_kernel<<<blocks, kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
                             job, static_cast<unsigned>(count));
                         C10_CUDA_KERNEL_LAUNCH_CHECK();
                       });
  });
  return outputs;
}

}  // namespace
}  // namespace mmdet3d::oa_project

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("oa_project_points", &mmdet3d::oa_project::project_points); }
