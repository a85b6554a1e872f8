// Schema of resize_crop. Contract: ../resize_crop.py.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) { m.def("resize_crop(Tensor image, int[2] size, int[4] crop) -> Tensor"); }
