// Schema of plane_sweep. Contract: ../plane_sweep.py.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  m.def(
      "plane_sweep(Tensor current, Tensor reference, Tensor infinite_homography, Tensor epipole, Tensor depths, "
      "int? invalid_channel, bool invalid_by_position, float invalid_penalty, float min_depth) -> Tensor");
}
