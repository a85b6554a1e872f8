// The Python module that loading the operator library needs; the operators register themselves through
// TORCH_LIBRARY_FRAGMENT(mmdet3d, m) in <op>/src/<op>.cpp.
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#define MMDET3D_TEXT(...) #__VA_ARGS__
#define MMDET3D_EXPAND_TEXT(...) MMDET3D_TEXT(__VA_ARGS__)

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
  // The TORCH_CUDA_ARCH_LIST of the build, such as "8.6;9.0+PTX"; setup.py passes it with colons.
  m.def("cuda_architectures() -> str", [] {
    std::string names = MMDET3D_EXPAND_TEXT(MMDET3D_CUDA_ARCH);
    std::replace(names.begin(), names.end(), ':', ';');
    return names;
  });
#endif
}

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Operators of mmdet3d.", -1, nullptr};
  return PyModule_Create(&definition);
}
