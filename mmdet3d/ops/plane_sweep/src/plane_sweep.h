// What the CPU and the CUDA version of plane_sweep share. The contract is in ../plane_sweep.py.
#pragma once

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "multiversion.h"
#include "rounded_math.h"

namespace mmdet3d::plane_sweep {

struct Options {
  int64_t invalid_channel;  // -1: the rule is off
  bool invalid_by_position;
  double invalid_penalty;
  double min_depth;
};

// Arguments of the operator that say where the cameras are.
struct Geometry {
  const at::Tensor &pixel_from_augmented, &augmentation, &offset, &older_from_pixel, &translation, &intrinsics;
  at::IntArrayRef image_size;
  const at::Tensor& depths;

  std::array<std::pair<const char*, const at::Tensor*>, 6> cameras() const {
    return {{{"pixel_from_augmented", &pixel_from_augmented},
             {"augmentation", &augmentation},
             {"offset", &offset},
             {"older_from_pixel", &older_from_pixel},
             {"translation", &translation},
             {"intrinsics", &intrinsics}}};
  }
};

// The same of one camera, as a row of the tensor that Steps holds.
template <typename scalar_t>
struct Camera {
  scalar_t pixel_from_augmented[2][2], augmentation[2][2], offset[2];
  scalar_t older_from_pixel[3][3], translation[3], intrinsics[3][3];
};

// What the steps from a pixel to its position in the older map need.
template <typename scalar_t>
struct Lattice {
  const Camera<scalar_t>* cameras;  // (N,)
  const scalar_t* depths;           // (D,)
  const scalar_t* columns;          // (W,) image pixels of the columns of the map
  const scalar_t* rows;             // (H,)
  scalar_t image_last_x, image_last_y, map_last_x, map_last_y, min_depth;
};

template <typename scalar_t>
struct Point {
  scalar_t x, y;
};

// Step 1: a pixel (u, v) of the network's image in the original one.
template <typename scalar_t>
C10_HOST_DEVICE MMDET3D_INLINE Point<scalar_t> original_pixel(const Camera<scalar_t>& camera, scalar_t u, scalar_t v) {
  const scalar_t x = add(u, -camera.offset[0]), y = add(v, -camera.offset[1]);
  return {dot(camera.pixel_from_augmented[0], x, y), dot(camera.pixel_from_augmented[1], x, y)};
}

// Steps 2 to 8: the position in the older map, in pixels; not a number where it is behind the camera.
template <typename scalar_t>
C10_HOST_DEVICE MMDET3D_INLINE Point<scalar_t> older_position(const Lattice<scalar_t>& lattice,
                                                              const Camera<scalar_t>& camera,
                                                              const Point<scalar_t>& pixel, scalar_t depth) {
  const scalar_t x = multiply(pixel.x, depth), y = multiply(pixel.y, depth);
  const scalar_t px = add(dot(camera.older_from_pixel[0], x, y, depth), camera.translation[0]);
  const scalar_t py = add(dot(camera.older_from_pixel[1], x, y, depth), camera.translation[1]);
  const scalar_t pz = add(dot(camera.older_from_pixel[2], x, y, depth), camera.translation[2]);
  const scalar_t scale = dot(camera.intrinsics[2], px, py, pz);
  const scalar_t u = divide(dot(camera.intrinsics[0], px, py, pz), scale);
  const scalar_t v = divide(dot(camera.intrinsics[1], px, py, pz), scale);
  const scalar_t image_x = add(dot(camera.augmentation[0], u, v), camera.offset[0]);
  const scalar_t image_y = add(dot(camera.augmentation[1], u, v), camera.offset[1]);
  // Doubling and halving are exact.
  const scalar_t grid_x = add(multiply(divide(image_x, lattice.image_last_x), scalar_t(2)), scalar_t(-1));
  const scalar_t grid_y = add(multiply(divide(image_y, lattice.image_last_y), scalar_t(2)), scalar_t(-1));
  const scalar_t map_x = multiply(multiply(add(grid_x, scalar_t(1)), scalar_t(0.5)), lattice.map_last_x);
  const scalar_t map_y = multiply(multiply(add(grid_y, scalar_t(1)), scalar_t(0.5)), lattice.map_last_y);
  const bool in_front = pz >= lattice.min_depth;
  const scalar_t nowhere = std::numeric_limits<scalar_t>::quiet_NaN();
  return {in_front ? map_x : nowhere, in_front ? map_y : nowhere};
}

// The four pixels around a position. `index` counts pixels, row by row, of a map with one pixel of zeros on every
// side, so that all four can always be read: it is the upper left one. -1: behind the camera or outside the map.
template <typename scalar_t>
struct Position {
  int64_t index;
  scalar_t right;  // weight of the right column, 0 to 1
  scalar_t lower;  // weight of the lower row, 0 to 1
};

// Largest integer that is not above `value`, which must fit: std::floor is a call on the oldest x86 processors.
C10_HOST_DEVICE inline int64_t floor_to_integer(float value) {
  const int32_t towards_zero = static_cast<int32_t>(value);
  return towards_zero - (static_cast<float>(towards_zero) > value);
}
C10_HOST_DEVICE inline int64_t floor_to_integer(double value) {
  const int64_t towards_zero = static_cast<int64_t>(value);
  return towards_zero - (static_cast<double>(towards_zero) > value);
}

// Written so that a position that is not a number counts as outside. `at` must come from memory or from CUDA code: a
// C++ compiler could otherwise join the product that made it with the differences here.
template <typename scalar_t>
C10_HOST_DEVICE inline Position<scalar_t> locate(const Point<scalar_t>& at, int64_t height, int64_t width) {
  const scalar_t x = at.x, y = at.y;
  if (!(x > -1 && x < static_cast<scalar_t>(width) && y > -1 && y < static_cast<scalar_t>(height))) return {-1, 0, 0};
  const int64_t left = floor_to_integer(x), top = floor_to_integer(y);
  return {(top + 1) * (width + 2) + left + 1, x - static_cast<scalar_t>(left), y - static_cast<scalar_t>(top)};
}

// Keeps what a Lattice points at.
struct Steps {
  at::Tensor cameras, depths, columns, rows;
  at::IntArrayRef image_size;
  double min_depth;

  template <typename scalar_t>
  Lattice<scalar_t> lattice() const {
    static_assert(sizeof(Camera<scalar_t>) == 31 * sizeof(scalar_t));
    return {reinterpret_cast<const Camera<scalar_t>*>(cameras.const_data_ptr<scalar_t>()),
            depths.const_data_ptr<scalar_t>(),
            columns.const_data_ptr<scalar_t>(),
            rows.const_data_ptr<scalar_t>(),
            static_cast<scalar_t>(image_size[1] - 1),
            static_cast<scalar_t>(image_size[0] - 1),
            static_cast<scalar_t>(columns.size(0) - 1),
            static_cast<scalar_t>(rows.size(0) - 1),
            static_cast<scalar_t>(min_depth)};
  }
};

inline Steps prepare_steps(const Geometry& geometry, int64_t height, int64_t width, at::ScalarType dtype,
                           double min_depth) {
  std::vector<at::Tensor> parts;
  for (const auto& [name, tensor] : geometry.cameras()) parts.push_back(tensor->to(dtype).flatten(1));
  const at::TensorOptions options = geometry.depths.options().dtype(dtype);
  return {at::cat(parts, 1),
          geometry.depths.to(dtype).contiguous(),
          at::linspace(0, geometry.image_size[1] - 1, width, options),
          at::linspace(0, geometry.image_size[0] - 1, height, options),
          geometry.image_size,
          min_depth};
}

// The callers in Python check with better messages; these keep a direct call through torch.ops inside its memory.
inline Options check_arguments(const at::Tensor& current, const at::Tensor& reference, const Geometry& geometry,
                               std::optional<int64_t> invalid_channel, bool invalid_by_position,
                               double invalid_penalty, double min_depth) {
  TORCH_CHECK(current.dim() == 4, "plane_sweep: current must be (N, C, H, W), got ", current.sizes());
  TORCH_CHECK(reference.sizes() == current.sizes(), "plane_sweep: reference must have the shape of current, ",
              current.sizes(), ", got ", reference.sizes());
  TORCH_CHECK(reference.scalar_type() == current.scalar_type(), "plane_sweep: reference must be ",
              current.scalar_type(), " as current is, got ", reference.scalar_type());
  const int64_t cameras = current.size(0), channels = current.size(1);
  const std::array<std::vector<int64_t>, 6> shapes{{{cameras, 2, 2}, {cameras, 2, 2}, {cameras, 2},
                                                    {cameras, 3, 3}, {cameras, 3}, {cameras, 3, 3}}};
  const auto on_device = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.device() == current.device(), "plane_sweep: ", name, " must be on ", current.device(),
                " as current is, got ", tensor.device());
  };
  const auto named = geometry.cameras();
  for (size_t i = 0; i < named.size(); ++i) {
    const auto& [name, tensor] = named[i];
    TORCH_CHECK(tensor->sizes() == at::IntArrayRef(shapes[i]), "plane_sweep: ", name, " must be ",
                at::IntArrayRef(shapes[i]), ", got ", tensor->sizes());
    on_device(name, *tensor);
  }
  TORCH_CHECK(geometry.image_size.size() == 2 && geometry.image_size[0] >= 2 && geometry.image_size[1] >= 2,
              "plane_sweep: image_size must be two lengths of at least 2, got ", geometry.image_size);
  TORCH_CHECK(geometry.depths.dim() == 1, "plane_sweep: depths must be (D,), got ", geometry.depths.sizes());
  on_device("reference", reference);
  on_device("depths", geometry.depths);
  if (invalid_channel) {
    TORCH_CHECK(*invalid_channel >= 0 && *invalid_channel < channels, "plane_sweep: invalid_channel must be below ",
                channels, ", got ", *invalid_channel);
    TORCH_CHECK(!invalid_by_position, "plane_sweep: invalid_by_position needs invalid_channel=None");
  }
  return {invalid_channel.value_or(-1), invalid_by_position, invalid_penalty, min_depth};
}

// (N, C, H, W) to contiguous (N, H + 2 border, W + 2 border, C rounded up to a multiple of `lanes`); what is added
// is zero, and zeros on both sides add nothing to a cost.
inline at::Tensor channels_last(const at::Tensor& map, int64_t border, int64_t lanes, at::ScalarType dtype) {
  const int64_t channels = map.size(1), height = map.size(2), width = map.size(3);
  const int64_t padded = (channels + lanes - 1) / lanes * lanes;
  const std::array<int64_t, 4> shape{map.size(0), height + 2 * border, width + 2 * border, padded};
  const at::TensorOptions options = map.options().dtype(dtype);
  at::Tensor out = border == 0 && padded == channels ? at::empty(shape, options) : at::zeros(shape, options);
  out.narrow(1, border, height).narrow(2, border, width).narrow(3, 0, channels).copy_(map.permute({0, 2, 3, 1}));
  return out;
}

}  // namespace mmdet3d::plane_sweep
