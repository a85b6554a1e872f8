// CPU version of frustum_cells: threads over the depths of the cameras, vectors over pixels.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "frustum_cells.h"

namespace mmdet3d::frustum_cells {
namespace {

// Pixels of the original image, (h, w).
MMDET3D_UNFUSED MMDET3D_MULTIVERSION void find_pixels(const Arguments& args, const Camera& camera,
                                                      float* __restrict__ x, float* __restrict__ y) {
  for (int64_t row = 0; row < args.height; ++row) {
    for (int64_t column = 0; column < args.width; ++column) {
      const Pixel pixel = original_pixel(camera, args.columns[column], args.rows[row]);
      x[row * args.width + column] = pixel.x;
      y[row * args.width + column] = pixel.y;
    }
  }
}

// Voxels of all pixels at one depth.
MMDET3D_UNFUSED MMDET3D_MULTIVERSION void find_cells(const Arguments& args, const Camera& camera, int64_t count,
                                                     const float* __restrict__ x, const float* __restrict__ y,
                                                     float depth, int32_t* __restrict__ cells) {
  const Arguments steps = args;  // copies, which the results cannot overwrite
  const Camera rig = camera;
  for (int64_t i = 0; i < count; ++i) cells[i] = cell_at(steps, rig, x[i], y[i], depth);
}

at::Tensor frustum_cells_cpu(const at::Tensor& pixel_from_augmented, const at::Tensor& offset,
                             const at::Tensor& ego_from_pixel, const at::Tensor& translation, const at::Tensor& bda,
                             const at::Tensor& columns, const at::Tensor& rows, const at::Tensor& depths,
                             at::ArrayRef<double> low, at::ArrayRef<double> cell, at::IntArrayRef size_xyz,
                             bool truncate_toward_zero) {
  const Prepared prepared(pixel_from_augmented, offset, ego_from_pixel, translation, bda, columns, rows, depths, low,
                          cell, size_xyz, truncate_toward_zero);
  const Arguments args = prepared.arguments();
  if (prepared.cells.numel() == 0) return prepared.cells;
  const int64_t pixels = args.height * args.width;
  at::parallel_for(0, args.cameras * args.num_depths, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> x(pixels), y(pixels);
    Camera camera;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t depth = job % args.num_depths;
      if (job == begin || depth == 0) {
        const int64_t n = job / args.num_depths;
        camera = args.camera(n, n / args.per_sample);
        find_pixels(args, camera, x.data(), y.data());
      }
      find_cells(args, camera, pixels, x.data(), y.data(), args.depths[depth], args.cells + job * pixels);
    }
  });
  return prepared.cells;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("frustum_cells", &frustum_cells_cpu); }

}  // namespace mmdet3d::frustum_cells
