// CUDA version of frustum_cells.
//
// A thread takes one pixel of one camera at a few depths. Neighbouring threads take neighbouring pixels, so that they
// write neighbouring voxels; the matrices are the same for the whole block, which reads them from the cache.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "frustum_cells.h"

namespace mmdet3d::frustum_cells {
namespace {

constexpr int kThreads = 128;
constexpr int kDepths = 8;  // of a thread
constexpr int64_t kMaxBlocks = 65535;  // along the second and the third axis of a launch

__global__ void __launch_bounds__(kThreads) frustum_cells_kernel(const Arguments args) {
  const int width = static_cast<int>(args.width), pixels = static_cast<int>(args.height) * width;
  const int pixel = blockIdx.x * kThreads + threadIdx.x;
  if (pixel >= pixels) return;
  const Camera camera = args.camera(blockIdx.z, blockIdx.z / static_cast<unsigned>(args.per_sample));
  const Pixel original = original_pixel(camera, args.columns[pixel % width], args.rows[pixel / width]);
  const int first = blockIdx.y * kDepths, count = min(kDepths, static_cast<int>(args.num_depths) - first);
  int32_t* cells = args.cells + (blockIdx.z * args.num_depths + first) * pixels + pixel;
#pragma unroll
  for (int i = 0; i < kDepths; ++i) {
    if (i < count) {
      cells[static_cast<int64_t>(i) * pixels] = cell_at(args, camera, original.x, original.y, args.depths[first + i]);
    }
  }
}

at::Tensor frustum_cells_cuda(const at::Tensor& pixel_from_augmented, const at::Tensor& offset,
                              const at::Tensor& ego_from_pixel, const at::Tensor& translation, const at::Tensor& bda,
                              const at::Tensor& columns, const at::Tensor& rows, const at::Tensor& depths,
                              at::ArrayRef<double> low, at::ArrayRef<double> cell, at::IntArrayRef size_xyz,
                              bool truncate_toward_zero) {
  const c10::cuda::CUDAGuard guard(offset.device());
  const Prepared prepared(pixel_from_augmented, offset, ego_from_pixel, translation, bda, columns, rows, depths, low,
                          cell, size_xyz, truncate_toward_zero);
  const Arguments args = prepared.arguments();
  if (prepared.cells.numel() == 0) return prepared.cells;  // a launch of no block is an error
  const int64_t pixels = args.height * args.width, blocks = (pixels + kThreads - 1) / kThreads;
  const int64_t groups = (args.num_depths + kDepths - 1) / kDepths;
  TORCH_CHECK(pixels <= std::numeric_limits<int32_t>::max() - kThreads && groups <= kMaxBlocks && args.cameras <= kMaxBlocks,
              "frustum_cells: ", args.cameras, " cameras of ", args.height, " x ", args.width, " pixels and ",
              args.num_depths, " depths are more than one launch can serve");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups), static_cast<unsigned>(args.cameras));
  frustum_cells_kernel<<<grid, kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return prepared.cells;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("frustum_cells", &frustum_cells_cuda); }

}  // namespace mmdet3d::frustum_cells
