#include "kvmix/version.h"

#include "kernels/kernels.h"

namespace kvmix {

std::string_view Version() { return KVMIX_VERSION; }

std::vector<std::string_view> Targets() {
  std::vector<std::string_view> names;
  for (const kernels::Kernels& k : kernels::AllKernels()) names.push_back(k.target);
  return names;
}

}  // namespace kvmix
