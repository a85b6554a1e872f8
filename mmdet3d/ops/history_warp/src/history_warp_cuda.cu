// CUDA version of history_warp.
//
// A block warps a cube of target voxels, slot after slot. Their taps are found once, into shared memory. The source
// voxels of a cube lie close together, 125 for 64 targets when nothing turns, and those of one slot (48 kB of 96
// float32 channels) stay in the L1 cache: a voxel is read from DRAM about once and from L2 about twice, not eight
// times. Neighbouring threads read neighbouring channels, 16 bytes each; the eight reads of a thread do not wait for
// each other. What is written is not read again here and is marked so, which leaves the L2 cache to the sources.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "history_warp.h"

namespace mmdet3d::history_warp {
namespace {

constexpr int kEdge = 4;                         // of the cube of voxels that a block warps
constexpr int kVoxels = kEdge * kEdge * kEdge;   // of a block
constexpr int kThreads = 256;                    // of a block, at most
constexpr int kMaxSlots = 5;                     // of a block
constexpr int64_t kBlocks = 4096;                // enough to fill a GPU several times

// What a thread reads and writes in one access.
template <typename scalar_t, int count>
struct alignas(sizeof(scalar_t) * count) Pack {
  scalar_t value[count];
};

template <typename scalar_t, int count>
__device__ __forceinline__ Pack<scalar_t, count> load(const scalar_t* from) {
  return *reinterpret_cast<const Pack<scalar_t, count>*>(from);
}

template <typename scalar_t, int count>
__device__ __forceinline__ void store(scalar_t* to, const Pack<scalar_t, count>& pack) {
  if constexpr (sizeof(pack) == 16) {
    __stcs(reinterpret_cast<int4*>(to), *reinterpret_cast<const int4*>(&pack));
  } else {
    *reinterpret_cast<Pack<scalar_t, count>*>(to) = pack;
  }
}

// Sum of the taps for the channels of one thread; `history` points at them in voxel 0.
template <typename scalar_t, typename acc_t, int count>
__device__ __forceinline__ Pack<scalar_t, count> interpolate(const scalar_t* __restrict__ history, int64_t row_stride,
                                                             const Taps<acc_t>& taps) {
  Pack<scalar_t, count> pack[kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    pack[tap] = Pack<scalar_t, count>{};
    if (taps.weight[tap] != 0) pack[tap] = load<scalar_t, count>(history + taps.index[tap] * row_stride);
  }
  acc_t sum[count] = {};
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int i = 0; i < count; ++i) sum[i] += taps.weight[tap] * static_cast<acc_t>(pack[tap].value[i]);
  }
  Pack<scalar_t, count> result;
#pragma unroll
  for (int i = 0; i < count; ++i) result.value[i] = static_cast<scalar_t>(sum[i]);
  return result;
}

// The first `cube_blocks` blocks of a column of the grid take a cube and a range of slots each, the others kVoxels
// selected voxels each, of slot T - 1. blockIdx.z is the sample.
struct Work {
  uint32_t cubes_x, cubes_y, cube_blocks, slots_per_block;
};

// Finds the taps of the block's voxels; `target` gets the row of each one in the result, -1 for none.
template <typename scalar_t, typename acc_t>
__device__ void find_block_taps(const Arguments<scalar_t, acc_t>& args, const Work& work, int64_t b, bool selected,
                                Taps<acc_t>* taps, int32_t* target) {
  const acc_t* matrix = args.matrix + 16 * b;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < kVoxels; i += blockDim.x * blockDim.y) {
    target[i] = -1;
    if (selected) {
      const int64_t at = static_cast<int64_t>(blockIdx.x - work.cube_blocks) * kVoxels + i;
      if (at >= args.selected) continue;
      taps[i] = find_taps_at(matrix, args.size, args.oldest_at[b * args.selected + at]);
      target[i] = static_cast<int32_t>(at);
    } else {
      const uint32_t cube = blockIdx.x;
      const int x = cube % work.cubes_x * kEdge + i % kEdge;
      const int y = cube / work.cubes_x % work.cubes_y * kEdge + i / kEdge % kEdge;
      const int z = cube / (work.cubes_x * work.cubes_y) * kEdge + i / (kEdge * kEdge);
      if (x >= args.size.x || y >= args.size.y || z >= args.size.z) continue;
      taps[i] = find_taps(matrix, args.size, x, y, z);
      target[i] = (z * args.size.y + y) * args.size.x + x;
    }
  }
}

template <typename scalar_t, typename acc_t, int count>
__global__ void __launch_bounds__(kThreads) history_warp_kernel(const Arguments<scalar_t, acc_t> args,
                                                                const Work work) {
  __shared__ Taps<acc_t> taps[kVoxels];
  __shared__ int32_t target[kVoxels];
  const int64_t b = blockIdx.z;
  const bool selected = blockIdx.x >= work.cube_blocks;
  if (selected && blockIdx.y > 0) return;  // one slot only
  find_block_taps(args, work, b, selected, taps, target);
  __syncthreads();
  const int last = static_cast<int>(args.slots) - 1;
  const int first = selected ? last : blockIdx.y * work.slots_per_block;
  const int end = selected ? last + 1 : min(first + static_cast<int>(work.slots_per_block), last);
  const int channels = static_cast<int>(args.channels);
  for (int slot = first; slot < end; ++slot) {
    const scalar_t* from = args.history + b * args.history_batch + slot * args.history_slot;
    scalar_t* to = selected ? args.oldest + b * args.selected * args.channels
                            : args.out + b * args.out_batch + (slot + 1) * args.out_slot;
    const int64_t row_stride = selected ? args.channels : args.out_row;
    for (int i = threadIdx.y; i < kVoxels; i += blockDim.y) {
      if (target[i] < 0) continue;
      const Taps<acc_t> here = taps[i];
      for (int c = threadIdx.x * count; c < channels; c += blockDim.x * count) {
        store(to + target[i] * row_stride + c,
              interpolate<scalar_t, acc_t, count>(from + c, args.history_row, here));
      }
    }
  }
}

template <typename scalar_t, typename acc_t, int count>
void launch(const Arguments<scalar_t, acc_t>& args) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t cubes_x = ceil_div(args.size.x, kEdge), cubes_y = ceil_div(args.size.y, kEdge);
  const int64_t cubes = args.slots > 1 ? cubes_x * cubes_y * ceil_div(args.size.z, kEdge) : 0;
  const int64_t selections = ceil_div(args.selected, kVoxels);
  if (cubes + selections == 0) return;
  const int64_t slots = std::max<int64_t>(args.slots - 1, 1);
  const int64_t per_block = std::clamp<int64_t>(args.batch * cubes * slots / kBlocks, 1, kMaxSlots);
  const int64_t ranges = ceil_div(slots, per_block);
  TORCH_CHECK(cubes + selections <= std::numeric_limits<int>::max() && ranges <= 65535 && args.batch <= 65535,
              "history_warp: ", args.batch, " x ", args.voxels, " voxels of ", args.slots,
              " slots are more than one launch can serve");
  const int packs = static_cast<int>(std::min<int64_t>(ceil_div(args.channels, count), kThreads));
  int rows = 1;
  while (2 * rows * packs <= kThreads && rows < kVoxels) rows *= 2;
  const Work work{static_cast<uint32_t>(cubes_x), static_cast<uint32_t>(cubes_y), static_cast<uint32_t>(cubes),
                  static_cast<uint32_t>(per_block)};
  const dim3 grid(static_cast<unsigned>(cubes + selections), static_cast<unsigned>(ranges),
                  static_cast<unsigned>(args.batch));
  history_warp_kernel<scalar_t, acc_t, count>
      <<<grid, dim3(packs, rows), 0, at::cuda::getCurrentCUDAStream()>>>(args, work);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Whether every voxel's channels can be read and written in whole packs.
template <typename scalar_t, int count, typename acc_t>
bool fits(const Arguments<scalar_t, acc_t>& args) {
  const int64_t strides[] = {args.history_batch, args.history_row, args.history_slot, args.out_batch,
                             args.out_row,       args.out_slot,    args.channels};
  const void* pointers[] = {args.history, args.out, args.oldest};
  return std::all_of(std::begin(strides), std::end(strides), [](int64_t stride) { return stride % count == 0; }) &&
         std::all_of(std::begin(pointers), std::end(pointers), [](const void* pointer) {
           return reinterpret_cast<uintptr_t>(pointer) % (sizeof(scalar_t) * count) == 0;
         });
}

void history_warp_cuda(const at::Tensor& history, const at::Tensor& matrix, at::IntArrayRef size_zyx,
                       const at::Tensor& oldest_at, const at::Tensor& out, const at::Tensor& oldest) {
  const Prepared prepared(history, matrix, size_zyx, oldest_at, out, oldest);
  if (history.size(0) == 0 || history.size(3) == 0) return;
  TORCH_CHECK(history.size(3) <= std::numeric_limits<int>::max() / 2 && history.size(2) <= 65535 &&
                  oldest_at.size(1) <= std::numeric_limits<int>::max(),
              "history_warp: history ", history.sizes(), " is too large");
  const c10::cuda::CUDAGuard guard(history.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, history.scalar_type(), "history_warp_cuda", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    constexpr int kCount = 16 / sizeof(scalar_t);
    const auto args = prepared.arguments<scalar_t, acc_t>();
    if (fits<scalar_t, kCount>(args)) {
      launch<scalar_t, acc_t, kCount>(args);
    } else {
      launch<scalar_t, acc_t, 1>(args);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("history_warp", &history_warp_cuda); }

}  // namespace mmdet3d::history_warp
