// Files that tests make and damage: safetensors built by hand, a folder that goes away by itself.
#ifndef KVMIX_TESTS_DUMP_FILES_H_
#define KVMIX_TESTS_DUMP_FILES_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvmix/half.h"
#include "kvmix/rows.h"
#include "kvmix/status.h"

namespace kvmix::testing {

class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "kvmix-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() { std::filesystem::remove_all(path_); }

  std::string file(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

inline void WriteBytes(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string ReadBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// One line that names the file, what was expected and what was found.
inline void ExpectGoodMessage(const Status& status, const std::string& path) {
  EXPECT_FALSE(status.ok());
  const std::string& m = status.message();
  EXPECT_EQ(m.find('\n'), m.npos) << m;
  EXPECT_TRUE(m.starts_with(path)) << m;
  EXPECT_NE(m.find("expected"), m.npos) << m;
  EXPECT_NE(m.find("found"), m.npos) << m;
}

// 8 bytes of length, the header, the buffer.
inline std::string SafetensorsBytes(const std::string& header, const std::string& buffer) {
  std::string bytes;
  for (int i = 0; i < 8; ++i)
    bytes += static_cast<char>(static_cast<std::uint64_t>(header.size()) >> (8 * i) & 0xFFu);
  return bytes + header + buffer;
}

// A small good dump, in parts that a test can change before it asks for the bytes.
struct DumpParts {
  std::size_t layers = 2, tokens = 6, kv_heads = 2, query_heads = 4, head_dim = 8;
  nlohmann::ordered_json header;
  std::string buffer;

  explicit DumpParts(bool with_q = true) {
    header["__metadata__"] = {{"format", "kvmix-dump-1"},
                              {"model", "a model"},
                              {"corpus", "a corpus"},
                              {"layers", "2"},
                              {"tokens", "6"},
                              {"kv_heads", "2"},
                              {"query_heads", "4"},
                              {"head_dim", "8"},
                              {"prompt_tokens", "4,2"},
                              {"rope_theta", "1e4"},
                              {"attention_scale", "0.25"}};
    for (std::size_t layer = 0; layer < layers; ++layer) {
      for (const char* kind : {"k", "q", "v"}) {
        if (*kind == 'q' && !with_q) continue;
        const std::size_t heads = *kind == 'q' ? query_heads : kv_heads;
        Add("layers." + std::to_string(layer) + '.' + kind, "F16", {tokens, heads, head_dim},
            Numbers(tokens * heads * head_dim));
      }
    }
  }

  void Add(const std::string& name, const std::string& dtype, const std::vector<std::size_t>& shape,
           const std::string& data) {
    header[name] = {{"dtype", dtype},
                    {"shape", shape},
                    {"data_offsets", {buffer.size(), buffer.size() + data.size()}}};
    buffer += data;
  }
  // The halves of a tensor, to look at or to change.
  Half* tensor(const std::string& name) { return reinterpret_cast<Half*>(data(name)); }
  char* data(const std::string& name) {
    return &buffer[header[name]["data_offsets"][0].get<std::size_t>()];
  }

  // The same with tensors of another type (bf16 numbers are cut off, not rounded), and in the order
  // [1, heads, tokens, head_dim] if `heads_first`.
  DumpParts As(Dtype dtype, bool heads_first) {
    DumpParts parts = *this;
    parts.header.clear();
    parts.buffer.clear();
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        parts.header[name] = entry;
        continue;
      }
      const auto shape = entry["shape"].get<std::vector<std::size_t>>();
      const RowsView rows = RowsView::F16(tensor(name), shape[0], shape[1], shape[2]);
      std::string bytes;
      for (std::size_t i = 0; i < rows.tokens * rows.heads; ++i) {
        const std::size_t t = heads_first ? i % rows.tokens : i / rows.heads,
                          h = heads_first ? i / rows.tokens : i % rows.heads;
        for (std::size_t c = 0; c < rows.head_dim; ++c)
          AppendNumber(dtype, rows.At(t, h, c), &bytes);
      }
      const std::vector<std::size_t> as_heads_first = {1, shape[1], shape[0], shape[2]};
      parts.Add(name,
                dtype == KVMIX_F16    ? "F16"
                : dtype == KVMIX_BF16 ? "BF16"
                                      : "F32",
                heads_first ? as_heads_first : shape, bytes);
    }
    return parts;
  }
  std::string Bytes() const { return SafetensorsBytes(header.dump(), buffer); }

 private:
  static void AppendNumber(Dtype dtype, float value, std::string* bytes) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t number = dtype == KVMIX_F32    ? bits
                                 : dtype == KVMIX_BF16 ? bits >> 16
                                                       : std::uint32_t{FloatToHalf(value)};
    for (int i = 0; i < (dtype == KVMIX_F32 ? 4 : 2); ++i)
      *bytes += static_cast<char>(number >> (8 * i) & 0xFFu);
  }

  std::string Numbers(std::size_t count) {
    std::normal_distribution<float> normal;
    std::vector<Half> halves(count);
    for (Half& h : halves) h = FloatToHalf(normal(random_));
    return std::string(reinterpret_cast<const char*>(halves.data()), count * sizeof(Half));
  }
  std::mt19937 random_{1};
};

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_DUMP_FILES_H_
