// The Python module that loading the operator library needs; the operators register themselves through
// TORCH_LIBRARY_FRAGMENT(mmdet3d, m) in <op>/src/<op>.cpp.
#include <Python.h>
#include <torch/library.h>

#include <string>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // Asked by mmdet3d.utils.env: a library built without CUDA kernels has no CUDA implementation to offer.
  m.def("built_with_cuda() -> bool", [] {
#ifdef MMDET3D_WITH_CUDA
    return true;
#else
    return false;
#endif
  });
#ifdef MMDET3D_CUDA_ARCH
  // The TORCH_CUDA_ARCH_LIST of the build.
  m.def("cuda_architectures() -> str", [] { return std::string(MMDET3D_CUDA_ARCH); });
#endif
}

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Operators of mmdet3d.", -1, nullptr};
  return PyModule_Create(&definition);
}
