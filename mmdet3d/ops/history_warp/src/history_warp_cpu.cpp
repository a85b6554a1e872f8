// CPU version of history_warp: threads over voxels, vectors over the channels of all slots.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "history_warp.h"

namespace mmdet3d::history_warp {
namespace {

// Taps of weight other than 0, as pointers.
template <typename scalar_t, typename acc_t>
struct Sources {
  const scalar_t* row[kTaps];
  acc_t weight[kTaps];
  int count = 0;
};

template <int taps, typename scalar_t, typename acc_t>
MMDET3D_INLINE void sum_of(const Sources<scalar_t, acc_t>& sources, scalar_t* __restrict__ out, int64_t channels) {
  const scalar_t* row[kTaps];
  acc_t weight[kTaps];
  for (int tap = 0; tap < taps; ++tap) row[tap] = sources.row[tap], weight[tap] = sources.weight[tap];
  for (int64_t c = 0; c < channels; ++c) {
    acc_t sum = 0;
#pragma GCC unroll 8
    for (int tap = 0; tap < taps; ++tap) sum += weight[tap] * static_cast<acc_t>(row[tap][c]);
    out[c] = static_cast<scalar_t>(sum);
  }
}

template <typename scalar_t, typename acc_t>
MMDET3D_INLINE void sum_rows(const Sources<scalar_t, acc_t>& sources, scalar_t* out, int64_t channels) {
  switch (sources.count) {
    case 0: return std::fill(out, out + channels, scalar_t(0));
    case 1: return sum_of<1>(sources, out, channels);
    case 2: return sum_of<2>(sources, out, channels);
    case 3: return sum_of<3>(sources, out, channels);
    case 4: return sum_of<4>(sources, out, channels);
    case 5: return sum_of<5>(sources, out, channels);
    case 6: return sum_of<6>(sources, out, channels);
    case 7: return sum_of<7>(sources, out, channels);
    default: return sum_of<8>(sources, out, channels);
  }
}

MMDET3D_MULTIVERSION void sum(const Sources<float, float>& sources, float* out, int64_t channels) {
  sum_rows(sources, out, channels);
}
MMDET3D_MULTIVERSION void sum(const Sources<double, double>& sources, double* out, int64_t channels) {
  sum_rows(sources, out, channels);
}
template <typename scalar_t>
void sum(const Sources<scalar_t, float>& sources, scalar_t* out, int64_t channels) {
  sum_rows(sources, out, channels);
}

template <typename scalar_t, typename acc_t>
Sources<scalar_t, acc_t> sources_of(const Taps<acc_t>& taps, const scalar_t* history, int64_t row_stride) {
  Sources<scalar_t, acc_t> sources;
  for (int tap = 0; tap < kTaps; ++tap) {
    if (taps.weight[tap] == 0) continue;
    sources.row[sources.count] = history + taps.index[tap] * row_stride;
    sources.weight[sources.count++] = taps.weight[tap];
  }
  return sources;
}

MMDET3D_UNFUSED Taps<float> taps_at(const float* matrix, const Size& size, int64_t voxel) {
  return find_taps_at(matrix, size, voxel);
}
MMDET3D_UNFUSED Taps<double> taps_at(const double* matrix, const Size& size, int64_t voxel) {
  return find_taps_at(matrix, size, voxel);
}

// Slots 0 to T - 2 of one voxel; `row` counts through the voxels of all samples.
template <typename scalar_t, typename acc_t>
void warp_voxel(const Arguments<scalar_t, acc_t>& args, int64_t row) {
  const int64_t b = row / args.voxels, voxel = row % args.voxels;
  const scalar_t* history = args.history + b * args.history_batch;
  scalar_t* out = args.out + b * args.out_batch + voxel * args.out_row + args.out_slot;
  auto sources = sources_of(taps_at(args.matrix + 16 * b, args.size, voxel), history, args.history_row);
  int64_t runs = args.slots - 1, length = args.channels;
  if (args.history_slot == length && args.out_slot == length) {  // one run of all slots
    length *= runs;
    runs = runs > 0;
  }
  for (int64_t run = 0; run < runs; ++run) {
    sum(sources, out + run * args.out_slot, length);
    for (int tap = 0; tap < sources.count; ++tap) sources.row[tap] += args.history_slot;
  }
}

// Slot T - 1 of one selected voxel; `row` counts through the selections of all samples.
template <typename scalar_t, typename acc_t>
void warp_oldest(const Arguments<scalar_t, acc_t>& args, int64_t row) {
  const int64_t b = row / args.selected;
  const scalar_t* slot = args.history + b * args.history_batch + (args.slots - 1) * args.history_slot;
  const Taps<acc_t> taps = taps_at(args.matrix + 16 * b, args.size, args.oldest_at[row]);
  sum(sources_of(taps, slot, args.history_row), args.oldest + row * args.channels, args.channels);
}

void history_warp_cpu(const at::Tensor& history, const at::Tensor& matrix, at::IntArrayRef size_zyx,
                      const at::Tensor& oldest_at, const at::Tensor& out, const at::Tensor& oldest) {
  const Prepared prepared(history, matrix, size_zyx, oldest_at, out, oldest);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, history.scalar_type(), "history_warp_cpu", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto args = prepared.arguments<scalar_t, acc_t>();
    at::parallel_for(0, args.batch * args.voxels, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) warp_voxel(args, row);
    });
    at::parallel_for(0, args.batch * args.selected, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) warp_oldest(args, row);
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("history_warp", &history_warp_cpu); }

}  // namespace mmdet3d::history_warp
