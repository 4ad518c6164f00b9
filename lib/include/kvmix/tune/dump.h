// Dumps: K, V and Q of a model as it ran over real text, memory-mapped and read-only.
//
// Two forms are read:
// 1. safetensors: tensors `layers.N.k|v|q` of F16, BF16 or F32, [tokens, heads, head_dim] in C
//    order, or [1, heads, tokens, head_dim], as Hugging Face has them. Metadata (strings): format
//    `kvmix-dump-1`, model, corpus, layers, tokens, prompt_tokens (comma-separated lengths of the
//    concatenated prompts), layer_shapes (JSON, docs/formats.md), kv_heads, query_heads, head_dim,
//    rope_theta, attention_scale. What safetensors' own reader refuses is refused. Metadata that
//    are missing follow from the tensors (one prompt then); those that contradict them are an
//    error. Without layer_shapes, kv_heads and tokens in the metadata, tensors of more heads than
//    tokens are refused: their axes are likely to be in another order. Tensors of other names are
//    ignored. Layers may differ. One that reads another's K and V has Q only, one without K and
//    V has nothing; layer_shapes must say so.
// 2. the original study's raw folder: layer_NN.{k,v,q}.bin, f16, [tokens, heads, head_dim], all
//    layers alike, their shape given by the caller.
// Q may be missing (all layers or none): errors of K and V can be measured then, attention cannot.
#ifndef KVMIX_TUNE_DUMP_H_
#define KVMIX_TUNE_DUMP_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvmix/export.h"
#include "kvmix/plan.h"
#include "kvmix/rows.h"
#include "kvmix/status.h"

namespace kvmix::tune {

// What the files of a raw folder do not say. query_heads 0: q files, if there are any, are ignored.
struct RawFormat {
  std::size_t kv_heads = 0;
  std::size_t query_heads = 0;
  std::size_t head_dim = 0;
  std::vector<std::size_t> prompt_tokens;  // empty: one prompt of all tokens
};

// Movable. Owns the mapping; everything that it hands out points into it. Every file is fully
// checked on opening, but for NaN and Inf.
class KVMIX_API Dump {
 public:
  // A safetensors file, or a raw folder (then, and only then, `raw` must be given).
  static Result<Dump> Open(const std::string& path, const RawFormat* raw = nullptr);
  Dump(Dump&&) noexcept;
  Dump& operator=(Dump&&) noexcept;
  ~Dump();

  const std::string& path() const;
  const std::string& model_name() const;  // "" where unknown
  const std::string& corpus() const;      // "" where unknown
  // Windows, soft caps and sinks as layer_shapes have them, attention scales also as
  // attention_scale has it. query_heads equals kv_heads where there is no Q and the metadata do not
  // say.
  const Model& model() const;
  bool has_q() const;
  std::size_t tokens() const;
  const std::vector<std::size_t>& prompt_tokens() const;  // sums to tokens()

  // [tokens, heads, head_dim]. Without Q, q() has no data. K and V of a layer that reads another's
  // are the other's; a layer without any has no data.
  RowsView k(std::size_t layer) const;
  RowsView v(std::size_t layer) const;
  RowsView q(std::size_t layer) const;
  RowsView head(std::size_t layer, std::size_t kv_head, Tensor t) const;
  // How the file calls a tensor, for messages and tables.
  std::string k_name(std::size_t layer) const;
  std::string v_name(std::size_t layer) const;

  // NaN or Inf in this layer's own K, V or Q: an error naming file, tensor, layer, head, token.
  Status CheckFinite(std::size_t layer) const;
  // XXH3 (64 bits) of this layer's own K, V and Q, one after the other, as they lie in the file.
  std::uint64_t LayerHash(std::size_t layer) const;
  // Tells the kernel that the pages of this layer's own tensors are not needed for now, so that a
  // long walk over layers keeps little in memory.
  void Release(std::size_t layer) const;

 private:
  struct Impl;
  explicit Dump(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvmix::tune

#endif  // KVMIX_TUNE_DUMP_H_
