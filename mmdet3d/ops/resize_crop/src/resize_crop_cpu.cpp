// CPU version of resize_crop: only rows and columns that are kept, four rows and four bytes a pixel in one vector.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "multiversion.h"

namespace mmdet3d::resize_crop {
namespace {

constexpr int kFractionBits = 22;  // of a weight, so that weight * 255 fits into 32 bits
constexpr int64_t kRows = 4;       // filtered together along x
constexpr int64_t kPixel = 4;      // bytes: red, green, blue, any
constexpr int64_t kLanes = kRows * kPixel;

double cubic(double x) {
  x = std::abs(x);
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
  if (x < 2.0) return ((x - 5.0) * x + 8.0) * x * -0.5 + 2.0;
  return 0.0;
}

// The source positions [first, first + count) that make each of the output positions [begin, end), and their weights.
struct Filter {
  int64_t begin, taps;
  std::vector<int64_t> first, count;
  std::vector<int32_t> weights;

  MMDET3D_UNFUSED Filter(int64_t source, int64_t target, int64_t begin, int64_t end) : begin(begin) {
    const double scale = static_cast<double>(source) / target;
    const double widening = std::max(scale, 1.0), support = 2.0 * widening;
    taps = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
    const int64_t size = std::max<int64_t>(end - begin, 0);
    first.resize(size);
    count.resize(size);
    weights.resize(size * taps);
    std::vector<double> values(taps);
    for (int64_t i = 0; i < size; ++i) {
      const double centre = (begin + i + 0.5) * scale, inverse = 1.0 / widening;
      first[i] = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
      count[i] = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), source) - first[i];
      double total = 0.0;
      for (int64_t k = 0; k < count[i]; ++k) total += values[k] = cubic((k + first[i] - centre + 0.5) * inverse);
      for (int64_t k = 0; k < count[i]; ++k) {
        const double weight = values[k] / total * (1 << kFractionBits);
        weights[i * taps + k] = static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(first.size()); }
};

// Sum of `count` runs of kLanes bytes, `step` bytes apart, rounded and clamped to bytes. The loops over lanes become
// vector instructions, which vector types would not: GCC widens their bytes one by one.
MMDET3D_INLINE void filter(const uint8_t* source, int64_t step, const int32_t* weights, int64_t count, uint8_t* out) {
  int32_t sums[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] = 1 << (kFractionBits - 1);
  for (int64_t k = 0; k < count; ++k) {
    const uint8_t* bytes = source + k * step;
    const int32_t weight = weights[k];
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += bytes[lane] * weight;
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) out[lane] = std::min(std::max(sums[lane] >> kFractionBits, 0), 255);
}

// Four rows of `width` pixels, interleaved (width, kRows, kPixel), to four rows of (x.size(), kPixel), `stride` apart.
MMDET3D_MULTIVERSION void filter_rows(const uint8_t* interleaved, const Filter& x, uint8_t* out, int64_t stride) {
  for (int64_t i = 0; i < x.size(); ++i) {
    uint8_t result[kLanes];
    filter(interleaved + x.first[i] * kLanes, kLanes, &x.weights[i * x.taps], x.count[i], result);
    for (int64_t row = 0; row < kRows; ++row) {
      std::memcpy(out + row * stride + i * kPixel, result + row * kPixel, kPixel);
    }
  }
}

// One row of the result from the rows that are `stride` bytes apart; works on whole vectors.
MMDET3D_MULTIVERSION void filter_columns(const uint8_t* rows, int64_t stride, const int32_t* weights, int64_t count,
                                         uint8_t* out) {
  for (int64_t i = 0; i < stride; i += kLanes) filter(rows + i, stride, weights, count, out + i);
}

// Interleaves up to kRows rows of `width` pixels of three bytes; the fourth byte of a pixel is any.
void interleave(const uint8_t* image, int64_t width, int64_t rows, uint8_t* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* source = image + row * width * 3;
    uint8_t* target = out + row * kPixel;
    for (int64_t x = 0; x + 1 < width; ++x) std::memcpy(target + x * kLanes, source + x * 3, kPixel);
    std::memcpy(target + (width - 1) * kLanes, source + (width - 1) * 3, 3);  // no byte follows the last pixel
  }
}

at::Tensor resize_crop(const at::Tensor& image, at::IntArrayRef size, at::IntArrayRef crop) {
  const int64_t height = image.size(0), width = image.size(1);
  at::Tensor result = at::zeros({crop[3] - crop[1], crop[2] - crop[0], 3}, image.options());
  const Filter x(width, size[0], std::max<int64_t>(crop[0], 0), std::min(crop[2], size[0]));
  const Filter y(height, size[1], std::max<int64_t>(crop[1], 0), std::min(crop[3], size[1]));
  if (x.size() == 0 || y.size() == 0) return result;

  const int64_t top = y.first.front(), rows = y.first.back() + y.count.back() - top;
  const int64_t stride = (x.size() * kPixel + kLanes - 1) / kLanes * kLanes;
  std::vector<uint8_t> narrow((rows + kRows - 1) / kRows * kRows * stride), lines(width * kLanes), line(stride);
  const uint8_t* source = image.const_data_ptr<uint8_t>();
  for (int64_t row = 0; row < rows; row += kRows) {
    interleave(source + (top + row) * width * 3, width, std::min(kRows, rows - row), lines.data());
    filter_rows(lines.data(), x, narrow.data() + row * stride, stride);
  }
  uint8_t* out = result.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < y.size(); ++i) {
    filter_columns(narrow.data() + (y.first[i] - top) * stride, stride, &y.weights[i * y.taps], y.count[i],
                   line.data());
    uint8_t* target = out + ((y.begin + i - crop[1]) * result.size(1) + x.begin - crop[0]) * 3;
    for (int64_t j = 0; j < x.size(); ++j) std::memcpy(target + j * 3, line.data() + j * kPixel, 3);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("resize_crop", &resize_crop); }

}  // namespace mmdet3d::resize_crop
