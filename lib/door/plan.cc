// Codecs and plans through the waist.
#include <algorithm>
#include <vector>

#include "lib/door/door.h"
#include "lib/plan/plan.h"

namespace kvmix::door {
namespace {

// Far beyond any model, and a plan of as many takes less than a GB.
constexpr std::size_t kMostHeads = std::size_t{1} << 23;

CodecKind KindOf(const kvmix_codec& codec) { return internal::ValueOf(codec).kind; }

Result<Model> ModelOf(const kvmix_layer* layers, std::size_t count) {
  if (count > kMaxCount) {
    return Error(ErrorCode::kInvalidArgument, "layers: expected 1 to {}, found {}", kMaxCount,
                 count);
  }
  if (Status s = CheckArray(layers, count, "layers"); !s.ok()) return s;
  Model model;
  for (std::size_t i = 0; i < count; ++i) {
    const kvmix_layer& layer = At(layers, i);
    if (layer.sinks_size != 0 && layer.sinks == nullptr) return IsNull("layer: sinks");
    if (layer.sinks_size > kMaxCount) {
      return Error(ErrorCode::kInvalidArgument, "layer {}: sinks: expected at most {}, found {}", i,
                   kMaxCount, layer.sinks_size);
    }
    model.layers.push_back(internal::ValueOf(layer));
  }
  return model;
}

Status CheckPlace(const Plan& plan, std::size_t layer) {
  const std::size_t layers = plan.model.layers.size();
  if (layer < layers) return {};
  return Error(ErrorCode::kInvalidArgument, "layer {} of a plan of {} layers", layer, layers);
}

Status CheckPlace(const Plan& plan, std::size_t layer, std::size_t kv_head, kvmix_tensor tensor) {
  if (Status s = CheckPlace(plan, layer); !s.ok()) return s;
  if (Status s = CheckTensor(tensor); !s.ok()) return s;
  const std::size_t heads = plan.model.layers[layer].kv_heads;
  if (kv_head < heads) return {};
  return Error(ErrorCode::kInvalidArgument, "KV head {} of layer {}, which has {}", kv_head, layer,
               heads);
}

Status SetCodec(Plan& plan, std::size_t layer, std::size_t kv_head, kvmix_tensor tensor,
                const kvmix_codec* from) {
  const std::size_t first = kv_head == KVMIX_ALL ? 0 : kv_head;
  if (Status s = CheckPlace(plan, layer, first, tensor); !s.ok()) return s;
  const LayerShape& shape = plan.model.layers[layer];
  if (!shape.owns_kv()) {
    return Error(ErrorCode::kInvalidArgument, "layer {} has no K and V of its own", layer);
  }
  if (Status s = CheckCodecStruct(from); !s.ok()) return s;
  const HeadCodec codec = internal::ValueOf(*from);
  if (Status s = internal::CheckCodecAt(codec, plan, layer, first, tensor); !s.ok()) return s;
  const std::size_t last = kv_head == KVMIX_ALL ? shape.kv_heads : kv_head + 1;
  for (std::size_t h = first; h < last; ++h) plan.codec(layer, h, tensor) = codec;
  return {};
}

}  // namespace
}  // namespace kvmix::door

using namespace kvmix::door;  // NOLINT: every function below is a door
using kvmix::CodecKind;
using kvmix::ErrorCode;
using kvmix::HeadCodec;
using kvmix::LayerShape;
using kvmix::Model;
using kvmix::Plan;
using kvmix::Result;
using kvmix::Status;
namespace internal = kvmix::internal;

kvmix_code kvmix_codec_parse(const char* name, kvmix_codec* codec, kvmix_error* error) {
  return Guarded(error, [&]() -> Status {
    if (Status s = CheckStruct(codec, "codec"); !s.ok()) return s;
    const Result<std::string_view> text = TextOf(name, "codec");
    if (!text.ok()) return text.status();
    const Result<CodecKind> kind = internal::ParseCodecKind(*text);
    if (!kind.ok()) return kind.status();
    const kvmix_codec parsed = internal::ViewOf(HeadCodec{*kind});
    codec->storage = parsed.storage;
    codec->scale = parsed.scale;
    codec->operands = parsed.operands;
    codec->steps = parsed.steps;
    return {};
  });
}

size_t kvmix_codec_name(const kvmix_codec* codec, char* name, size_t size) {
  return Value([&]() -> size_t {
    if (!CheckCodecStruct(codec).ok()) return 0;
    return CopyText(internal::ToString(KindOf(*codec)), name, size);
  });
}

kvmix_code kvmix_codec_check(const kvmix_codec* codec, size_t head_dim, kvmix_error* error) {
  return Guarded(error, [&] {
    const Status s = CheckCodecStruct(codec);
    return s.ok() ? internal::CheckCodec(internal::ValueOf(*codec), head_dim) : s;
  });
}

size_t kvmix_codec_row_bytes(const kvmix_codec* codec, size_t head_dim) {
  if (codec == nullptr) return 0;
  return (kvmix_storage_bits(codec->storage) * head_dim + 7) / 8;
}

size_t kvmix_codec_token_bytes(const kvmix_codec* codec, size_t head_dim) {
  if (codec == nullptr) return 0;
  return internal::BytesPerToken({codec->storage, codec->scale}, head_dim);
}

kvmix_code kvmix_layers_check(const kvmix_layer* layers, size_t count, kvmix_error* error) {
  return Guarded(error, [&] {
    const Result<Model> model = ModelOf(layers, count);
    return model.ok() ? internal::CheckModel(*model) : model.status();
  });
}

size_t kvmix_layers_name(const kvmix_layer* layers, size_t count, char* text, size_t size) {
  return Value([&]() -> size_t {
    const Result<Model> model = ModelOf(layers, count);
    return model.ok() ? CopyText(internal::ToString(*model), text, size) : 0;
  });
}

kvmix_code kvmix_plan_parse(const char* text, size_t bytes, const char* folder, kvmix_plan** out,
                            kvmix_error* error) {
  return Make(out, error, [&]() -> Result<Plan> {
    if (text == nullptr) return IsNull("text");
    const Result<std::string_view> place = TextOf(folder, "folder");
    if (!place.ok()) return place.status();
    return internal::ParsePlan({text, bytes}, folder != nullptr ? place->data() : nullptr);
  });
}

kvmix_code kvmix_plan_load(const char* path, kvmix_plan** out, kvmix_error* error) {
  return Make(out, error, [&]() -> Result<Plan> {
    const Result<std::string_view> text = TextOf(path, "path");
    return text.ok() ? internal::LoadPlan(std::string(*text)) : text.status();
  });
}

kvmix_code kvmix_plan_save(const kvmix_plan* plan, const char* path, kvmix_error* error) {
  return With(plan, error, [&](const Plan& p) {
    const Result<std::string_view> text = TextOf(path, "path");
    return text.ok() ? internal::SavePlan(p, std::string(*text)) : text.status();
  });
}

kvmix_code kvmix_plan_create(const kvmix_layer* layers, size_t count, kvmix_plan** out,
                             kvmix_error* error) {
  return Make(out, error, [&]() -> Result<Plan> {
    const Result<Model> model = ModelOf(layers, count);
    if (!model.ok()) return model.status();
    if (Status s = internal::CheckModel(*model); !s.ok()) return s;
    const size_t heads = model->kv_heads_before(count);
    if (heads > kMostHeads) {
      return kvmix::internal::Error(ErrorCode::kOutOfMemory,
                                    "plan: expected at most {} KV heads, found {}", kMostHeads,
                                    heads);
    }
    return kvmix::UniformPlan(*model, {}, {});
  });
}

kvmix_code kvmix_plan_set_codec(kvmix_plan* plan, size_t layer, size_t kv_head, kvmix_tensor tensor,
                                const kvmix_codec* codec, kvmix_error* error) {
  return With(plan, error, [&](Plan& p) { return SetCodec(p, layer, kv_head, tensor, codec); });
}

kvmix_code kvmix_plan_set_exact_first(kvmix_plan* plan, size_t tokens, kvmix_error* error) {
  return With(plan, error, [&](Plan& p) {
    Status s = internal::CheckExactFirst(tokens);
    if (s.ok()) p.exact_first = tokens;
    return s;
  });
}

kvmix_code kvmix_plan_set_exact_newest(kvmix_plan* plan, size_t tokens, kvmix_error* error) {
  return With(plan, error, [&](Plan& p) {
    Status s = internal::CheckExactNewest(tokens, p.codecs);
    if (s.ok()) p.exact_newest = tokens;
    return s;
  });
}

void kvmix_plan_destroy(kvmix_plan* plan) { Destroy(plan); }

size_t kvmix_plan_layers(const kvmix_plan* plan) {
  return Ask(plan, [](const Plan& p) { return p.model.layers.size(); });
}

size_t kvmix_plan_exact_first(const kvmix_plan* plan) {
  return Ask(plan, [](const Plan& p) { return p.exact_first; });
}

size_t kvmix_plan_exact_newest(const kvmix_plan* plan) {
  return Ask(plan, [](const Plan& p) { return p.exact_newest; });
}

kvmix_code kvmix_plan_layer(const kvmix_plan* plan, size_t layer, kvmix_layer* out,
                            kvmix_error* error) {
  return With(plan, error, [&](const Plan& p) {
    Status s = CheckPlace(p, layer);
    return s.ok() ? Fill(out, internal::ViewOf(p.model.layers[layer]), "layer") : s;
  });
}

kvmix_code kvmix_plan_codec(const kvmix_plan* plan, size_t layer, size_t kv_head,
                            kvmix_tensor tensor, kvmix_codec* out, kvmix_error* error) {
  return With(plan, error, [&](const Plan& p) {
    Status s = CheckPlace(p, layer, kv_head, tensor);
    return s.ok() ? Fill(out, internal::ViewOf(p.codec(layer, kv_head, tensor)), "codec") : s;
  });
}

uint64_t kvmix_plan_fingerprint(const kvmix_plan* plan) {
  return Ask(plan, [](const Plan& p) { return internal::Fingerprint(p); });
}

kvmix_code kvmix_plan_measure(const kvmix_plan* plan, size_t context, kvmix_plan_size* out,
                              kvmix_error* error) {
  return With(plan, error, [&](const Plan& p) {
    return Fill(out, internal::MeasurePlan(p, context), "plan size");
  });
}

kvmix_code kvmix_plan_provenance(const kvmix_plan* plan, kvmix_provenance* out,
                                 kvmix_error* error) {
  return With(plan, error, [&](const Plan& p) {
    return Fill(out, internal::ViewOf(p.provenance), "provenance");
  });
}

kvmix_code kvmix_plan_set_provenance(kvmix_plan* plan, const kvmix_provenance* from,
                                     kvmix_error* error) {
  return With(plan, error, [&](Plan& p) {
    Status s = CheckStruct(from, "provenance");
    if (s.ok()) p.provenance = internal::ValueOf(*from);
    return s;
  });
}
