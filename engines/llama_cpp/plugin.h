// The plug-in as a whole: what its registry owns, and its devices, contexts and watched buffers
// share.
#ifndef KVMIX_ENGINES_LLAMA_CPP_PLUGIN_H_
#define KVMIX_ENGINES_LLAMA_CPP_PLUGIN_H_

#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "ggml-backend-impl.h"
#include "ggml.h"

#include "engines/common/settings.h"
#include "engines/llama_cpp/nodes.h"
#include "engines/llama_cpp/watch.h"

namespace kvmix::llama {

// A line to stderr.
void Say(const std::string& line);

class Plugin {
 public:
  explicit Plugin(engine::Settings of) : settings(std::move(of)) {}

  const engine::Settings settings;
  Watch watch;
  ggml_backend_reg registry{};
  ggml_backend_device device{};

  // A line for every reason only once.
  void SayOnce(const std::string& reason, const std::string& line);
  // An attention that is computed here. Says why another is not.
  std::optional<Attention> Take(ggml_tensor* op);

 private:
  std::mutex mutex_;
  std::set<std::string> said_;
};

}  // namespace kvmix::llama

#endif  // KVMIX_ENGINES_LLAMA_CPP_PLUGIN_H_
