// Any bytes as a safetensors file: an error, or tensors that lie inside the file and cover it.
#include <cstdint>
#include <string_view>

#include "lib/files/safetensors.h"
#include "tests/dump_files.h"
#include "tests/fuzz/fuzz.h"

namespace kvmix::fuzz {

std::vector<std::string> Seeds() {
  using testing::SafetensorsBytes;
  testing::DumpParts shuffled(false);
  shuffled.Add("empty", "F32", {0, 7}, "");
  shuffled.Add("scalar", "U8", {}, "x");
  return {testing::DumpParts().Bytes(), shuffled.Bytes(), SafetensorsBytes("{}", ""),
          SafetensorsBytes(R"({"a":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]}}  )", "abc"),
          SafetensorsBytes(R"({"\u00e9":{"dtype":"I8","shape":[1],"data_offsets":[1,2]}})", "ab")};
}

namespace {

void Run(std::string_view bytes) {
  const Result<internal::Safetensors> parsed = internal::ParseSafetensors(bytes, "file");
  if (!parsed.ok()) return RequireGoodError(parsed.status(), "file");
  std::size_t covered = 0;
  for (const auto& [name, tensor] : parsed->tensors) {
    Require(tensor.first >= 8 && tensor.first <= bytes.size() &&
                tensor.bytes <= bytes.size() - tensor.first,
            "a tensor inside the file");
    covered += tensor.bytes;
  }
  std::uint64_t header = 0;
  for (int i = 8; i-- > 0;) header = header << 8 | static_cast<unsigned char>(bytes[i]);
  Require(covered == bytes.size() - 8 - header, "tensors that cover the buffer");
}

}  // namespace
}  // namespace kvmix::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvmix::fuzz::Run({reinterpret_cast<const char*>(data), size});
  return 0;
}
