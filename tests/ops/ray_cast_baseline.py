"""The ray caster as the reference evaluation has it, written from its description: what the operator is timed against.

Each origin is a call of its own that uploads the grid again as float32 [z, y, x]; each ray is walked to its very end,
its whole path is stored, and only then the first blocked voxel is looked for. Compiled when asked for.
"""

import functools

import numpy as np
import torch
from torch.utils.cpp_extension import load_inline

_COMMON = r"""
#include <torch/extension.h>
#include <cfloat>
#include <cmath>

constexpr int kSteps = 1001;

#ifdef __CUDACC__
#define BOTH __host__ __device__
#else
#define BOTH
#endif

struct Size { int x, y, z; };

BOTH inline void whole_walk(const float* grid, Size size, const float* start, const float* end, float* distance,
                            int* cell, int i) {
  int path[kSteps * 3];
  double times[kSteps];
  int count = 0;
  int at[3], step[3];
  double next[3], period[3], length = 0;
  for (int a = 0; a < 3; ++a) length += (double(end[a]) - start[a]) * (double(end[a]) - start[a]);
  length = sqrt(length);
  for (int a = 0; a < 3; ++a) {
    const double d = (double(end[a]) - start[a]) / length;
    at[a] = int(start[a]);
    step[a] = d >= 0 ? 1 : -1;
    next[a] = d == 0 ? DBL_MAX : (at[a] + (step[a] > 0) - double(start[a])) / d;
    period[a] = d == 0 ? DBL_MAX : step[a] / d;
  }
  for (int n = 0; n < kSteps; ++n) {
    const bool inside = at[0] >= 0 && at[0] < size.x && at[1] >= 0 && at[1] < size.y && at[2] >= 0 && at[2] < size.z;
    if (!inside && count > 0) break;
    const int axis = next[0] < next[1] ? (next[0] < next[2] ? 0 : 2) : (next[1] < next[2] ? 1 : 2);
    const double time = next[axis];
    if (inside) {
      for (int a = 0; a < 3; ++a) path[3 * count + a] = at[a];
      times[count++] = time;
    }
    at[axis] += step[axis];
    next[axis] += period[axis];
  }
  distance[i] = -1;
  for (int n = 0; n < count; ++n) {
    const int* p = path + 3 * n;
    const bool blocked = grid[(p[2] * size.y + p[1]) * size.x + p[0]] > 0.5f;
    if (blocked || n == count - 1) {
      distance[i] = float(times[n]);
      for (int a = 0; a < 3; ++a) cell[3 * i + a] = p[a];
      return;
    }
  }
}
"""

_CPU = _COMMON + r"""
#include <ATen/Parallel.h>
void cast(at::Tensor grid, at::Tensor start, at::Tensor ends, at::Tensor distance, at::Tensor cell) {
  const Size size{int(grid.size(2)), int(grid.size(1)), int(grid.size(0))};
  at::parallel_for(0, ends.size(0), 256, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      whole_walk(grid.data_ptr<float>(), size, start.data_ptr<float>(), ends.data_ptr<float>() + 3 * i,
                 distance.data_ptr<float>(), cell.data_ptr<int>(), int(i));
    }
  });
}
"""

_CUDA = _COMMON + r"""
#include <ATen/cuda/CUDAContext.h>
__global__ void kernel(const float* grid, Size size, const float* start, const float* ends, float* distance, int* cell,
                       int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) whole_walk(grid, size, start, ends + 3 * i, distance, cell, i);
}
void cast(at::Tensor grid, at::Tensor start, at::Tensor ends, at::Tensor distance, at::Tensor cell) {
  const Size size{int(grid.size(2)), int(grid.size(1)), int(grid.size(0))};
  const int count = int(ends.size(0));
  kernel<<<(count + 255) / 256, 256, 0, at::cuda::getCurrentCUDAStream()>>>(
      grid.data_ptr<float>(), size, start.data_ptr<float>(), ends.data_ptr<float>(), distance.data_ptr<float>(),
      cell.data_ptr<int>(), count);
}
"""

_DECLARATION = "void cast(at::Tensor grid, at::Tensor start, at::Tensor ends, at::Tensor distance, at::Tensor cell);"


@functools.cache
def _compiled(device):
    if device == "cuda":
        return load_inline("ray_cast_baseline_cuda", "#include <torch/extension.h>\n" + _DECLARATION, _CUDA,
                           functions=["cast"], extra_cuda_cflags=["-O3"])
    return load_inline("ray_cast_baseline_cpu", _CPU, functions=["cast"],
                       extra_cflags=["-O3", "-fopenmp"], extra_ldflags=["-fopenmp"])


def cast(labels, origin, rays, free_label, low, cell_size, device):
    """(R, 3) int64 cells and (R,) float32 metres of the rays (R, 3) from one origin; NumPy in and out."""
    cell_size = np.float64(np.float32(cell_size))
    start = ((origin - np.array(low)) / cell_size).astype(np.float32)
    ends = (((rays.astype(np.float64) + origin) - np.array(low)) / cell_size).astype(np.float32)
    grid = np.ascontiguousarray((labels != free_label).astype(np.float32).transpose(2, 1, 0))
    uploaded = [torch.from_numpy(array).to(device) for array in (grid, start, ends)]
    distance = torch.empty(len(rays), device=device)
    cell = torch.zeros(len(rays), 3, dtype=torch.int32, device=device)
    _compiled(torch.device(device).type).cast(*uploaded, distance, cell)
    return cell.cpu().numpy().astype(np.int64), distance.cpu().numpy() * np.float32(cell_size)


def evaluate(pred, gt, pred_flow, gt_flow, origins, rays, free_label, low, cell_size, device):
    """Per-ray rows of one sample and its counts, each origin on its own: (gt, pred, tp at 1, 2 and 4 m)."""
    rows = []
    for origin in origins:
        both = []
        for labels, flow in ((pred, pred_flow), (gt, gt_flow)):
            cell, distance = cast(labels, origin, rays, free_label, low, cell_size, device)
            x, y, z = cell.T
            both.append(np.concatenate([labels[x, y, z][:, None], distance[:, None], flow[x, y, z]], axis=1))
        rows.append(np.concatenate(both, axis=1))
    rows = np.concatenate(rows).astype(np.float64)
    rows = rows[rows[:, 4] != free_label]
    same, error = rows[:, 0] == rows[:, 4], np.abs(rows[:, 1] - rows[:, 5])
    counts = [[(rows[:, column] == label).sum() for label in range(free_label)] for column in (4, 0)]
    counts += [[(same & (rows[:, 4] == label) & (error < threshold)).sum() for label in range(free_label)]
               for threshold in (1, 2, 4)]
    return np.array(counts)
