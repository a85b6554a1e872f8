// Schema of ray_cast. Contract: ../ray_cast.py.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  m.def(
      "ray_cast(Tensor grids, Tensor origins, Tensor rays, Tensor grid_index, int free_label, float[] low, "
      "float cell_size, int max_steps, bool with_entry) "
      "-> (Tensor voxel, Tensor distance, Tensor hit, Tensor entry, Tensor axis)");
}
