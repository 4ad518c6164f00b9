// Rows of one head without a cache, through the waist.
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "lib/cache/head.h"
#include "lib/cache/views.h"
#include "lib/door/door.h"
#include "lib/plan/plan.h"

struct kvmix_row_codec
    : kvmix::door::Handle<std::shared_ptr<const kvmix::internal::CompiledCodec>, 0x73776f72> {
  using Handle::Handle;  // "rows"
};

namespace kvmix::door {
namespace {

using CodecPointer = std::shared_ptr<const internal::CompiledCodec>;
constexpr std::size_t kRowsAtATime = 64;

// The codec, and what keeps its vectors.
CodecPointer Compile(const HeadCodec& codec, std::size_t head_dim,
                     const kernels::Kernels& kernels) {
  const HeadCodec* const one[] = {&codec};
  const auto heads = std::make_shared<const internal::CompiledHeads>(one, head_dim, kernels);
  return {heads, &(*heads)[0]};
}

Status CheckHeadDim(std::size_t head_dim) {
  if (head_dim != 0 && head_dim <= kMaxHeadDim) return {};
  return Error(ErrorCode::kInvalidArgument, "head_dim: expected 1 to {}, found {}", kMaxHeadDim,
               head_dim);
}

Result<CodecPointer> NewCodec(const kvmix_codec* from, std::size_t head_dim, const char* target) {
  if (Status s = CheckHeadDim(head_dim); !s.ok()) return s;
  if (Status s = CheckCodecStruct(from); !s.ok()) return s;
  const HeadCodec codec = internal::ValueOf(*from);
  if (Status s = internal::CheckCodec(codec, head_dim); !s.ok()) return s;
  if (codec.kind.own_centre) {
    return Error(ErrorCode::kInvalidArgument,
                 "expected a codec without +own-centre, which a cache has stretches for, found {}",
                 internal::ToString(codec.kind));
  }
  const Result<std::string_view> name = TextOf(target, "target");
  if (!name.ok()) return name.status();
  const Result<const kernels::Kernels*> kernels = internal::KernelsFor(*name);
  if (!kernels.ok()) return kernels.status();
  return Compile(codec, head_dim, **kernels);
}

Status CheckHead(const kvmix_rows* rows, std::size_t head_dim) {
  if (rows == nullptr) return IsNull("rows");
  return internal::CheckRows(*rows, "rows", 1, head_dim);
}

Status CheckCodes(const internal::CompiledCodec& codec, const void* codes, const float* scales,
                  std::size_t tokens) {
  if (tokens == 0) return {};
  if (codes == nullptr) return IsNull("codes");
  return codec.stores_scales() && scales == nullptr ? IsNull("scales") : Status();
}

kernels::RowsIn All(const kvmix_rows& rows) { return internal::TokenRows(rows, 0, 0, rows.tokens); }

// f32, and f16 as the codec's kernels write it, go straight to their place; others row by row.
Status Decode(const internal::CompiledCodec& codec, const void* codes, const float* scales,
              std::size_t tokens, const kvmix_out& out) {
  const std::size_t dim = codec.format().dim;
  const Result<internal::OutRows> to = internal::OutRows::Make(out, tokens, 1, dim);
  if (!to.ok()) return to.status();
  const std::ptrdiff_t stride =
      out.token_stride != 0 ? out.token_stride : static_cast<std::ptrdiff_t>(dim);
  if (stride > 0 && out.dtype == KVMIX_F32) {
    codec.Decode(codes, scales, tokens, static_cast<float*>(out.data),
                 static_cast<std::size_t>(stride));
    return {};
  }
  if (stride > 0 && out.dtype == KVMIX_F16) {
    codec.Decode(codes, scales, tokens, static_cast<Half*>(out.data),
                 static_cast<std::size_t>(stride));
    return {};
  }
  std::vector<float> rows(std::min(tokens, kRowsAtATime) * dim);
  for (std::size_t t = 0, n; t < tokens; t += n) {
    n = std::min(tokens - t, kRowsAtATime);
    codec.Decode(static_cast<const std::uint8_t*>(codes) + t * codec.row_bytes(),
                 codec.stores_scales() ? scales + t : nullptr, n, rows.data(), dim);
    for (std::size_t i = 0; i < n; ++i) to->Put(t + i, 0, rows.data() + i * dim);
  }
  return {};
}

}  // namespace
}  // namespace kvmix::door

using namespace kvmix::door;  // NOLINT: every function below is a door
using kvmix::HeadCodec;
using kvmix::Status;
namespace internal = kvmix::internal;

kvmix_code kvmix_row_codec_create(const kvmix_codec* codec, size_t head_dim, const char* target,
                                  kvmix_row_codec** out, kvmix_error* error) {
  return Make(out, error, [&] { return NewCodec(codec, head_dim, target); });
}

void kvmix_row_codec_destroy(kvmix_row_codec* codec) { Destroy(codec); }

kvmix_code kvmix_quantize(const kvmix_row_codec* codec, const kvmix_rows* rows, void* codes,
                          float* scales, uint64_t* clamped, kvmix_error* error) {
  return With(codec, error, [&](const CodecPointer& c) {
    if (Status s = CheckHead(rows, c->format().dim); !s.ok()) return s;
    if (Status s = CheckCodes(*c, codes, scales, rows->tokens); !s.ok()) return s;
    const uint64_t n = c->Encode(All(*rows), static_cast<uint8_t*>(codes), scales);
    if (clamped != nullptr) *clamped = n;
    return Status();
  });
}

kvmix_code kvmix_dequantize(const kvmix_row_codec* codec, const void* codes, const float* scales,
                            size_t tokens, const kvmix_out* out, kvmix_error* error) {
  return With(codec, error, [&](const CodecPointer& c) {
    if (out == nullptr) return IsNull("out");
    if (Status s = CheckCodes(*c, codes, scales, tokens); !s.ok()) return s;
    return Decode(*c, codes, scales, tokens, *out);
  });
}

kvmix_code kvmix_quantize_errors(const kvmix_row_codec* codec, const kvmix_rows* rows,
                                 const void* codes, const float* scales, kvmix_errors* out,
                                 kvmix_error* error) {
  return With(codec, error, [&](const CodecPointer& c) {
    if (out == nullptr) return IsNull("out");
    if (Status s = CheckHead(rows, c->format().dim); !s.ok()) return s;
    if (Status s = CheckCodes(*c, codes, scales, rows->tokens); !s.ok()) return s;
    const kvmix::kernels::RowErrors e = c->Errors(codes, scales, All(*rows));
    *out = {rows->tokens * rows->head_dim, e.sum_squared_error, e.max_error, e.max_abs};
    return Status();
  });
}

kvmix_code kvmix_head_scale(const kvmix_codec* codec, const kvmix_rows* rows, float* out,
                            kvmix_error* error) {
  return Guarded(error, [&]() -> Status {
    if (rows == nullptr || out == nullptr) return IsNull(rows == nullptr ? "rows" : "out");
    if (Status s = CheckHeadDim(rows->head_dim); !s.ok()) return s;
    if (Status s = CheckHead(rows, rows->head_dim); !s.ok()) return s;
    if (Status s = CheckCodecStruct(codec); !s.ok()) return s;
    HeadCodec checked = internal::ValueOf(*codec);
    checked.head_scale = 1.0f;  // not looked at
    if (Status s = internal::CheckCodec(checked, rows->head_dim); !s.ok()) return s;
    *out = Compile(checked, rows->head_dim, kvmix::kernels::AllKernels().front())
               ->HeadScale(All(*rows));
    return {};
  });
}
