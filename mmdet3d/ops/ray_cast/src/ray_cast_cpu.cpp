// CPU version of ray_cast: threads over rays, and within a thread sixteen rays at once, one per lane of the
// processor's vectors. A ray that ends is replaced by the next one, so that the lanes stay busy.
//
// The lanes walk in a copy of the grids that holds, for each voxel, whether it is free, and that has a border of one
// voxel around: one byte then says whether a ray goes on. Rays that start outside, or that may run out of steps, take
// the plain walk of ray_cast.h instead; both give the same bits.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "multiversion.h"
#include "ray_cast.h"

namespace mmdet3d::ray_cast {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kGrain = 1024;      // rays
constexpr int64_t kVoxelsPerRay = 64;  // with fewer rays than one for so many voxels, the copy would not pay

enum Status : uint8_t { kFree = 0, kBlocked = 1, kOutside = 2 };

// Rays under way. `voxel` counts in the copy, `before` is the voxel before that and `last` the distance at which the
// ray went from one to the other.
struct Lanes {
  alignas(64) double next[3][kLanes];
  alignas(64) double period[3][kLanes];
  alignas(64) double last[kLanes];
  alignas(64) int64_t stride[3][kLanes];
  alignas(64) int64_t voxel[kLanes];
  alignas(64) int64_t before[kLanes];
  int64_t ray[kLanes];  // -1: none
};

// Walks all lanes until at least one stands in a voxel that is not free. The compiler makes vectors of the loop over
// the lanes: it has no branch, and chooses numbers, not places to read from.
MMDET3D_MULTIVERSION
void advance(Lanes& lanes, const uint8_t* status) {
  while (true) {
    uint8_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= status[lanes.voxel[lane]];
    if (any != 0) return;
    for (int lane = 0; lane < kLanes; ++lane) {
      const double x = lanes.next[0][lane], y = lanes.next[1][lane], z = lanes.next[2][lane];
      const double period_x = lanes.period[0][lane], period_y = lanes.period[1][lane], period_z = lanes.period[2][lane];
      const int64_t stride_x = lanes.stride[0][lane], stride_y = lanes.stride[1][lane], stride_z = lanes.stride[2][lane];
      const int64_t voxel = lanes.voxel[lane];
      const double nearer = x < y ? x : y;
      const double time = nearer < z ? nearer : z;
      const double period_xy = x < y ? period_x : period_y;
      const int64_t stride_xy = x < y ? stride_x : stride_y;
      const double later = time + (nearer < z ? period_xy : period_z);
      const double x_if_not_z = x < y ? later : x, y_if_not_z = x < y ? y : later;
      lanes.next[0][lane] = nearer < z ? x_if_not_z : x;
      lanes.next[1][lane] = nearer < z ? y_if_not_z : y;
      lanes.next[2][lane] = nearer < z ? z : later;
      lanes.last[lane] = time;
      lanes.before[lane] = voxel;
      lanes.voxel[lane] = voxel + (nearer < z ? stride_xy : stride_z);
    }
  }
}

// Status of every voxel of all grids, (B, X + 2, Y + 2, Z + 2), and one free voxel at the end, where idle lanes wait.
class StatusGrid {
 public:
  explicit StatusGrid(const Job& job) : size_{job.world.size[1] + 2, job.world.size[2] + 2} {
    const World& world = job.world;
    const int64_t planes = world.size[0] + 2;
    stride_ = planes * size_[0] * size_[1];
    status_.reset(new uint8_t[stride_ * job.num_grids + 1]);
    status_[stride_ * job.num_grids] = kFree;
    parking_ = stride_ * job.num_grids;
    at::parallel_for(0, planes * job.num_grids, 8, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) fill_plane(job, plane / planes, plane % planes);
    });
  }

  const uint8_t* data() const { return status_.get(); }
  int64_t parking() const { return parking_; }
  int64_t stride(int axis) const { return axis == 0 ? int64_t{size_[0]} * size_[1] : axis == 1 ? size_[1] : 1; }
  int64_t index(int64_t grid, const int cell[3]) const {
    return grid * stride_ + ((cell[0] + 1) * int64_t{size_[0]} + cell[1] + 1) * size_[1] + cell[2] + 1;
  }

  // Index in the grid of the labels, of a voxel that is inside.
  int32_t without_border(int64_t index) const {
    const uint32_t in_grid = static_cast<uint32_t>(index % stride_), size_z = size_[1], size_y = size_[0];
    const uint32_t column = in_grid / size_z, x = column / size_y;
    return static_cast<int32_t>(((x - 1) * (size_y - 2) + (column - x * size_y - 1)) * (size_z - 2) +
                                (in_grid - column * size_z - 1));
  }

  // Grids whose copy has too many voxels for the arithmetic above.
  static bool fits(const World& world) {
    const double voxels = (world.size[0] + 2.0) * (world.size[1] + 2.0) * (world.size[2] + 2.0);
    return voxels < std::numeric_limits<int32_t>::max();
  }

 private:
  void fill_plane(const Job& job, int64_t grid, int64_t plane) {
    const int* size = job.world.size;
    uint8_t* to = status_.get() + grid * stride_ + plane * size_[0] * size_[1];
    std::fill(to, to + int64_t{size_[0]} * size_[1], kOutside);
    if (plane == 0 || plane == size[0] + 1) return;
    const uint8_t free_label = job.world.free_label;
    const uint8_t* from = job.grids + (grid * size[0] + plane - 1) * size[1] * size[2];
    for (int y = 0; y < size[1]; ++y, from += size[2]) {
      uint8_t* row = to + int64_t{y + 1} * size_[1] + 1;
      for (int z = 0; z < size[2]; ++z) row[z] = from[z] != free_label;
    }
  }

  std::unique_ptr<uint8_t[]> status_;
  int size_[2];  // of y and z, with border
  int64_t stride_, parking_;
};

// One thread's rays, from `begin` to `end`.
class LaneWalk {
 public:
  LaneWalk(const Job& job, const StatusGrid& grid, int64_t begin, int64_t end)
      : job_(job), grid_(grid), coming_(begin), end_(end) {}

  void run() {
    int busy = 0;
    for (int lane = 0; lane < kLanes; ++lane) busy += refill(lane);
    while (busy > 0) {
      advance(lanes_, grid_.data());
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint8_t status = grid_.data()[lanes_.voxel[lane]];
        if (status == kFree) continue;
        finish(lane, status);
        busy -= !refill(lane);
      }
    }
  }

 private:
  // Starts the next ray; false, and the lane waits, if none is left.
  bool refill(int lane) {
    for (; coming_ < end_; ++coming_) {
      const int64_t n = coming_ / job_.num_rays, grid = job_.grid_index[n];
      Walk walk;
      const bool known = grid >= 0 && grid < job_.num_grids;
      if (!known || !begin(job_.origins + 3 * n, job_.ray(coming_), job_.world, walk) ||
          !inside(walk, job_.world)) {
        job_.run(coming_);
        continue;
      }
      for (int a = 0; a < 3; ++a) {
        lanes_.next[a][lane] = walk.next[a];
        lanes_.period[a][lane] = walk.period[a];
        lanes_.stride[a][lane] = walk.step[a] * grid_.stride(a);
      }
      lanes_.last[lane] = 0.0;
      lanes_.voxel[lane] = lanes_.before[lane] = grid_.index(grid, walk.cell);
      lanes_.ray[lane] = coming_++;
      return true;
    }
    for (int a = 0; a < 3; ++a) lanes_.next[a][lane] = lanes_.period[a][lane] = lanes_.stride[a][lane] = 0;
    lanes_.last[lane] = 0.0;
    lanes_.voxel[lane] = lanes_.before[lane] = grid_.parking();
    return false;
  }

  void finish(int lane, uint8_t status) {
    const int64_t ray = lanes_.ray[lane];
    if (status == kOutside && job_.entry != nullptr) {
      job_.run(ray);  // the distance of two borders ago is not kept
      return;
    }
    End end;
    end.hit = status == kBlocked;
    if (end.hit) {
      const int64_t step = std::abs(lanes_.voxel[lane] - lanes_.before[lane]);
      const double next[3] = {lanes_.next[0][lane], lanes_.next[1][lane], lanes_.next[2][lane]};
      end.exit = next[next_axis(next)];
      end.entry = lanes_.last[lane];
      end.axis = step == 0 ? -1 : step == 1 ? 2 : step == grid_.stride(1) ? 1 : 0;
      end.voxel = grid_.without_border(lanes_.voxel[lane]);
    } else {
      end.exit = lanes_.last[lane];
      end.voxel = grid_.without_border(lanes_.before[lane]);
    }
    job_.write(ray, end);
  }

  const Job& job_;
  const StatusGrid& grid_;
  int64_t coming_, end_;
  Lanes lanes_;
};

void cast_all(const Job& job, int64_t count) {
  const World& world = job.world;
  const int64_t voxels = int64_t{world.size[0]} * world.size[1] * world.size[2] * job.num_grids;
  const bool enough_steps = int64_t{world.size[0]} + world.size[1] + world.size[2] <= world.max_steps;
  if (!enough_steps || count * kVoxelsPerRay < voxels || !StatusGrid::fits(world)) {
    at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) job.run(i);
    });
    return;
  }
  const StatusGrid grid(job);
  at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    LaneWalk(job, grid, begin, end).run();
  });
}

Outputs ray_cast_cpu(const at::Tensor& grids, const at::Tensor& origins, const at::Tensor& rays,
                     const at::Tensor& grid_index, int64_t free_label, at::ArrayRef<double> low, double cell_size,
                     int64_t max_steps, bool with_entry) {
  const World world = check_arguments(grids, origins, rays, grid_index, free_label, low, cell_size, max_steps);
  const Outputs outputs = make_outputs(origins, rays, with_entry);
  const at::Tensor labels = grids.contiguous(), starts = origins.contiguous(), index = grid_index.contiguous();
  const at::Tensor directions = rays.to(at::kDouble).contiguous();
  const Job job = make_job(world, labels, starts, directions, index, outputs, with_entry);
  cast_all(job, starts.size(0) * job.num_rays);
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("ray_cast", &ray_cast_cpu); }

}  // namespace mmdet3d::ray_cast
