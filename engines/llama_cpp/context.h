// A back-end of one of the engine's contexts: computes its graphs.
#ifndef KVMIX_ENGINES_LLAMA_CPP_CONTEXT_H_
#define KVMIX_ENGINES_LLAMA_CPP_CONTEXT_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"

#include <kvmix/status.h>

#include "engines/common/dump.h"
#include "engines/common/mirror.h"
#include "engines/llama_cpp/nodes.h"
#include "engines/llama_cpp/plugin.h"

namespace kvmix::llama {

class Context {
 public:
  explicit Context(Plugin& plugin);
  // Finishes the dump.
  ~Context();

  void set_threads(int threads) { threads_ = threads; }
  ggml_status Compute(ggml_cgraph* graph);

 private:
  using NewRows = std::vector<float>;  // [tokens][heads][channels]

  Result<engine::Mirror*> MirrorOf(const Attention& a);
  Status Write(const ggml_tensor* op);
  Status Attend(const Attention& a);
  void FillRequests(const Attention& a, std::size_t first_stream);
  Status AddToDump(const Attention& a);
  Status RunOnCpu(ggml_tensor* node);

  Plugin& plugin_;
  int threads_ = 1;
  std::map<const void*, engine::Mirror> mirrors_;   // by the data of the layer's K
  std::map<const void*, engine::Mirror*> by_data_;  // of K and of V
  std::vector<std::uint8_t> seen_;                  // by any query of seen_mask_
  const ggml_tensor* seen_mask_ = nullptr;
  std::vector<float> slopes_;
  std::vector<engine::MirrorRequest> requests_;
  std::unique_ptr<engine::Dump> dump_;  // of what attention sees, with the rows written before it
  NewRows new_k_, new_v_;
  std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)> cpu_{nullptr, ggml_backend_free};
};

}  // namespace kvmix::llama

#endif  // KVMIX_ENGINES_LLAMA_CPP_CONTEXT_H_
