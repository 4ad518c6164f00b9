// KVMIX_DUMP: what the engine's attention saw, as a file that kvmix-tune reads (docs/formats.md).
#ifndef KVMIX_TOOLS_LLAMA_CPP_DUMP_H_
#define KVMIX_TOOLS_LLAMA_CPP_DUMP_H_

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include <kvmix/attention.h>
#include <kvmix/model.h>
#include <kvmix/rows.h>
#include <kvmix/status.h>
#include <kvmix/tune/dump.h>

namespace kvmix::llama {

// Finds the prompts in what attention sees, and gives their rows to a DumpWriter.
class Dump {
 public:
  explicit Dump(const std::string& path) : path_(path), writer_(path) {}

  // Q of one call, and K and V of its tokens, [tokens, heads, channels] of f32, all of one stream.
  // The mask tells where prompts begin: a token that sees only itself is a first one. Tokens that
  // do not follow on what is there already (a cache that is shifted, or shared) are left out, and
  // counted.
  Status Add(std::size_t layer, const LayerShape& shape, const RowsView& q, const RowsView& k,
             const RowsView& v, const MaskView& mask, std::size_t stream = 0);
  // Writes the dump, if there is anything to write; says what it holds.
  Status Finish();

 private:
  struct Stream {
    std::vector<std::size_t> prompts;  // tokens of each
    std::size_t seen = 0;              // by the last token, for the next to follow on
  };
  struct Layer {
    LayerShape shape;
    std::size_t most = 0;  // seen by any token
    std::map<std::size_t, Stream> streams;
  };
  Status DropShortPrompt(std::size_t layer, std::size_t stream);

  std::string path_;
  tune::DumpWriter writer_;
  std::map<std::size_t, Layer> layers_;
  std::size_t left_out_ = 0;
};

}  // namespace kvmix::llama

#endif  // KVMIX_TOOLS_LLAMA_CPP_DUMP_H_
