// CUDA version of ray_cast: one thread per ray. Neighbouring threads have neighbouring directions, so a warp reads
// neighbouring voxels for most of its way.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>

#include "ray_cast.h"

namespace mmdet3d::ray_cast {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) ray_cast_kernel(const Job job, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) job.run(i);
}

Outputs ray_cast_cuda(const at::Tensor& grids, const at::Tensor& origins, const at::Tensor& rays,
                      const at::Tensor& grid_index, int64_t free_label, at::ArrayRef<double> low, double cell_size,
                      int64_t max_steps, bool with_entry) {
  const World world = check_arguments(grids, origins, rays, grid_index, free_label, low, cell_size, max_steps);
  const c10::cuda::CUDAGuard guard(grids.device());
  const Outputs outputs = make_outputs(origins, rays, with_entry);
  const at::Tensor labels = grids.contiguous(), starts = origins.contiguous(), index = grid_index.contiguous();
  const at::Tensor directions = rays.to(at::kDouble).contiguous();
  const Job job = make_job(world, labels, starts, directions, index, outputs, with_entry);
  const int64_t count = starts.size(0) * job.num_rays, blocks = (count + kThreads - 1) / kThreads;
  if (count == 0) return outputs;  // a launch of no block is an error
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "ray_cast: too many rays, got ", count);
  ray_cast_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(job, count);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("ray_cast", &ray_cast_cuda); }

}  // namespace mmdet3d::ray_cast
