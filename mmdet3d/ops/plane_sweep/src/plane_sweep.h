// What the CPU and the CUDA version of plane_sweep share. The contract is in ../plane_sweep.py.
#pragma once

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>

namespace mmdet3d::plane_sweep {

struct Options {
  int64_t invalid_channel;  // -1: the rule is off
  bool invalid_by_position;
  double invalid_penalty;
  double min_depth;
};

// The four pixels around a position. `index` counts pixels, row by row, of a map with one pixel of zeros on every
// side, so that all four can always be read: it is the upper left one. -1: behind the camera or outside the map.
struct Position {
  int64_t index;
  double right;  // weight of the right column, 0 to 1
  double lower;  // weight of the lower row, 0 to 1
};

// `at_infinity` is G (x, y, 1). Written so that a position that is not a number counts as outside.
C10_HOST_DEVICE inline Position locate(const double at_infinity[3], const double epipole[3], double depth,
                                       int64_t height, int64_t width, double min_depth) {
  const double z = depth * at_infinity[2] + epipole[2];
  if (!(z >= min_depth)) return {-1, 0.0, 0.0};
  const double px = (depth * at_infinity[0] + epipole[0]) / z;
  const double py = (depth * at_infinity[1] + epipole[1]) / z;
  if (!(px > -1.0 && px < static_cast<double>(width) && py > -1.0 && py < static_cast<double>(height))) {
    return {-1, 0.0, 0.0};
  }
  const double left = ::floor(px), top = ::floor(py);
  const int64_t index = (static_cast<int64_t>(top) + 1) * (width + 2) + static_cast<int64_t>(left) + 1;
  return {index, px - left, py - top};
}

C10_HOST_DEVICE inline void project_to_infinity(const double* homography, int64_t x, int64_t y, double out[3]) {
  for (int row = 0; row < 3; ++row) {
    out[row] = homography[3 * row] * x + homography[3 * row + 1] * y + homography[3 * row + 2];
  }
}

// The callers in Python check with better messages; these keep a direct call through torch.ops inside its memory.
inline Options check_arguments(const at::Tensor& current, const at::Tensor& reference, const at::Tensor& homography,
                               const at::Tensor& epipole, const at::Tensor& depths,
                               std::optional<int64_t> invalid_channel, bool invalid_by_position,
                               double invalid_penalty, double min_depth) {
  TORCH_CHECK(current.dim() == 4, "plane_sweep: current must be (N, C, H, W), got ", current.sizes());
  TORCH_CHECK(reference.sizes() == current.sizes(), "plane_sweep: reference must have the shape of current, ",
              current.sizes(), ", got ", reference.sizes());
  TORCH_CHECK(reference.scalar_type() == current.scalar_type(), "plane_sweep: reference must be ",
              current.scalar_type(), " as current is, got ", reference.scalar_type());
  const int64_t cameras = current.size(0), channels = current.size(1);
  TORCH_CHECK(homography.sizes() == at::IntArrayRef({cameras, 3, 3}),
              "plane_sweep: infinite_homography must be (", cameras, ", 3, 3), got ", homography.sizes());
  TORCH_CHECK(epipole.sizes() == at::IntArrayRef({cameras, 3}), "plane_sweep: epipole must be (", cameras,
              ", 3), got ", epipole.sizes());
  TORCH_CHECK(depths.dim() == 1, "plane_sweep: depths must be (D,), got ", depths.sizes());
  for (const at::Tensor* tensor : {&reference, &homography, &epipole, &depths}) {
    TORCH_CHECK(tensor->device() == current.device(), "plane_sweep: all tensors must be on ", current.device(),
                " as current is, got ", tensor->device());
  }
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
