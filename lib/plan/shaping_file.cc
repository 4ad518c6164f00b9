#include "lib/plan/shaping_file.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "lib/files/file.h"
#include "lib/files/safetensors.h"

namespace kvmix::internal {
namespace {

// visit(tensor's name, k_dim, codec) for every K with the step, in the plan's order.
template <class P, class Visit>
void ForShaped(P& plan, const Visit& visit) {
  const std::vector<LayerShape>& layers = plan.model.layers;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    if (!layers[layer].owns_kv()) continue;
    for (std::size_t head = 0; head < layers[layer].kv_heads; ++head) {
      auto& codec = plan.codec(layer, head, KVMIX_K);
      if (codec.kind.shape)
        visit(fmt::format("layers.{}.heads.{}.k", layer, head), layers[layer].k_dim, codec);
    }
  }
}

std::string_view Bytes(std::span<const float> numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size_bytes()};
}

}  // namespace

bool HasShaping(const Plan& plan) {
  return std::ranges::any_of(plan.codecs, [](const HeadCodec& codec) { return codec.kind.shape; });
}

std::string ShapingHash(const Plan& plan) {
  XXH3_state_t hash;
  XXH3_64bits_reset(&hash);
  ForShaped(plan, [&](const std::string&, std::size_t, const HeadCodec& codec) {
    const std::string_view bytes = Bytes(codec.shaping());
    XXH3_64bits_update(&hash, bytes.data(), bytes.size());
  });
  return fmt::format("{:016x}", XXH3_64bits_digest(&hash));
}

std::string ShapingFileName(const std::string& hash) {
  return fmt::format("shaping-{}.safetensors", hash);
}

Status SaveShaping(const Plan& plan, const std::string& path) {
  std::vector<SafetensorsTensor> tensors;
  ForShaped(plan, [&](const std::string& name, std::size_t dim, const HeadCodec& codec) {
    tensors.push_back({name, "F32", {dim, dim}, Bytes(codec.shaping())});
  });
  return WriteSafetensors(path, {{"format", "kvmix-shaping-1"}}, tensors);
}

Status LoadShaping(const std::string& path, const std::string& hash, Plan* plan) {
  const Result<std::string> file = ReadFile(path);
  if (!file.ok()) return file.status();
  const Result<Safetensors> matrices = ParseSafetensors(*file, path);
  if (!matrices.ok()) return matrices.status();
  Status status;
  ForShaped(*plan, [&](const std::string& name, std::size_t dim, HeadCodec& codec) {
    if (!status.ok()) return;
    const Result<std::string_view> data = TensorData(
        *file, *matrices, path, name, "F32", {dim, dim}, "a matrix, as the plan has the step");
    if (!data.ok()) {
      status = data.status();
      return;
    }
    CodecVectors vectors = codec.vectors != nullptr ? *codec.vectors : CodecVectors();
    vectors.shaping.resize(dim * dim);
    std::memcpy(vectors.shaping.data(), data->data(), data->size());
    codec.vectors = std::make_shared<const CodecVectors>(std::move(vectors));
  });
  if (!status.ok()) return status;
  if (const std::string own = ShapingHash(*plan); own != hash)
    return FileError(ErrorCode::kCorrupt, path, "hash of the matrices", hash, own);
  return {};
}

}  // namespace kvmix::internal
