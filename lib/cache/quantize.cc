// RowCodec: a compiled codec of one head, for callers without a cache.
#include "kvmix/quantize.h"

#include <fmt/format.h>

#include "kernels/kernels.h"
#include "lib/cache/head.h"

namespace kvmix {

using internal::CompiledCodec;
using internal::CompiledHeads;
using internal::TokenRows;

namespace {

// The codec, and what keeps its vectors.
std::shared_ptr<const CompiledCodec> Compile(const HeadCodec& codec, std::size_t head_dim,
                                             const kernels::Kernels& kernels) {
  const HeadCodec* const one[] = {&codec};
  const auto heads = std::make_shared<const CompiledHeads>(one, head_dim, kernels);
  return {heads, &(*heads)[0]};
}

}  // namespace

RowCodec::RowCodec(std::shared_ptr<const CompiledCodec> compiled)
    : compiled_(std::move(compiled)) {}

Result<RowCodec> RowCodec::Create(const HeadCodec& codec, std::size_t head_dim,
                                  std::string_view target) {
  if (head_dim == 0 || head_dim > kMaxHeadDim) {
    return Status(ErrorCode::kInvalidArgument,
                  fmt::format("head_dim: expected 1 to {}, found {}", kMaxHeadDim, head_dim));
  }
  if (Status s = CheckCodec(codec, head_dim); !s.ok()) return s;
  const Result<const kernels::Kernels*> kernels = internal::KernelsFor(target);
  if (!kernels.ok()) return kernels.status();
  return RowCodec(Compile(codec, head_dim, **kernels));
}

std::size_t RowCodec::row_bytes() const { return compiled_->row_bytes(); }
bool RowCodec::stores_scales() const { return compiled_->stores_scales(); }

std::uint64_t RowCodec::Encode(const RowsView& rows, void* codes, float* scales) const {
  return compiled_->Encode(TokenRows(rows, 0, 0, rows.tokens), static_cast<std::uint8_t*>(codes),
                           scales);
}

void RowCodec::Decode(const void* codes, const float* scales, std::size_t tokens, float* out,
                      std::size_t out_stride) const {
  compiled_->Decode(codes, scales, tokens, out, out_stride);
}

void RowCodec::Decode(const void* codes, const float* scales, std::size_t tokens, Half* out,
                      std::size_t out_stride) const {
  compiled_->Decode(codes, scales, tokens, out, out_stride);
}

ErrorSums RowCodec::Errors(const RowsView& rows, const void* codes, const float* scales) const {
  const kernels::RowErrors e = compiled_->Errors(codes, scales, TokenRows(rows, 0, 0, rows.tokens));
  return {rows.tokens * rows.head_dim, e.sum_squared_error, e.max_error, e.max_abs};
}

float HeadScale(const RowsView& rows, const HeadCodec& codec) {
  const kernels::Kernels& best = kernels::AllKernels().front();
  return Compile(codec, rows.head_dim, best)->HeadScale(TokenRows(rows, 0, 0, rows.tokens));
}

}  // namespace kvmix
