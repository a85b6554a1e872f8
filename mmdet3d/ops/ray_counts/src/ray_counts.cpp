// Schema of ray_counts. Contract: ../ray_counts.py.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  m.def(
      "ray_counts(Tensor labels, Tensor voxel, Tensor distance, Tensor? pred_flow, Tensor? gt_flow, int free_label, "
      "int[] flow_classes, float[] thresholds, float flow_threshold, int sample, Tensor(a!) counts, "
      "Tensor(b!) flow_error, Tensor(c!) problem) -> ()");
}
