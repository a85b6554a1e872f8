// What the CPU and the CUDA version of frustum_cells share. The contract is in ../frustum_cells.py.
#pragma once

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "multiversion.h"
#include "rounded_math.h"

namespace mmdet3d::frustum_cells {

struct Axis {
  float low, cell;
  float least;  // the least voxel coordinate that belongs to voxel 0
  float end;
  int32_t size;
};

// One camera, with the BEV augmentation of its sample.
struct Camera {
  float pixel_from_augmented[2][2], offset[2];
  float ego_from_pixel[3][3], translation[3];
  float bda[3][3], bda_translation[3];
};

struct Pixel {
  float x, y;
};

// The arguments, contiguous.
struct Arguments {
  const float* __restrict__ pixel_from_augmented;  // (B * N, 2, 2)
  const float* __restrict__ offset;                // (B * N, 2)
  const float* __restrict__ ego_from_pixel;        // (B * N, 3, 3)
  const float* __restrict__ translation;           // (B * N, 3)
  const float* __restrict__ bda;                   // (B, 4, 4)
  const float* __restrict__ columns;               // (w,)
  const float* __restrict__ rows;                  // (h,)
  const float* __restrict__ depths;                // (D,)
  int32_t* __restrict__ cells;                     // (B * N, D, h, w)
  int64_t cameras, per_sample, num_depths, height, width;
  Axis x, y, z;

  // Camera `n` of all, which belongs to sample `b`.
  C10_HOST_DEVICE MMDET3D_INLINE Camera camera(int64_t n, int64_t b) const {
    Camera camera;
    for (int i = 0; i < 2; ++i) {
      camera.offset[i] = offset[2 * n + i];
      for (int k = 0; k < 2; ++k) camera.pixel_from_augmented[i][k] = pixel_from_augmented[4 * n + 2 * i + k];
    }
    const float* sample = bda + 16 * b;
    for (int i = 0; i < 3; ++i) {
      camera.translation[i] = translation[3 * n + i];
      camera.bda_translation[i] = sample[4 * i + 3];
      for (int k = 0; k < 3; ++k) {
        camera.ego_from_pixel[i][k] = ego_from_pixel[9 * n + 3 * i + k];
        camera.bda[i][k] = sample[4 * i + k];
      }
    }
    return camera;
  }
};

// Step 1: a pixel (u, v) of the network's image in the original one.
C10_HOST_DEVICE MMDET3D_INLINE Pixel original_pixel(const Camera& camera, float u, float v) {
  const float x = add(u, -camera.offset[0]), y = add(v, -camera.offset[1]);
  return {dot(camera.pixel_from_augmented[0], x, y), dot(camera.pixel_from_augmented[1], x, y)};
}

// Voxel coordinate along an axis as an integer, and whether that is a voxel. Without branches, for vectors.
C10_HOST_DEVICE MMDET3D_INLINE int32_t coordinate(const Axis& axis, float position, bool& inside) {
  const float along = divide(add(position, -axis.low), axis.cell);
  const bool here = (along >= axis.least) & (along < axis.end);  // false for what is not a number
  inside &= here;
  return static_cast<int32_t>(here ? along : 0.0f);
}

// Steps 2 to 5: flat index of the voxel of a pixel at a depth, -1 for none.
C10_HOST_DEVICE MMDET3D_INLINE int32_t cell_at(const Arguments& args, const Camera& camera, float x, float y,
                                               float depth) {
  const float u = multiply(x, depth), v = multiply(y, depth);
  const float ego_x = add(dot(camera.ego_from_pixel[0], u, v, depth), camera.translation[0]);
  const float ego_y = add(dot(camera.ego_from_pixel[1], u, v, depth), camera.translation[1]);
  const float ego_z = add(dot(camera.ego_from_pixel[2], u, v, depth), camera.translation[2]);
  bool inside = true;
  const int32_t i = coordinate(args.x, add(dot(camera.bda[0], ego_x, ego_y, ego_z), camera.bda_translation[0]), inside);
  const int32_t j = coordinate(args.y, add(dot(camera.bda[1], ego_x, ego_y, ego_z), camera.bda_translation[1]), inside);
  const int32_t k = coordinate(args.z, add(dot(camera.bda[2], ego_x, ego_y, ego_z), camera.bda_translation[2]), inside);
  return inside ? (k * args.y.size + j) * args.x.size + i : -1;
}

// What Arguments points at, checked. The callers in Python check with better messages; these checks keep a direct call
// through torch.ops inside its memory.
struct Prepared {
  std::vector<at::Tensor> inputs;
  at::Tensor cells;
  std::array<Axis, 3> axes;

  Prepared(const at::Tensor& pixel_from_augmented, const at::Tensor& offset, const at::Tensor& ego_from_pixel,
           const at::Tensor& translation, const at::Tensor& bda, const at::Tensor& columns, const at::Tensor& rows,
           const at::Tensor& depths, at::ArrayRef<double> low, at::ArrayRef<double> cell, at::IntArrayRef size_xyz,
           bool truncate_toward_zero) {
    TORCH_CHECK(offset.dim() == 3, "frustum_cells: offset must be (B, N, 2), got ", offset.sizes());
    TORCH_CHECK(columns.dim() == 1 && rows.dim() == 1 && depths.dim() == 1,
                "frustum_cells: columns, rows and depths must have one axis, got ", columns.sizes(), ", ",
                rows.sizes(), " and ", depths.sizes());
    const int64_t B = offset.size(0), N = offset.size(1);
    const auto take = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
      TORCH_CHECK(tensor.sizes() == shape && tensor.scalar_type() == at::kFloat && tensor.device() == offset.device(),
                  "frustum_cells: ", name, " must be float32 ", shape, " on ", offset.device(), ", got ",
                  tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
      inputs.push_back(tensor.contiguous());
    };
    take("pixel_from_augmented", pixel_from_augmented, {B, N, 2, 2});
    take("offset", offset, {B, N, 2});
    take("ego_from_pixel", ego_from_pixel, {B, N, 3, 3});
    take("translation", translation, {B, N, 3});
    take("bda", bda, {B, 4, 4});
    take("columns", columns, columns.sizes());
    take("rows", rows, rows.sizes());
    take("depths", depths, depths.sizes());
    TORCH_CHECK(low.size() == 3 && cell.size() == 3 && size_xyz.size() == 3,
                "frustum_cells: low, cell and size_xyz must have three entries each");
    int64_t voxels = 1;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t size = size_xyz[axis];
      TORCH_CHECK(size >= 1 && size <= std::numeric_limits<int32_t>::max() / voxels,
                  "frustum_cells: size_xyz must be positive and below 2^31 voxels, got ", size_xyz);
      voxels *= size;
      axes[axis] = {static_cast<float>(low[axis]), static_cast<float>(cell[axis]),
                    truncate_toward_zero ? std::nextafter(-1.0f, 0.0f) : 0.0f, static_cast<float>(size),
                    static_cast<int32_t>(size)};
    }
    cells = at::empty({B, N, depths.size(0), rows.size(0), columns.size(0)}, offset.options().dtype(at::kInt));
  }

  Arguments arguments() const {
    const auto pointer = [&](int i) { return inputs[i].const_data_ptr<float>(); };
    return {pointer(0), pointer(1), pointer(2), pointer(3), pointer(4), pointer(5), pointer(6), pointer(7),
            cells.mutable_data_ptr<int32_t>(),
            cells.size(0) * cells.size(1), cells.size(1), cells.size(2), cells.size(3), cells.size(4),
            axes[0], axes[1], axes[2]};
  }
};

}  // namespace mmdet3d::frustum_cells
