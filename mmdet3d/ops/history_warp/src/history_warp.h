// What the CPU and the CUDA version of history_warp share. The contract is in ../history_warp.py.
#pragma once

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "multiversion.h"
#include "rounded_math.h"

namespace mmdet3d::history_warp {

constexpr int kTaps = 8;

struct Size {
  int32_t z, y, x;
};

// The voxels around a position: flat indices and weights. A tap of weight 0 is not to be read.
template <typename acc_t>
struct alignas(16) Taps {
  acc_t weight[kTaps];
  int32_t index[kTaps];
};

// The two voxels around a coordinate; weight 0 for what is outside or for a coordinate that is not a number.
template <typename acc_t>
struct Pair {
  int32_t index[2];
  acc_t weight[2];
};

template <typename acc_t>
C10_HOST_DEVICE MMDET3D_INLINE Pair<acc_t> neighbours(acc_t source, int32_t count) {
  const acc_t low = ::floor(source), high = add(low, acc_t(1)), end = static_cast<acc_t>(count);
  const acc_t fraction = add(source, -low);
  const bool has_low = low >= 0 && low < end, has_high = high >= 0 && high < end;
  return {{has_low ? static_cast<int32_t>(low) : 0, has_high ? static_cast<int32_t>(high) : 0},
          {has_low ? add(acc_t(1), -fraction) : acc_t(0), has_high ? fraction : acc_t(0)}};
}

// Row `row` of the matrix (4, 4) times (x, y, z, 1).
template <typename acc_t>
C10_HOST_DEVICE MMDET3D_INLINE acc_t source_coordinate(const acc_t* matrix, int row, acc_t x, acc_t y, acc_t z) {
  const acc_t* m = matrix + 4 * row;
  return add(add(add(multiply(m[0], x), multiply(m[1], y)), multiply(m[2], z)), m[3]);
}

template <typename acc_t>
C10_HOST_DEVICE MMDET3D_INLINE Taps<acc_t> find_taps(const acc_t* matrix, const Size& size, int32_t x, int32_t y,
                                                     int32_t z) {
  const acc_t fx = static_cast<acc_t>(x), fy = static_cast<acc_t>(y), fz = static_cast<acc_t>(z);
  const Pair<acc_t> in_x = neighbours(source_coordinate(matrix, 0, fx, fy, fz), size.x);
  const Pair<acc_t> in_y = neighbours(source_coordinate(matrix, 1, fx, fy, fz), size.y);
  const Pair<acc_t> in_z = neighbours(source_coordinate(matrix, 2, fx, fy, fz), size.z);
  Taps<acc_t> taps;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int tap = 0; tap < kTaps; ++tap) {
    const int a = tap >> 2, b = tap >> 1 & 1, c = tap & 1;
    taps.index[tap] = (in_z.index[a] * size.y + in_y.index[b]) * size.x + in_x.index[c];
    taps.weight[tap] = multiply(multiply(in_z.weight[a], in_y.weight[b]), in_x.weight[c]);
  }
  return taps;
}

template <typename acc_t>
C10_HOST_DEVICE MMDET3D_INLINE Taps<acc_t> no_taps() {
  return Taps<acc_t>{};
}

// Taps of the voxel with a flat index; none for an index that is no voxel's.
template <typename acc_t>
C10_HOST_DEVICE MMDET3D_INLINE Taps<acc_t> find_taps_at(const acc_t* matrix, const Size& size, int64_t voxel) {
  if (voxel < 0 || voxel >= static_cast<int64_t>(size.z) * size.y * size.x) return no_taps<acc_t>();
  const int32_t flat = static_cast<int32_t>(voxel);
  return find_taps(matrix, size, flat % size.x, flat / size.x % size.y, flat / (size.x * size.y));
}

// The arguments with strides in elements; channels lie together.
template <typename scalar_t, typename acc_t>
struct Arguments {
  const scalar_t* __restrict__ history;   // (B, V, T, C)
  const acc_t* __restrict__ matrix;       // (B, 4, 4)
  const int64_t* __restrict__ oldest_at;  // (B, K)
  scalar_t* __restrict__ out;             // (B, V, T, C)
  scalar_t* __restrict__ oldest;          // (B, K, C)
  int64_t history_batch, history_row, history_slot, out_batch, out_row, out_slot;
  int64_t batch, voxels, slots, channels, selected;
  Size size;
};

// What Arguments points at, checked. The callers in Python check with better messages; these checks keep a direct call
// through torch.ops inside its memory.
struct Prepared {
  at::Tensor history, matrix, oldest_at;
  at::Tensor out, oldest;
  Size size;

  Prepared(const at::Tensor& history_, const at::Tensor& matrix_, at::IntArrayRef size_zyx,
           const at::Tensor& oldest_at_, const at::Tensor& out_, const at::Tensor& oldest_)
      : history(history_), out(out_), oldest(oldest_) {
    TORCH_CHECK(history.dim() == 4 && history.size(2) > 0, "history_warp: history must be (B, V, T, C) with T > 0, got ",
                history.sizes());
    const int64_t B = history.size(0), V = history.size(1), C = history.size(3);
    constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
    TORCH_CHECK(size_zyx.size() == 3 && size_zyx[0] >= 0 && size_zyx[1] >= 0 && size_zyx[2] >= 0 && V <= kLimit &&
                    size_zyx[0] <= kLimit && size_zyx[1] <= kLimit && size_zyx[2] <= kLimit &&
                    size_zyx[0] * size_zyx[1] * size_zyx[2] == V,
                "history_warp: size_zyx must be (Z, Y, X) of ", V, " voxels, got ", size_zyx);
    TORCH_CHECK(matrix_.sizes() == at::IntArrayRef({B, 4, 4}), "history_warp: matrix must be (B, 4, 4), got ",
                matrix_.sizes());
    TORCH_CHECK(oldest_at_.dim() == 2 && oldest_at_.size(0) == B && oldest_at_.scalar_type() == at::kLong,
                "history_warp: oldest_at must be (B, K) int64, got ", oldest_at_.sizes(), " ", oldest_at_.scalar_type());
    TORCH_CHECK(out.sizes() == history.sizes() && (out.numel() == 0 || C == 1 || out.stride(3) == 1),
                "history_warp: out must be ", history.sizes(), " with a voxel's channels together, got ", out.sizes(),
                " with strides ", out.strides());
    TORCH_CHECK(oldest.sizes() == at::IntArrayRef({B, oldest_at_.size(1), C}) && oldest.is_contiguous(),
                "history_warp: oldest must be contiguous (B, K, C), got ", oldest.sizes());
    for (const at::Tensor& tensor : {out, oldest}) {
      TORCH_CHECK(tensor.scalar_type() == history.scalar_type(), "history_warp: results must be ",
                  history.scalar_type(), ", got ", tensor.scalar_type());
    }
    for (const at::Tensor& tensor : {matrix_, oldest_at_, out, oldest}) {
      TORCH_CHECK(tensor.device() == history.device(), "history_warp: all tensors must be on ", history.device(),
                  ", got ", tensor.device());
    }
    size = {static_cast<int32_t>(size_zyx[0]), static_cast<int32_t>(size_zyx[1]), static_cast<int32_t>(size_zyx[2])};
    if (C != 1 && history.stride(3) != 1) history = history.contiguous();
    matrix = matrix_.to(at::promote_types(history.scalar_type(), at::kFloat)).contiguous();
    oldest_at = oldest_at_.contiguous();
  }

  template <typename scalar_t, typename acc_t>
  Arguments<scalar_t, acc_t> arguments() const {
    return {history.const_data_ptr<scalar_t>(), matrix.const_data_ptr<acc_t>(), oldest_at.const_data_ptr<int64_t>(),
            out.mutable_data_ptr<scalar_t>(),   oldest.mutable_data_ptr<scalar_t>(),
            history.stride(0), history.stride(1), history.stride(2), out.stride(0), out.stride(1), out.stride(2),
            history.size(0),   history.size(1),   history.size(2),   history.size(3), oldest_at.size(1), size};
  }
};

}  // namespace mmdet3d::history_warp
