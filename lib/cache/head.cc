#include "lib/cache/head.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kvmix/version.h"

namespace kvmix::internal {
namespace {

kernels::RowFormat FormatOf(const HeadCodec& codec, std::size_t dim) {
  kernels::RowFormat f;
  f.dim = dim;
  f.storage = codec.kind.storage;
  f.operand_bits = OperandBits(codec.kind);
  switch (codec.kind.scale) {
    case KVMIX_SCALE_NONE:
      break;
    case KVMIX_SCALE_HEAD:
      f.constant = codec.head_scale;
      break;
    case KVMIX_SCALE_TOKEN:
      f.scale = kernels::ScaleStore::kF32;
      break;
    case KVMIX_SCALE_TOKEN_BF16:
      f.scale = kernels::ScaleStore::kBF16;
      break;
  }
  return f;
}

// Names what an encoder never makes, if the row holds it; nothing if not.
std::string_view NoCode(const kernels::RowFormat& format, const std::uint8_t* row) {
  bool bad = false;
  switch (format.storage) {
    case KVMIX_STORAGE_F16:
      for (std::size_t c = 0; c < format.dim; ++c) bad |= (row[2 * c + 1] & 0x7C) == 0x7C;
      return bad ? "NaN or infinity" : "";
    case KVMIX_STORAGE_I8:
      for (std::size_t c = 0; c < format.dim; ++c) bad |= row[c] == 0x80;
      return bad ? "a code of -128" : "";
    case KVMIX_STORAGE_I6:  // all bits are codes
    case KVMIX_STORAGE_I4:
    case KVMIX_STORAGE_I3:
      break;
  }
  return {};
}

// A head's scale is a number of its own, so such heads are not alike.
bool Alike(const HeadCodec& a, const HeadCodec& b) {
  return a.kind == b.kind && a.kind.scale != KVMIX_SCALE_HEAD;
}

}  // namespace

Result<const kernels::Kernels*> KernelsFor(std::string_view target) {
  if (const kernels::Kernels* kernels = kernels::FindKernels(target)) return kernels;
  return Status(ErrorCode::kInvalidArgument, fmt::format("target: expected one of {}, found \"{}\"",
                                                         fmt::join(Targets(), ", "), target));
}

kernels::RowsIn TokenRows(const kvmix_rows& view, std::size_t head, std::size_t first,
                          std::size_t count) {
  return {RowsView::Row(view, first, head), view.dtype, view.token_stride, count, view.head_dim};
}

kernels::RowsIn HeadRows(const kvmix_rows& view, std::size_t token, std::size_t head,
                         std::size_t count) {
  return {RowsView::Row(view, token, head), view.dtype, view.head_stride, count, view.head_dim};
}

std::uint64_t CompiledCodec::Encode(const kernels::RowsIn& tokens, std::uint8_t* rows,
                                    float* scales) const {
  return kernels_->encode.encode({tokens, transform_, format_, rows, row_bytes(), scales});
}

std::uint64_t CompiledCodec::EncodeHeads(const kernels::RowsIn& heads, std::uint8_t* rows,
                                         float* scales) const {
  return kernels_->encode.encode({heads, across_heads_, format_, rows, row_bytes(), scales});
}

kernels::CodedRows CompiledCodec::Coded(const void* rows, const float* scales,
                                        std::size_t count) const {
  return {format_,
          transform_,
          static_cast<const std::uint8_t*>(rows),
          row_bytes(),
          stores_scales() ? scales : nullptr,
          count};
}

namespace {

// A centre as its bytes have it: a scale, and int8 codes.
void ReadCentre(const std::uint8_t* from, std::size_t dim, float* mean) {
  float scale;
  std::memcpy(&scale, from, sizeof(scale));
  const auto* const codes = reinterpret_cast<const std::int8_t*>(from + sizeof(scale));
  for (std::size_t c = 0; c < dim; ++c) mean[c] = scale * static_cast<float>(codes[c]);
}

void WriteCentre(const float* mean, std::size_t dim, std::uint8_t* to) {
  float largest = 0.0f;
  for (std::size_t c = 0; c < dim; ++c) largest = std::max(largest, std::fabs(mean[c]));
  const float scale = largest < 0x1p-100f ? 0.0f : largest / 127.0f;
  std::memcpy(to, &scale, sizeof(scale));
  for (std::size_t c = 0; c < dim; ++c) {
    const float code = scale == 0.0f ? 0.0f : std::nearbyint(mean[c] / scale);
    to[sizeof(scale) + c] =
        static_cast<std::uint8_t>(static_cast<std::int8_t>(std::clamp(code, -127.0f, 127.0f)));
  }
}

}  // namespace

std::uint64_t CompiledCodec::EncodeAround(float* in_place, std::size_t count, std::size_t skip,
                                          std::uint8_t* centre, std::uint8_t* rows,
                                          float* scales) const {
  const std::size_t dim = format_.dim;
  if (transform_.rotates_or_folds()) {
    kernels_->transform.prepare(in_place, dim, count, dim, transform_.inv_factor,
                                transform_.hadamard);
  }
  // Sums in the order of the tokens, on every target.
  float mean[kMaxHeadDim] = {};
  const std::size_t first = skip < count ? skip : 0;
  for (std::size_t r = first; r < count; ++r) {
    for (std::size_t c = 0; c < dim; ++c) mean[c] += in_place[r * dim + c];
  }
  for (std::size_t c = 0; c < dim; ++c) mean[c] /= static_cast<float>(count - first);
  WriteCentre(mean, dim, centre);
  ReadCentre(centre, dim, mean);
  const kernels::Transform around{.mean = mean, .shaping = transform_.shaping};
  const kernels::RowsIn in{in_place, KVMIX_F32, static_cast<std::ptrdiff_t>(dim), count, dim};
  return kernels_->encode.encode({in, around, format_, rows, row_bytes(), scales});
}

void CompiledCodec::DecodeAround(const std::uint8_t* centre, const void* rows, const float* scales,
                                 std::size_t count, float* out) const {
  const std::size_t dim = format_.dim;
  if (!own_centre_) return Decode(rows, scales, count, out, dim);
  float mean[kMaxHeadDim];
  ReadCentre(centre, dim, mean);
  const kernels::Transform around{.mean = mean};
  kernels_->encode.decode_f32({format_, around, static_cast<const std::uint8_t*>(rows), row_bytes(),
                               stores_scales() ? scales : nullptr, count},
                              out, dim);
  if (!transform_.rotates_or_folds()) return;
  kernels_->transform.restore(out, dim, count, dim, transform_.factor, transform_.hadamard);
}

void CompiledCodec::Decode(const void* rows, const float* scales, std::size_t count, float* out,
                           std::size_t stride) const {
  kernels_->encode.decode_f32(Coded(rows, scales, count), out, stride);
}

void CompiledCodec::Decode(const void* rows, const float* scales, std::size_t count, Half* out,
                           std::size_t stride) const {
  kernels_->encode.decode_f16(Coded(rows, scales, count), out, stride);
}

void CompiledCodec::ToFloat(const kernels::RowsIn& rows, float* out) const {
  kernels_->encode.to_float(rows, out, rows.dim);
}

kernels::RowErrors CompiledCodec::Errors(const void* rows, const float* scales,
                                         const kernels::RowsIn& tokens) const {
  return kernels_->encode.errors(Coded(rows, scales, tokens.count), tokens);
}

Status CompiledCodec::CheckCoded(const void* rows, const float* scales, std::size_t count) const {
  for (std::size_t r = 0; r < count; ++r) {
    const std::uint8_t* const row = static_cast<const std::uint8_t*>(rows) + r * row_bytes();
    const std::string_view bad = NoCode(format_, row);
    if (!bad.empty()) return {ErrorCode::kInvalidArgument, fmt::format("row {}: {}", r, bad)};
    if (scales != nullptr && !(scales[r] >= 0.0f && std::isfinite(scales[r]))) {
      return {ErrorCode::kInvalidArgument,
              fmt::format("row {}: expected a finite scale >= 0, found {}", r, scales[r])};
    }
  }
  return {};
}

float CompiledCodec::HeadScale(const kernels::RowsIn& tokens) const {
  return kernels_->encode.head_scale(tokens, transform_);
}

void CompiledCodec::PrepareQueries(float* q, std::size_t rows, float attention_scale,
                                   float* bias) const {
  const std::size_t dim = format_.dim;
  if (bias != nullptr) {
    for (std::size_t r = 0; r < rows; ++r) {
      bias[r] = 0.0f;
      for (std::size_t c = 0; transform_.mean != nullptr && c < dim; ++c) {
        bias[r] += attention_scale * q[r * dim + c] * transform_.mean[c];
      }
    }
  }
  if (!transform_.rotates_or_folds()) return;
  kernels_->transform.prepare(q, dim, rows, dim, transform_.factor, transform_.hadamard);
}

void CompiledCodec::RestoreOutput(float* out, float weight) const {
  const std::size_t dim = format_.dim;
  if (transform_.rotates_or_folds()) {
    kernels_->transform.restore(out, dim, 1, dim, transform_.factor, transform_.hadamard);
  }
  if (transform_.mean == nullptr) return;
  for (std::size_t c = 0; c < dim; ++c) out[c] += weight * transform_.mean[c];
}

CompiledHeads::CompiledHeads(std::span<const HeadCodec* const> codecs, std::size_t dim,
                             const kernels::Kernels& kernels)
    : heads_(codecs.size()), alike_(codecs.size(), 1) {
  const std::size_t size = codecs.size() * dim;
  if (std::ranges::any_of(codecs,
                          [](const HeadCodec* codec) { return codec->vectors != nullptr; })) {
    vectors_ = std::make_unique<float[]>(3 * size);
  }
  if (std::ranges::any_of(codecs, [](const HeadCodec* codec) { return codec->kind.shape; }))
    matrices_ = std::make_unique<float[]>(size * dim);
  for (std::size_t h = codecs.size(); h-- > 0;) {
    const HeadCodec& codec = *codecs[h];
    CompiledCodec& head = heads_[h];
    head.kernels_ = &kernels;
    head.format_ = FormatOf(codec, dim);
    head.transform_.hadamard = codec.kind.hadamard;
    head.own_centre_ = codec.kind.own_centre;
    if (!codec.mean().empty()) {
      float* const mean = vectors_.get() + h * dim;
      std::ranges::copy(codec.mean(), mean);
      head.transform_.mean = mean;
    }
    if (!codec.factor().empty()) {
      float* const factor = vectors_.get() + size + h * dim;
      std::ranges::copy(codec.factor(), factor);
      std::ranges::transform(codec.factor(), factor + size, [](float x) { return 1.0f / x; });
      head.transform_.factor = factor;
      head.transform_.inv_factor = factor + size;
    }
    if (codec.kind.shape) {
      float* const matrix = matrices_.get() + h * dim * dim;
      std::ranges::copy(codec.shaping(), matrix);
      head.transform_.shaping = matrix;
    }
    head.across_heads_ = head.transform_;
    head.across_heads_.row_stride = dim;
    if (h + 1 < codecs.size() && Alike(codec, *codecs[h + 1])) alike_[h] = alike_[h + 1] + 1;
  }
}

}  // namespace kvmix::internal
