// What the CPU and the CUDA version of ray_cast share: checks, the start of a ray, and the walk. The contract is in
// ../ray_cast.py. Products are formed so that no compiler fuses them with a sum: results must not depend on it.
#pragma once

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "exact_math.h"

#ifdef __CUDACC__
#define MMDET3D_UNROLL _Pragma("unroll")
#else
#define MMDET3D_UNROLL
#endif

namespace mmdet3d::ray_cast {

// Origins this many voxels away or further pass no voxel; nearer ones have indices that fit an int.
constexpr double kFar = 1073741824.0;

struct World {
  double low[3];  // metres
  double cell;    // metres, a float32 value
  int size[3];    // voxels
  uint8_t free_label;
  int max_steps;
};

// Where a ray is, and what lies ahead on each axis. Distances in voxels from the origin.
struct Walk {
  int cell[3];
  int step[3];       // +1 or -1
  double next[3];    // distance to the next border, DBL_MAX if there is none
  double period[3];  // distance between borders, DBL_MAX if there is none
};

// The last voxel that a ray passed.
struct End {
  int voxel = 0;
  double exit = -1.0, entry = -1.0;  // voxels
  int axis = -1;
  bool hit = false;
};

C10_HOST_DEVICE inline double grid_units(double metres, double low, double cell) {
  return static_cast<double>(static_cast<float>((metres - low) / cell));
}

// False if the ray passes no voxel, whatever the labels.
C10_HOST_DEVICE inline bool begin(const double* origin, const double* ray, const World& world, Walk& walk) {
  double start[3], direction[3];
MMDET3D_UNROLL
  for (int a = 0; a < 3; ++a) {
    start[a] = grid_units(origin[a], world.low[a], world.cell);
    direction[a] = grid_units(ray[a] + origin[a], world.low[a], world.cell) - start[a];
    if (!(::fabs(start[a]) < kFar)) return false;
  }
  const double length = ::sqrt(square(direction[0]) + square(direction[1]) + square(direction[2]));
  if (!(length > 0.0 && length <= DBL_MAX)) return false;
MMDET3D_UNROLL
  for (int a = 0; a < 3; ++a) {
    const double d = direction[a] / length;
    walk.cell[a] = static_cast<int>(start[a]);  // cuts off towards zero
    walk.step[a] = d >= 0.0 ? 1 : -1;
    const double border = walk.cell[a] + (walk.step[a] > 0 ? 1 : 0);
    walk.next[a] = d == 0.0 ? DBL_MAX : (border - start[a]) / d;
    walk.period[a] = d == 0.0 ? DBL_MAX : walk.step[a] / d;
    // Outside and not getting nearer.
    if (walk.cell[a] < 0 && !(d > 0.0)) return false;
    if (walk.cell[a] >= world.size[a] && !(d < 0.0)) return false;
  }
  return true;
}

C10_HOST_DEVICE inline bool inside(const Walk& walk, const World& world) {
  return walk.cell[0] >= 0 && walk.cell[0] < world.size[0] && walk.cell[1] >= 0 && walk.cell[1] < world.size[1] &&
         walk.cell[2] >= 0 && walk.cell[2] < world.size[2];
}

// Axis of the nearest border. Strict comparisons decide between borders that are equally far.
C10_HOST_DEVICE inline int next_axis(const double next[3]) {
  const bool x = next[0] < next[1];
  return (x ? next[0] : next[1]) < next[2] ? (x ? 0 : 1) : 2;
}

// Steps a ray that starts outside until it is inside; returns how many steps it took, or -1 if it never is. `entry`
// and `axis` become those of the last border crossed.
C10_HOST_DEVICE inline int approach(Walk& walk, const World& world, double& entry, int& axis) {
  int steps = 0;
  while (!inside(walk, world)) {
    if (++steps >= world.max_steps) return -1;
    axis = next_axis(walk.next);
    bool passed = false;
    // Choices instead of indices that vary, which would put the walk into a GPU's slow memory.
MMDET3D_UNROLL
    for (int a = 0; a < 3; ++a) {
      const bool chosen = a == axis;
      entry = chosen ? walk.next[a] : entry;
      walk.next[a] = chosen ? walk.next[a] + walk.period[a] : walk.next[a];
      walk.cell[a] += chosen ? walk.step[a] : 0;
      passed = passed || (walk.step[a] > 0 ? walk.cell[a] >= world.size[a] : walk.cell[a] < 0);
    }
    if (passed) return -1;
  }
  return steps;
}

// Walks a ray that is inside to its end, crossing at most `budget` borders. All choices are selections, because
// neither a processor's branch prediction nor a warp gets along with axes that alternate.
C10_HOST_DEVICE inline End finish(const Walk& walk, const World& world, const uint8_t* labels, int budget, double entry,
                                  int axis) {
  double next_x = walk.next[0], next_y = walk.next[1], next_z = walk.next[2];
  const double period_x = walk.period[0], period_y = walk.period[1], period_z = walk.period[2];
  const int stride_z = walk.step[2], stride_y = walk.step[1] * world.size[2];
  const int stride_x = walk.step[0] * world.size[1] * world.size[2];
  // Voxels left along each axis, this one included.
  int left_x = walk.step[0] > 0 ? world.size[0] - walk.cell[0] : walk.cell[0] + 1;
  int left_y = walk.step[1] > 0 ? world.size[1] - walk.cell[1] : walk.cell[1] + 1;
  int left_z = walk.step[2] > 0 ? world.size[2] - walk.cell[2] : walk.cell[2] + 1;
  int voxel = (walk.cell[0] * world.size[1] + walk.cell[1]) * world.size[2] + walk.cell[2];
  while (true) {
    const bool x_first = next_x < next_y;
    const double nearer = x_first ? next_x : next_y;
    const bool is_z = !(nearer < next_z), is_x = x_first && !is_z, is_y = !x_first && !is_z;
    const double time = is_z ? next_z : nearer;
    const bool blocked = labels[voxel] != world.free_label;
    left_x -= is_x;
    left_y -= is_y;
    left_z -= is_z;
    if (blocked || left_x == 0 || left_y == 0 || left_z == 0 || --budget <= 0) return {voxel, time, entry, axis, blocked};
    const double later = time + (is_z ? period_z : is_x ? period_x : period_y);
    next_x = is_x ? later : next_x;
    next_y = is_y ? later : next_y;
    next_z = is_z ? later : next_z;
    voxel += is_z ? stride_z : is_x ? stride_x : stride_y;
    entry = time;
    axis = is_z ? 2 : is_x ? 0 : 1;
  }
}

// From the first to the last voxel of a ray.
C10_HOST_DEVICE inline End cast(const double* origin, const double* ray, const World& world, const uint8_t* labels) {
  Walk walk;
  if (!begin(origin, ray, world, walk)) return {};
  double entry = 0.0;
  int axis = -1, steps = 0;
  if (!inside(walk, world)) {
    steps = approach(walk, world, entry, axis);
    if (steps < 0) return {};
  }
  return finish(walk, world, labels, world.max_steps - steps, entry, axis);
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The callers in Python check with better messages; these keep a direct call through torch.ops inside its memory.
inline World check_arguments(const at::Tensor& grids, const at::Tensor& origins, const at::Tensor& rays,
                             const at::Tensor& grid_index, int64_t free_label, at::ArrayRef<double> low,
                             double cell_size, int64_t max_steps) {
  TORCH_CHECK(grids.dim() == 4 && grids.scalar_type() == at::kByte, "ray_cast: grids must be uint8 (B, X, Y, Z), got ",
              grids.scalar_type(), " ", grids.sizes());
  const int64_t voxels = grids.size(1) * grids.size(2) * grids.size(3);
  TORCH_CHECK(voxels > 0 && voxels <= std::numeric_limits<int32_t>::max(),
              "ray_cast: grids must hold 1 to 2**31 - 1 voxels each, got ", grids.sizes());
  TORCH_CHECK(origins.dim() == 2 && origins.size(1) == 3 && origins.scalar_type() == at::kDouble,
              "ray_cast: origins must be float64 (N, 3), got ", origins.scalar_type(), " ", origins.sizes());
  TORCH_CHECK(at::isFloatingType(rays.scalar_type()), "ray_cast: rays must be floating, got ", rays.scalar_type());
  TORCH_CHECK((rays.dim() == 2 || (rays.dim() == 3 && rays.size(0) == origins.size(0))) && rays.size(-1) == 3,
              "ray_cast: rays must be (R, 3) or (N, R, 3), got ", rays.sizes());
  TORCH_CHECK(grid_index.dim() == 1 && grid_index.size(0) == origins.size(0) && grid_index.scalar_type() == at::kLong,
              "ray_cast: grid_index must be int64 (N,), got ", grid_index.scalar_type(), " ", grid_index.sizes());
  for (const at::Tensor* tensor : {&origins, &rays, &grid_index}) {
    TORCH_CHECK(tensor->device() == grids.device(), "ray_cast: all tensors must be on ", grids.device(),
                " as grids is, got ", tensor->device());
  }
  TORCH_CHECK(free_label >= 0 && free_label <= 255, "ray_cast: free_label must be 0 to 255, got ", free_label);
  TORCH_CHECK(low.size() == 3, "ray_cast: low must have three numbers, got ", low.size());
  TORCH_CHECK(max_steps >= 1 && max_steps <= std::numeric_limits<int32_t>::max(),
              "ray_cast: max_steps must be 1 to 2**31 - 1, got ", max_steps);
  return {{low[0], low[1], low[2]},
          static_cast<double>(static_cast<float>(cell_size)),
          {static_cast<int>(grids.size(1)), static_cast<int>(grids.size(2)), static_cast<int>(grids.size(3))},
          static_cast<uint8_t>(free_label),
          static_cast<int>(max_steps)};
}

// Everything a version reads and writes, as plain pointers.
struct Job {
  World world;
  const uint8_t* grids;       // (B, X, Y, Z)
  const double* origins;      // (N, 3)
  const double* rays;         // (R, 3) or (N, R, 3)
  const int64_t* grid_index;  // (N,)
  int64_t num_grids, num_rays, ray_stride;  // ray_stride: elements from the rays of one origin to those of the next
  int32_t* voxel;
  float* distance;
  bool* hit;
  float* entry;  // null unless asked for
  int8_t* axis;

  C10_HOST_DEVICE void write(int64_t i, const End& end) const {
    const float metres = static_cast<float>(world.cell);
    voxel[i] = end.voxel;
    distance[i] = static_cast<float>(end.exit) * metres;
    hit[i] = end.hit;
    if (entry != nullptr) {
      entry[i] = static_cast<float>(end.entry) * metres;
      axis[i] = static_cast<int8_t>(end.axis);
    }
  }

  // Direction of ray i % num_rays of origin i / num_rays.
  C10_HOST_DEVICE const double* ray(int64_t i) const {
    const int64_t n = i / num_rays;
    return rays + n * ray_stride + 3 * (i - n * num_rays);
  }

  C10_HOST_DEVICE void run(int64_t i) const {
    const int64_t n = i / num_rays, grid = grid_index[n];
    End end;
    if (grid >= 0 && grid < num_grids) {
      const int64_t voxels = static_cast<int64_t>(world.size[0]) * world.size[1] * world.size[2];
      end = cast(origins + 3 * n, ray(i), world, grids + grid * voxels);
    }
    write(i, end);
  }
};

inline Outputs make_outputs(const at::Tensor& origins, const at::Tensor& rays, bool with_entry) {
  const int64_t count = origins.size(0), num_rays = rays.size(-2);
  const at::TensorOptions options = origins.options();
  const auto empty = [&](bool wanted, at::ScalarType dtype) {
    return wanted ? at::empty({count, num_rays}, options.dtype(dtype)) : at::empty({0}, options.dtype(dtype));
  };
  return {empty(true, at::kInt), empty(true, at::kFloat), empty(true, at::kBool), empty(with_entry, at::kFloat),
          empty(with_entry, at::kChar)};
}

// Needs contiguous inputs.
inline Job make_job(const World& world, const at::Tensor& grids, const at::Tensor& origins, const at::Tensor& rays,
                    const at::Tensor& grid_index, const Outputs& outputs, bool with_entry) {
  const auto& [voxel, distance, hit, entry, axis] = outputs;
  return {world,
          grids.const_data_ptr<uint8_t>(),
          origins.const_data_ptr<double>(),
          rays.const_data_ptr<double>(),
          grid_index.const_data_ptr<int64_t>(),
          grids.size(0),
          rays.size(-2),
          rays.dim() == 3 ? 3 * rays.size(1) : 0,
          voxel.mutable_data_ptr<int32_t>(),
          distance.mutable_data_ptr<float>(),
          hit.mutable_data_ptr<bool>(),
          with_entry ? entry.mutable_data_ptr<float>() : nullptr,
          with_entry ? axis.mutable_data_ptr<int8_t>() : nullptr};
}

}  // namespace mmdet3d::ray_cast
