// MMDET3D_MULTIVERSION in front of a function compiles it for several instruction sets; the loader picks the one that
// the machine has, so one binary runs everywhere and still uses AVX2 or AVX-512. Helpers that such a function calls
// must be MMDET3D_INLINE to be compiled for the same instruction set. Elsewhere than GCC, x86-64 and glibc (which can
// resolve functions at load time), the macro is empty and the function is compiled once.
#pragma once

#include <cstddef>  // defines __GLIBC__ where it applies

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#if __GNUC__ >= 12
#define MMDET3D_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MMDET3D_MULTIVERSION __attribute__((target_clones("default", "avx2")))
#endif
#else
#define MMDET3D_MULTIVERSION
#endif

#if defined(__GNUC__)
#define MMDET3D_INLINE inline __attribute__((always_inline))
#else
#define MMDET3D_INLINE inline
#endif

// In front of a function whose products and sums must each be rounded: GCC would join them to fused multiply-adds where
// the processor has the instruction. Clang joins only what stands in one expression.
#if defined(__GNUC__) && !defined(__clang__)
#define MMDET3D_UNFUSED __attribute__((optimize("fp-contract=off")))
#else
#define MMDET3D_UNFUSED
#endif
