// What the CUDA kernels of plane_sweep share: the maps, and the positions and penalties of the depths of a pixel, one
// depth per lane of a warp.
#pragma once

#include <ATen/OpMathType.h>

#include "plane_sweep.h"

namespace mmdet3d::plane_sweep {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kWarps = 8;    // warps of a block
constexpr int kPixels = 32;  // pixels of a block, next to each other: they read overlapping parts of the reference map
constexpr int kGroup = 8;    // depths whose sums are reduced together
constexpr size_t kSharedBytes = 48 * 1024;  // what every GPU grants a block

// What a lane reads in one access of 16 bytes.
template <typename scalar_t>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(scalar_t);
  scalar_t value[size];
};

template <typename scalar_t>
struct Maps {
  using acc_t = at::opmath_type<scalar_t>;
  const scalar_t* __restrict__ current;    // (N, H, W, C)
  const scalar_t* __restrict__ reference;  // (N, H, W, C)
  Lattice<acc_t> lattice;
  acc_t* __restrict__ cost;  // (N, D, H, W); probabilities: (N, H, W, D)
  int64_t channels, num_depths, height, width;
  Options options;
};

// Position of one depth; every lane has another one.
template <typename acc_t>
struct LanePosition {
  int index;  // see Position
  acc_t right, lower;
  // Of the four pixels around the position: the place of the upper left one in the map, which may lie beyond it, and a
  // bit for each that is in the map (upper left, upper right, lower left, lower right).
  int upper_left, present;

  __device__ LanePosition() : index(-1), right(0), lower(0), upper_left(0), present(0) {}
  __device__ LanePosition(const Position<acc_t>& at, int height, int width)
      : index(static_cast<int>(at.index)), right(at.right), lower(at.lower), upper_left(0), present(0) {
    const int row = index / (width + 2) - 1, column = index % (width + 2) - 1;  // see Position
    upper_left = row * width + column;
    const int above = row >= 0 && row < height, below = row + 1 >= 0 && row + 1 < height;
    const int left = column >= 0 && column < width, after = column + 1 >= 0 && column + 1 < width;
    present = index < 0 ? 0 : (above & left) | (above & after) << 1 | (below & left) << 2 | (below & after) << 3;
  }
};

// One of the four pixels around a position; pixels that are not in the map may not be read.
template <typename scalar_t>
__device__ const scalar_t* corner_pixel(const Maps<scalar_t>& maps, const scalar_t* map, int upper_left, int corner) {
  const int offset = corner / 2 * static_cast<int>(maps.width) + corner % 2;
  return map + static_cast<int64_t>(upper_left + offset) * maps.channels;
}

// Position of a pixel at depth `first_depth + lane`; none for a lane from `count` on.
template <typename scalar_t, typename acc_t>
__device__ LanePosition<acc_t> lane_position(const Maps<scalar_t>& maps, int64_t camera, int64_t pixel,
                                             int64_t first_depth, int count, int lane) {
  LanePosition<acc_t> own;
  if (lane < count) {
    const Lattice<acc_t>& lattice = maps.lattice;
    const Camera<acc_t>& rig = lattice.cameras[camera];
    const acc_t u = lattice.columns[pixel % maps.width], v = lattice.rows[pixel / maps.width];
    const Point<acc_t> at = older_position(lattice, rig, original_pixel(rig, u, v), lattice.depths[first_depth + lane]);
    own = LanePosition<acc_t>(locate(at, maps.height, maps.width), static_cast<int>(maps.height),
                              static_cast<int>(maps.width));
  }
  return own;
}

// Penalty of this lane's own depth.
template <typename scalar_t, typename acc_t>
__device__ acc_t lane_penalty(const Maps<scalar_t>& maps, const scalar_t* map, const LanePosition<acc_t>& at) {
  const Options& options = maps.options;
  if (options.invalid_channel < 0 && !options.invalid_by_position) return 0;
  if (at.index < 0) return options.invalid_penalty;
  if (options.invalid_by_position) return 0;
  acc_t value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[i] = at.present >> i & 1
                   ? static_cast<acc_t>(corner_pixel(maps, map, at.upper_left, i)[options.invalid_channel]) : acc_t(0);
  }
  const acc_t left = 1 - at.right, top = 1 - at.lower;
  const acc_t warped = left * top * value[0] + at.right * top * value[1] + left * at.lower * value[2] +
                       at.right * at.lower * value[3];
  return warped == 0 ? options.invalid_penalty : 0;
}

}  // namespace
}  // namespace mmdet3d::plane_sweep
