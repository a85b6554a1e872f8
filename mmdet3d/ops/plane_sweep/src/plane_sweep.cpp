// Schema of plane_sweep. Contract: ../plane_sweep.py.
#include <torch/library.h>

#include <string>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  const std::string arguments =
      "(Tensor current, Tensor reference, Tensor pixel_from_augmented, Tensor augmentation, "
      "Tensor offset, Tensor older_from_pixel, Tensor translation, Tensor intrinsics, int[2] image_size, "
      "Tensor depths, int? invalid_channel, bool invalid_by_position, float invalid_penalty, float min_depth) "
      "-> Tensor";
  m.def(("plane_sweep" + arguments).c_str());
  m.def(("plane_sweep_probability" + arguments).c_str());  // a GPU's; elsewhere made of plane_sweep
}
