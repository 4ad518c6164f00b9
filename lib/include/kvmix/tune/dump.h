// Dumps: K, V and Q of a model as it ran over real text, read one layer at a time.
//
// A dump is a safetensors file: tensors `layers.N.k|v|q` of F16, BF16 or F32, [tokens, heads,
// head_dim] in C order, or [1, heads, tokens, head_dim], as Hugging Face has them. Metadata
// (strings): format `kvmix-dump-1`, model, corpus, layers, tokens, prompt_tokens (comma-separated
// lengths of the concatenated prompts), layer_shapes (JSON, docs/formats.md), kv_heads,
// query_heads, head_dim, rope_theta, attention_scale. What safetensors' own reader refuses is
// refused. Metadata that are missing follow from the tensors (one prompt then); those that
// contradict them are an error. Without layer_shapes, kv_heads and tokens in the metadata, tensors
// of more heads than tokens are refused: their axes are likely to be in another order. Tensors of
// other names are ignored. Layers may differ. One that reads another's K and V has Q only, one
// without K and V has nothing; layer_shapes must say so. Q may be missing (all layers or none):
// errors of K and V can be measured then, attention cannot.
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

// The metadata `layer_shapes` of a dump of this model: JSON, a list of its layers, in the form that
// plans have as well (docs/formats.md).
KVMIX_API std::string LayerShapesText(const Model& model);

// One layer in memory, until its last copy goes. Without Q, q has no data. K and V of a layer that
// reads another's are the other's; a layer without any has no data.
struct KVMIX_API DumpLayer {
  RowsView k, v, q;  // [tokens, heads, head_dim]
  std::shared_ptr<const void> memory[2];

  RowsView head(std::size_t kv_head, Tensor t) const;  // of K or V
};

// Movable. Keeps its file open, and no layer in memory that nobody has. The file is fully checked
// on opening, but for NaN and Inf. Functions that are const may run on several threads.
class KVMIX_API Dump {
 public:
  static Result<Dump> Open(const std::string& path);
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

  // Reads a layer, or shares it with whoever has it already. kNonFinite: its K, V or Q holds NaN or
  // Inf; the error names file, tensor, layer, head, token. kIo: another program changed the file
  // since it was opened. kOutOfMemory.
  Result<DumpLayer> Load(std::size_t layer) const;
  // How the file calls a tensor, for messages and tables.
  std::string k_name(std::size_t layer) const;
  std::string v_name(std::size_t layer) const;

  // XXH3 (64 bits) of this layer's own K, V and Q, one after the other, as they lie in the file.
  Result<std::uint64_t> LayerHash(std::size_t layer) const;

 private:
  struct KVMIX_HIDDEN Impl;
  explicit Dump(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// A dump's metadata.
struct DumpInfo {
  Model model;                             // layers without K and V may be among them
  std::vector<std::size_t> prompt_tokens;  // lengths of the prompts, in the order of their tokens
  std::string model_name, corpus;          // may be empty
};

// Writes a dump of F16 tensors while a model runs, without holding it in memory. Rows stream into
// files in the folder "PATH.PROCESS.parts"; Finish() makes the dump of them, which takes as much
// room once more. A writer that goes before leaves no dump, and what was at `path` untouched; the
// next writer to the same path removes what a killed process has left. After an error (a full disk,
// say) every call returns it.
class KVMIX_API DumpWriter {
 public:
  explicit DumpWriter(std::string path);  // creates nothing yet
  DumpWriter(DumpWriter&&) noexcept;
  DumpWriter& operator=(DumpWriter&&) noexcept;
  ~DumpWriter();

  // Adds rows of a layer, [tokens, heads, head_dim] of any type, behind those that this stream of
  // the layer has. A tensor without data is left out: K and V of a layer that reads another's, or
  // all Q. The dump has a layer's streams one after the other, in the order of their numbers.
  Status Add(std::size_t layer, const RowsView& k, const RowsView& v, const RowsView& q,
             std::size_t stream = 0);
  // Takes back the last tokens of one stream of a layer.
  Status Drop(std::size_t layer, std::size_t tokens, std::size_t stream = 0);
  // Writes the dump; the writer has nothing more to do then. kMismatch: a tensor is missing, or has
  // other heads, channels or tokens than `info` says.
  Status Finish(const DumpInfo& info);

 private:
  struct KVMIX_HIDDEN Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvmix::tune

#endif  // KVMIX_TUNE_DUMP_H_
