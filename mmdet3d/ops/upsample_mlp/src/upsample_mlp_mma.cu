// Forward pass of upsample_mlp by tensor cores, for float16 and bfloat16.
//
// A cell (see Span) is 2 x 2 x 2 coarse voxels and the 2 x 2 x 2 fine ones between them. A warp takes eight cells, a
// group of four lanes each, and 16 channels for a product, of which each lane of a group takes four in a row: it loads
// them of the eight coarse voxels, interpolates, applies the softplus and has, without any exchange, exactly what it
// must provide of the left operands of four products m16n8k16: rows g and g + 8 of product m are fine voxels 2m and
// 2m + 1 of the cell of group g. The order of the channels in a product is free, as long as the weights follow it. So a
// lane can also load the channels of two products at once: memory is read in fewer and larger pieces.
//
// The work is bounded by the two calls of the special function unit in a softplus and, about as much, by the number of
// instructions.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "fast_math.cuh"
#include "tensor_cores.cuh"
#include "trilinear_x2.cuh"
#include "upsample_mlp.h"

namespace mmdet3d::upsample_mlp {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;       // of a block
constexpr int kCells = 8;       // of a warp
constexpr int kCorners = 8;     // of a cell: coarse voxels, and fine ones; index 4 z + 2 y + x
constexpr int kProducts = 4;    // of 16 rows, for the 64 fine voxels of a warp
constexpr int kStep = 16;       // channels of a product
constexpr int kColumns = 8;     // outputs of a product
constexpr int kWide = 3;        // products side by side where there are more than kColumns outputs
constexpr int kLaneChannels = 4;
constexpr int kMaxShared = 48 * 1024;
using trilinear_x2::kFar;

// What a lane provides of a voxel, or of a column of the weights, for a product: four channels.
using Quad = uint2;

// The two coarse and the two fine voxels of a cell along one axis. Cell c lies between the coarse voxels c - 1 and c
// and holds the fine voxels 2c - 1 and 2c. Cell 0 is put together from the two ends of the axis, where the nearest
// coarse voxel is held: it lies between the last and the first voxel, but neither counts for the other side. So there
// are as many cells as coarse voxels, and every cell has its eight fine voxels.
struct Span {
  uint32_t coarse[2], fine[2];
  float far;  // weight of the farther coarse voxel
  __device__ __forceinline__ Span(uint32_t cell, uint32_t count)
      : coarse{(cell == 0 ? count : cell) - 1, cell},
        fine{2 * (cell == 0 ? count : cell) - 1, 2 * cell},
        far(cell == 0 ? 0.f : kFar) {}
};

struct Cell {
  uint32_t batch;
  Span z, y, x;
  // Neighbours in z are neighbours in the output, and those in x in the input.
  __device__ __forceinline__ static Cell at(uint32_t index, const Sizes& size) {
    const uint32_t xz = index / size.z, yx = xz / size.x, by = yx / size.y;
    return {by, Span(index - xz * size.z, size.z), Span(yx - by * size.y, size.y), Span(xz - yx * size.x, size.x)};
  }
  // Corner i in hidden (B, Z, Y, X, ...).
  __device__ __forceinline__ uint32_t hidden_voxel(int i, const Sizes& size) const {
    return ((batch * size.z + z.coarse[i >> 2]) * size.y + y.coarse[i >> 1 & 1]) * size.x + x.coarse[i & 1];
  }
  // Corner i in residual (B, X, Y, Z, ...).
  __device__ __forceinline__ uint32_t residual_voxel(int i, const Sizes& size) const {
    return ((batch * size.x + x.coarse[i & 1]) * size.y + y.coarse[i >> 1 & 1]) * size.z + z.coarse[i >> 2];
  }
  // Fine voxel i in fine and out (B, 2X, 2Y, 2Z, ...).
  __device__ __forceinline__ uint32_t fine_voxel(int i, const Sizes& size) const {
    return ((batch * 2 * size.x + x.fine[i & 1]) * 2 * size.y + y.fine[i >> 1 & 1]) * 2 * size.z + z.fine[i >> 2];
  }
};

__device__ __forceinline__ void lerp(float2& low, float2& high, float far) {
  const float2 step{high.x - low.x, high.y - low.y};
  low = {low.x + far * step.x, low.y + far * step.y};
  high = {high.x - far * step.x, high.y - far * step.y};
}

// Values of the coarse voxels of a cell to those of the fine ones.
__device__ __forceinline__ void interpolate(float2 (&v)[kCorners], const Cell& cell) {
#pragma unroll
  for (int i = 0; i < kCorners; i += 2) lerp(v[i], v[i + 1], cell.x.far);
#pragma unroll
  for (int i = 0; i < kCorners; i += 1 + 2 * (i & 1)) lerp(v[i], v[i + 2], cell.y.far);
#pragma unroll
  for (int i = 0; i < kCorners / 2; ++i) lerp(v[i], v[i + 4], cell.z.far);
}

// The compiler's own type of 16-bit numbers for PyTorch's.
template <typename T>
using Number = std::conditional_t<std::is_same_v<T, c10::Half>, __half, __nv_bfloat16>;

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

// What a lane loads of a voxel at once: for one product or for two.
template <int QUADS>
struct alignas(sizeof(Quad) * QUADS) Chunk {
  Quad quad[QUADS];
};

template <int QUADS, typename T>
__device__ __forceinline__ Chunk<QUADS> load_chunk(const T* from, uint32_t bytes) {
  const char* at = reinterpret_cast<const char*>(from) + bytes;
  if constexpr (QUADS == 1) {
    return {__ldg(reinterpret_cast<const uint2*>(at))};
  } else {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
    return {{{v.x, v.y}, {v.z, v.w}}};
  }
}

// Weights of outputs first <= k < first + WIDTH * kColumns, zero past K, in the order in which lanes need them:
// (product after product, product side by side, lane). A lane t of a group provides rows 2t, 2t + 1, 2t + 8 and 2t + 9.
template <typename T, int WIDTH, int QUADS>
__device__ void load_weights(const Args<T>& args, int first, Quad* weights) {
  const int channels = args.size.hidden, count = channels / kStep * WIDTH * kWarp;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int lane = i % kWarp, part = i / kWarp % WIDTH, step = i / (kWarp * WIDTH);
    const int k = first + part * kColumns + lane / 4;
    Quad quad{0, 0};
    if (k < args.size.outputs) {
      const int channel = step / QUADS * QUADS * kStep + (lane % 4 * QUADS + step % QUADS) * kLaneChannels;
      const float* w = args.weight + int64_t(k) * channels + channel;
      quad = {pack<Number<T>>(w[0], w[1]), pack<Number<T>>(w[2], w[3])};
    }
    weights[i] = quad;
  }
}

// The left operands of the q-th products of what was loaded: pairs of fine voxels x registers. `guide` is added before
// the softplus.
template <typename T, bool GUIDED, int QUADS>
__device__ __forceinline__ void activations(const Chunk<QUADS> (&coarse)[kCorners],
                                            const Chunk<QUADS> (&guide)[kCorners], int q, const Cell& cell,
                                            uint32_t (&a)[kProducts][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float2 v[kCorners];
#pragma unroll
    for (int i = 0; i < kCorners; ++i) v[i] = unpack<Number<T>>(half ? coarse[i].quad[q].y : coarse[i].quad[q].x);
    interpolate(v, cell);
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      if constexpr (GUIDED) {
        const float2 more = unpack<Number<T>>(half ? guide[i].quad[q].y : guide[i].quad[q].x);
        v[i] = {v[i].x + more.x, v[i].y + more.y};
      }
      a[i / 2][2 * half + i % 2] = pack<Number<T>>(fast_softplus(v[i].x), fast_softplus(v[i].y));
    }
  }
}

// Outputs k and k + 1 of a voxel, k even. With PAIRS both are there and aligned to eight bytes; otherwise `both` says
// whether k + 1 is there.
template <bool PAIRS>
__device__ __forceinline__ float2 load_two(const float* from, bool both) {
  if constexpr (PAIRS) return __ldg(reinterpret_cast<const float2*>(from));
  return {__ldg(from), both ? __ldg(from + 1) : 0.f};
}

template <bool PAIRS>
__device__ __forceinline__ void store_two(float* to, float2 value, bool both) {
  if constexpr (PAIRS) {
    *reinterpret_cast<float2*>(to) = value;
  } else {
    to[0] = value.x;
    if (both) to[1] = value.y;
  }
}

// Adds bias and residual and stores. A lane has columns 2t and 2t + 1 of all fine voxels of its cell.
template <bool PAIRS, typename T, int WIDTH>
__device__ __forceinline__ void finish(const float (&sum)[kProducts][WIDTH][4], const Args<T>& args, const Cell& cell,
                                       uint32_t first) {
  const uint32_t outputs = args.size.outputs;
#pragma unroll
  for (int part = 0; part < WIDTH; ++part) {
    const uint32_t k = first + part * kColumns + threadIdx.x % 4 * 2;
    if (k >= outputs) continue;
    const bool both = k + 1 < outputs;
    float2 v[kCorners] = {};
    if (args.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < kCorners; ++i) {
        v[i] = load_two<PAIRS>(args.residual + uint64_t(cell.residual_voxel(i, args.size)) * outputs + k, both);
      }
      interpolate(v, cell);
    }
    const float2 bias = load_two<PAIRS>(args.bias + k, both);
#pragma unroll
    for (int i = 0; i < kCorners; ++i) {
      const float* s = &sum[i / 2][part][i % 2 * 2];
      v[i] = {s[0] + bias.x + args.residual_weight * v[i].x, s[1] + bias.y + args.residual_weight * v[i].y};
      store_two<PAIRS>(args.out + uint64_t(cell.fine_voxel(i, args.size)) * outputs + k, v[i], both);
    }
  }
}

// Blocks that a multiprocessor holds; 128 registers a thread do not suffice for a wide guided one.
template <int WIDTH, bool GUIDED>
constexpr int kBlocks = WIDTH > 1 && GUIDED ? 1 : 2;

// Outputs first <= k < first + WIDTH * kColumns of all fine voxels. A block takes a run of neighbouring cells.
template <typename T, int WIDTH, bool GUIDED, int QUADS>
__global__ void __launch_bounds__(kWarps* kWarp, (kBlocks<WIDTH, GUIDED>))
    mma_kernel(const Args<T> args, int first, bool pairs, uint32_t cells) {
  extern __shared__ Quad weights[];
  load_weights<T, WIDTH, QUADS>(args, first, weights);
  __syncthreads();
  const Sizes& size = args.size;
  const uint32_t lane = threadIdx.x % kWarp, steps = size.hidden / kStep;
  const uint32_t row_bytes = size.hidden * sizeof(T), lane_bytes = lane % 4 * sizeof(Chunk<QUADS>);
  const uint64_t groups = (cells + kCells - 1) / kCells;
  const uint32_t end = (blockIdx.x + 1) * groups / gridDim.x;
  for (uint32_t group = blockIdx.x * groups / gridDim.x + threadIdx.x / kWarp; group < end; group += kWarps) {
    const uint32_t index = group * kCells + lane / 4;
    const Cell cell = Cell::at(min(index, cells - 1), size);
    uint32_t row[kCorners];
#pragma unroll
    for (int i = 0; i < kCorners; ++i) row[i] = cell.hidden_voxel(i, size) * row_bytes + lane_bytes;
    float sum[kProducts][WIDTH][4] = {};
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step += QUADS) {
      Chunk<QUADS> coarse[kCorners], guide[kCorners];
#pragma unroll
      for (int i = 0; i < kCorners; ++i) {
        coarse[i] = load_chunk<QUADS>(args.hidden + step * kStep, row[i]);
        if constexpr (GUIDED) {
          guide[i] = load_chunk<QUADS>(args.fine + step * kStep, cell.fine_voxel(i, size) * row_bytes + lane_bytes);
        }
      }
#pragma unroll
      for (int q = 0; q < QUADS; ++q) {
        uint32_t a[kProducts][4];
        activations<T, GUIDED>(coarse, guide, q, cell, a);
#pragma unroll
        for (int part = 0; part < WIDTH; ++part) {
          const Quad b = weights[((step + q) * WIDTH + part) * kWarp + lane];
#pragma unroll
          for (int m = 0; m < kProducts; ++m) multiply_add<Number<T>>(sum[m][part], a[m], b.x, b.y);
        }
      }
    }
    if (index < cells) {
      if (pairs) {
        finish<true>(sum, args, cell, first);
      } else {
        finish<false>(sum, args, cell, first);
      }
    }
    __syncwarp();
  }
}

bool aligned(const void* pointer, size_t bytes = sizeof(Quad)) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether the kernel runs here: the GPU has these products, and the kernel was compiled for one that has.
template <typename Kernel>
bool has_products(Kernel* kernel) {
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return at::cuda::getCurrentDeviceProperties()->major >= 8 && attributes.ptxVersion >= 80;
}

template <typename T, int WIDTH, bool GUIDED, int QUADS>
bool launch(const Args<T>& args) {
  const Sizes& size = args.size;
  const int shared = size.hidden / kStep * WIDTH * kWarp * static_cast<int>(sizeof(Quad));
  const auto kernel = &mma_kernel<T, WIDTH, GUIDED, QUADS>;
  if (shared > kMaxShared || !has_products(kernel)) return false;
  const bool pairs = size.outputs % 2 == 0 && aligned(args.residual) && aligned(args.bias) && aligned(args.out);
  const int64_t cells = int64_t(size.batch) * size.z * size.y * size.x;
  const int64_t wanted = (cells + kCells * kWarps - 1) / (kCells * kWarps);
  const int processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  const int blocks = std::min<int64_t>(wanted, int64_t(processors) * kBlocks<WIDTH, GUIDED>);
  for (int first = 0; first < size.outputs; first += WIDTH * kColumns) {
    kernel<<<blocks, kWarps * kWarp, shared, at::cuda::getCurrentCUDAStream()>>>(args, first, pairs,
                                                                                 static_cast<uint32_t>(cells));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return true;
}

}  // namespace

template <typename T>
bool forward_by_tensor_cores(const Args<T>& args) {
  const Sizes& size = args.size;
  // Voxels, and bytes within hidden and fine, are counted in 32 bits.
  const int64_t voxels = int64_t(size.batch) * size.z * size.y * size.x, row_bytes = size.hidden * sizeof(T);
  const bool small = std::max<int64_t>(kCorners, row_bytes * (args.fine ? kCorners : 1)) * voxels < int64_t(1) << 32;
  if (size.hidden % kStep != 0 || !small || !aligned(args.hidden) || !aligned(args.fine)) return false;
  if (size.outputs <= kColumns) return args.fine ? launch<T, 1, true, 1>(args) : launch<T, 1, false, 1>(args);
  if (args.fine) return launch<T, kWide, true, 1>(args);
  const bool two = size.hidden % (2 * kStep) == 0 && aligned(args.hidden, sizeof(Chunk<2>));
  return two ? launch<T, kWide, false, 2>(args) : launch<T, kWide, false, 1>(args);
}

template bool forward_by_tensor_cores(const Args<c10::Half>& args);
template bool forward_by_tensor_cores(const Args<c10::BFloat16>& args);

}  // namespace mmdet3d::upsample_mlp
