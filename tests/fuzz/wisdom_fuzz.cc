// Any bytes as wisdom: an error, or times above 0 that belong to this machine.
#include <cstdint>
#include <string_view>

#include "kvmix/tune/speed.h"
#include "tests/fuzz/fuzz.h"

namespace kvmix::fuzz {

std::vector<std::string> Seeds() {
  TemporaryFile file;
  tune::Wisdom wisdom = tune::ThisMachine();
  std::vector<std::string> seeds;
  for (const char* codec : {"i8-token", "f16"}) {
    const Status saved = tune::SaveWisdom(wisdom, file.path());
    Require(saved.ok(), "wisdom that can be saved", saved);
    seeds.push_back(file.Read());
    wisdom.speeds.push_back({codec, "i8-head", 6, 128, 96, 4096, 12.5});
  }
  wisdom.cpu = "another";
  Require(tune::SaveWisdom(wisdom, file.path()).ok(), "wisdom that can be saved");
  seeds.push_back(file.Read());
  return seeds;
}

namespace {

void Run(std::string_view bytes) {
  static TemporaryFile file;
  file.Write(bytes);
  const Result<tune::Wisdom> wisdom = tune::LoadWisdom(file.path());
  if (!wisdom.ok()) return RequireGoodError(wisdom.status(), file.path());
  const tune::Wisdom here = tune::ThisMachine();
  Require(wisdom->cpu == here.cpu && wisdom->target == here.target, "wisdom of this machine");
  for (const tune::HeadSpeed& s : wisdom->speeds)
    Require(s.decode_ns > 0.0 && s.decode_ns < 1e300, "a time above 0");
}

}  // namespace
}  // namespace kvmix::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvmix::fuzz::Run({reinterpret_cast<const char*>(data), size});
  return 0;
}
