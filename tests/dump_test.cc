// Dumps: what they give back, whatever the type and the order of their tensors; and what is
// refused, naming the place.
#include "kvmix/tune/dump.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dump_files.h"

namespace kvmix::tune {
namespace {

using testing::DumpParts;
using testing::ExpectGoodMessage;
using testing::SafetensorsBytes;
using testing::TempFolder;
using testing::WriteBytes;

Result<Dump> OpenBytes(const TempFolder& folder, const std::string& bytes,
                       const std::string& name = "dump.safetensors") {
  WriteBytes(folder.file(name), bytes);
  return Dump::Open(folder.file(name));
}

void ExpectRefused(const std::string& bytes, ErrorCode code, const std::string& text) {
  const TempFolder folder;
  const Result<Dump> dump = OpenBytes(folder, bytes);
  ASSERT_FALSE(dump.ok()) << "expected: " << text;
  ExpectGoodMessage(dump.status(), folder.file("dump.safetensors"));
  EXPECT_EQ(dump.status().code(), code) << dump.status().message();
  EXPECT_NE(dump.status().message().find(text), std::string::npos)
      << dump.status().message() << "\nshould speak of: " << text;
}

const Half* Halves(const RowsView& rows) {
  EXPECT_EQ(rows.dtype, KVMIX_F16);
  return static_cast<const Half*>(rows.data);
}

// The tensor [tokens, heads, 8] of halves at `expected` in C order.
void ExpectHalves(const RowsView& rows, std::size_t tokens, std::size_t heads,
                  const Half* expected) {
  EXPECT_EQ(rows.tokens, tokens);
  EXPECT_EQ(rows.heads, heads);
  EXPECT_EQ(rows.head_dim, 8u);
  EXPECT_EQ(rows.token_stride, static_cast<std::ptrdiff_t>(heads * 8));
  EXPECT_EQ(rows.head_stride, 8);
  EXPECT_TRUE(std::equal(expected, expected + tokens * heads * 8, Halves(rows)));
}

// Of DumpParts.
const Model kPartsModel(std::vector<LayerShape>(
    2, {.kv_heads = 2, .query_heads = 4, .k_dim = 8, .v_dim = 8, .attention_scale = 0.25f}));

TEST(Dump, ReadsWhatWasWritten) {
  const TempFolder folder;
  DumpParts parts;
  Result<Dump> opened = OpenBytes(folder, parts.Bytes());
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const Dump dump = std::move(*opened);
  EXPECT_EQ(dump.path(), folder.file("dump.safetensors"));
  EXPECT_EQ(dump.model_name(), "a model");
  EXPECT_EQ(dump.corpus(), "a corpus");
  EXPECT_EQ(dump.model(), kPartsModel);
  EXPECT_TRUE(dump.has_q());
  EXPECT_EQ(dump.tokens(), 6u);
  EXPECT_EQ(dump.prompt_tokens(), (std::vector<std::size_t>{4, 2}));
  for (const std::size_t layer : {0u, 1u}) {
    const std::string name = "layers." + std::to_string(layer);
    ExpectHalves(dump.Load(layer)->k, 6, 2, parts.tensor(name + ".k"));
    ExpectHalves(dump.Load(layer)->v, 6, 2, parts.tensor(name + ".v"));
    ExpectHalves(dump.Load(layer)->q, 6, 4, parts.tensor(name + ".q"));
    EXPECT_EQ(dump.k_name(layer), name + ".k");
    EXPECT_EQ(dump.v_name(layer), name + ".v");
    EXPECT_TRUE(dump.Load(layer).ok());
    const Result<DumpLayer> loaded = dump.Load(layer);  // its rows live as long
    const RowsView head = loaded->head(1, KVMIX_V);
    EXPECT_EQ(head.heads, 1u);
    EXPECT_EQ(head.At(5, 0, 7), HalfToFloat(parts.tensor(name + ".v")[5 * 16 + 8 + 7]));
  }
}

TEST(Dump, WithoutQ) {
  const TempFolder folder;
  const Result<Dump> dump = OpenBytes(folder, DumpParts(false).Bytes());
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  EXPECT_FALSE(dump->has_q());
  EXPECT_EQ(dump->Load(0)->q.data, nullptr);
  EXPECT_EQ(dump->model().layers[1].query_heads, 4u);  // the metadata know
  EXPECT_TRUE(dump->Load(1).ok());
}

TEST(Dump, GeometryFollowsFromTheTensors) {
  for (const bool with_q : {true, false}) {
    const TempFolder folder;
    DumpParts parts(with_q);
    parts.header.erase("__metadata__");
    const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
    ASSERT_TRUE(dump.ok()) << dump.status().message();
    EXPECT_EQ(dump->model().geometry(), (Geometry{2, 2, with_q ? 4u : 2u, 8}));
    EXPECT_EQ(dump->prompt_tokens(), std::vector<std::size_t>{6});
    EXPECT_EQ(dump->model_name(), "");
  }
}

constexpr Dtype kDtypes[] = {KVMIX_F16, KVMIX_BF16, KVMIX_F32};

// The numbers of a tensor of `parts` (halves in C order), as a dump of another type and order gives
// them.
void ExpectNumbers(const RowsView& rows, const RowsView& halves, Dtype dtype) {
  ASSERT_EQ(rows.dtype, dtype);
  ASSERT_EQ(rows.tokens, halves.tokens);
  ASSERT_EQ(rows.heads, halves.heads);
  ASSERT_EQ(rows.head_dim, halves.head_dim);
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    for (std::size_t h = 0; h < rows.heads; ++h) {
      for (std::size_t c = 0; c < rows.head_dim; ++c) {
        const float x = halves.At(t, h, c);
        const float cut =
            std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & 0xFFFF0000u);  // as bf16
        ASSERT_EQ(rows.At(t, h, c), dtype == KVMIX_BF16 ? cut : x)
            << "token " << t << ", head " << h << ", channel " << c;
      }
    }
  }
}

TEST(Dump, TensorsOfAnyTypeAndOrder) {
  for (const Dtype dtype : kDtypes) {
    for (const bool heads_first : {false, true}) {
      SCOPED_TRACE(::testing::Message()
                   << static_cast<int>(dtype) << ", heads first " << heads_first);
      const TempFolder folder;
      DumpParts parts;
      const Result<Dump> dump = OpenBytes(folder, parts.As(dtype, heads_first).Bytes());
      ASSERT_TRUE(dump.ok()) << dump.status().message();
      EXPECT_EQ(dump->model(), kPartsModel);
      EXPECT_EQ(dump->tokens(), 6u);
      EXPECT_EQ(dump->prompt_tokens(), (std::vector<std::size_t>{4, 2}));
      for (const std::size_t layer : {0u, 1u}) {
        const std::string name = "layers." + std::to_string(layer);
        const RowsView k = RowsView::F16(parts.tensor(name + ".k"), 6, 2, 8);
        for (int round = 0; round < 2; ++round) {
          ExpectNumbers(dump->Load(layer)->k, k, dtype);
          ExpectNumbers(dump->Load(layer)->v, RowsView::F16(parts.tensor(name + ".v"), 6, 2, 8),
                        dtype);
          ExpectNumbers(dump->Load(layer)->q, RowsView::F16(parts.tensor(name + ".q"), 6, 4, 8),
                        dtype);
          ExpectNumbers(dump->Load(layer)->head(1, KVMIX_K), k.Head(1), dtype);
          EXPECT_TRUE(dump->Load(layer).ok());
        }
      }
    }
  }
}

// K as bf16, V as f32, Q as f16.
TEST(Dump, TensorsOfDifferentTypes) {
  const TempFolder folder;
  DumpParts halves, bf16 = halves.As(KVMIX_BF16, false), f32 = halves.As(KVMIX_F32, false);
  DumpParts mixed = halves;
  mixed.header.clear();
  mixed.buffer.clear();
  for (const std::string layer : {"layers.0", "layers.1"}) {
    mixed.Add(layer + ".k", "BF16", {6, 2, 8}, std::string(bf16.data(layer + ".k"), 6 * 2 * 8 * 2));
    mixed.Add(layer + ".v", "F32", {6, 2, 8}, std::string(f32.data(layer + ".v"), 6 * 2 * 8 * 4));
    mixed.Add(layer + ".q", "F16", {6, 4, 8},
              std::string(halves.data(layer + ".q"), 6 * 4 * 8 * 2));
  }
  const Result<Dump> dump = OpenBytes(folder, mixed.Bytes());
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  ExpectNumbers(dump->Load(1)->k, RowsView::F16(halves.tensor("layers.1.k"), 6, 2, 8), KVMIX_BF16);
  ExpectNumbers(dump->Load(1)->v, RowsView::F16(halves.tensor("layers.1.v"), 6, 2, 8), KVMIX_F32);
  ExpectNumbers(dump->Load(1)->q, RowsView::F16(halves.tensor("layers.1.q"), 6, 4, 8), KVMIX_F16);
  EXPECT_TRUE(dump->Load(1).ok());
}

// As other programs write them: their own format, or nothing at all.
TEST(Dump, MetadataOfOtherPrograms) {
  for (const bool heads_first : {false, true}) {
    for (const nlohmann::ordered_json& metadata :
         {nlohmann::ordered_json(), nlohmann::ordered_json{{"format", "pt"}},
          nlohmann::ordered_json{{"model", "m"}, {"framework", "np"}}}) {
      SCOPED_TRACE(metadata.dump());
      const TempFolder folder;
      DumpParts parts = DumpParts().As(KVMIX_F32, heads_first);
      parts.header.erase("__metadata__");
      if (!metadata.is_null()) parts.header["__metadata__"] = metadata;
      const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
      ASSERT_TRUE(dump.ok()) << dump.status().message();
      EXPECT_EQ(dump->model().geometry(), (Geometry{2, 2, 4, 8}));
      EXPECT_EQ(dump->tokens(), 6u);
      EXPECT_EQ(dump->prompt_tokens(), std::vector<std::size_t>{6});
      EXPECT_EQ(dump->model_name(), metadata.is_null() ? "" : metadata.value("model", ""));
    }
  }
}

// A dump of 3 tokens, 4 KV heads, 8 query heads; as f16, in C order.
DumpParts FewTokens() {
  DumpParts parts;
  parts.header = nlohmann::ordered_json::object();
  parts.buffer.clear();
  for (const char* kind : {"k", "v", "q"}) {
    const std::size_t heads = *kind == 'q' ? 8 : 4;
    parts.Add(std::string("layers.0.") + kind, "F16", {3, heads, 8},
              std::string(3 * heads * 8 * 2, '\1'));
  }
  return parts;
}

// Three tokens of four heads are more likely to be three heads of four tokens, unless the file says
// what they are.
TEST(Dump, FewerTokensThanHeads) {
  const char* const text =
      "layers.0.k: expected [tokens, heads, head_dim], with kv_heads in the metadata where there "
      "are fewer tokens than heads, found [3, 4, 8], which looks like [heads, tokens, head_dim]";
  ExpectRefused(FewTokens().Bytes(), ErrorCode::kMismatch, text);
  DumpParts pt = FewTokens();
  pt.header["__metadata__"] = {{"format", "pt"}, {"model", "m"}, {"head_dim", "8"}};
  ExpectRefused(pt.Bytes(), ErrorCode::kMismatch, text);
  for (const auto& [key, value] : {std::pair("kv_heads", "4"), {"tokens", "3"}}) {
    const TempFolder folder;
    DumpParts parts = FewTokens();
    parts.header["__metadata__"] = {{key, value}};
    const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
    ASSERT_TRUE(dump.ok()) << dump.status().message();
    EXPECT_EQ(dump->model().geometry(), (Geometry{1, 4, 8, 8}));
    EXPECT_EQ(dump->tokens(), 3u);
    // And if they say the other order, they contradict the tensors.
    parts.header["__metadata__"] = {{key, key == std::string("tokens") ? "4" : "3"}};
    ExpectRefused(parts.Bytes(), ErrorCode::kMismatch, std::string("metadata ") + key);
  }
  // [1, heads, tokens, head_dim] leaves no doubt.
  const TempFolder folder;
  const Result<Dump> dump = OpenBytes(folder, FewTokens().As(KVMIX_F16, true).Bytes());
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  EXPECT_EQ(dump->model().geometry(), (Geometry{1, 4, 8, 8}));
  EXPECT_EQ(dump->tokens(), 3u);
}

TEST(Dump, OtherTensorsAreIgnored) {
  const TempFolder folder;
  DumpParts parts;
  parts.Add("layers.00.k", "F32", {1}, "abcd");
  parts.Add("layers.7.x", "I8", {0}, "");
  parts.Add("sinks", "BF16", {2}, "abcd");
  const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  EXPECT_EQ(dump->model().layers.size(), 2u);
}

TEST(Dump, MisalignedTensorsAreCopied) {
  for (const bool odd_header : {false, true}) {
    const TempFolder folder;
    DumpParts parts;
    std::string header = parts.header.dump();
    if (header.size() % 2 != (odd_header ? 1 : 0)) header += ' ';
    const Result<Dump> dump = OpenBytes(folder, SafetensorsBytes(header, parts.buffer));
    ASSERT_TRUE(dump.ok()) << dump.status().message();
    for (const std::size_t layer : {0u, 1u}) {
      const Half* expected = parts.tensor("layers." + std::to_string(layer) + ".q");
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(dump->Load(layer)->q.data) % alignof(Half), 0u);
      ExpectHalves(dump->Load(layer)->q, 6, 4, expected);
    }
  }
}

// f32 numbers at any byte of the file, in either order.
TEST(Dump, MisalignedFloatsAreCopied) {
  for (const std::size_t offset : {0u, 1u, 2u, 3u}) {
    for (const bool heads_first : {false, true}) {
      const TempFolder folder;
      DumpParts halves, parts = halves.As(KVMIX_F32, heads_first);
      std::string header = parts.header.dump();
      while (header.size() % 4 != offset) header += ' ';
      const Result<Dump> dump = OpenBytes(folder, SafetensorsBytes(header, parts.buffer));
      ASSERT_TRUE(dump.ok()) << dump.status().message();
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(dump->Load(1)->q.data) % alignof(float), 0u);
      for (int round = 0; round < 2; ++round) {
        ExpectNumbers(dump->Load(1)->q, RowsView::F16(halves.tensor("layers.1.q"), 6, 4, 8),
                      KVMIX_F32);
        EXPECT_TRUE(dump->Load(1).ok());
      }
    }
  }
}

// A layer is in memory as long as somebody has it, and once.
TEST(Dump, LayersAreSharedAndReadAgain) {
  const TempFolder folder;
  DumpParts parts;
  const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  for (int round = 0; round < 2; ++round) {
    const DumpLayer a = *dump->Load(0), b = *dump->Load(0);
    EXPECT_EQ(a.k.data, b.k.data);
    ExpectHalves(a.k, 6, 2, parts.tensor("layers.0.k"));
    ExpectHalves(a.v, 6, 2, parts.tensor("layers.0.v"));
    EXPECT_EQ(a.memory[0].use_count(), 4);  // twice in each
  }
}

// Another program overwrites or cuts the file: an error that names it, and no signal.
TEST(Dump, AFileThatChangesIsAnError) {
  const TempFolder folder;
  const std::string path = folder.file("dump.safetensors"), bytes = DumpParts().Bytes();
  const std::function<void()> changes[] = {
      [&] { std::filesystem::resize_file(path, bytes.size() - 300); },
      [&] { std::filesystem::resize_file(path, 0); },
      [&] { WriteBytes(path, std::string(bytes.size(), 'x')); },
      [&] { WriteBytes(path, bytes + bytes); }};
  for (const auto& change : changes) {
    WriteBytes(path, bytes);
    std::filesystem::last_write_time(path, {});  // long ago, whatever the clock's steps are
    const Result<Dump> dump = Dump::Open(path);
    ASSERT_TRUE(dump.ok()) << dump.status().message();
    const DumpLayer held = *dump->Load(0);
    change();
    for (const Status& s : {dump->Load(1).status(), dump->LayerHash(1).status()}) {
      EXPECT_EQ(s.code(), ErrorCode::kIo);
      ExpectGoodMessage(s, path);
    }
    ExpectHalves(held.k, 6, 2, DumpParts().tensor("layers.0.k"));  // nobody takes this away
  }
  WriteBytes(path, bytes);
  const Result<Dump> dump = Dump::Open(path);
  std::filesystem::remove(path);  // as a rename over it does
  EXPECT_TRUE(dump->Load(1).ok());
}

TEST(Dump, NamesNanAndInf) {
  struct Case {
    const char* tensor;
    std::size_t index;
    Half value;
    const char* text;
  };
  for (const Case& c : {Case{"layers.1.k", 3 * 16 + 1 * 8 + 5, 0x7E00,
                             "layers.1.k: expected finite numbers, found NaN at layer 1, KV head "
                             "1, token 3, channel 5"},
                        Case{"layers.1.v", 0, 0xFC00,
                             "layers.1.v: expected finite numbers, found Inf at layer 1, KV head "
                             "0, token 0, channel 0"},
                        Case{"layers.1.q", 6 * 32 - 1, 0xFFFF,
                             "layers.1.q: expected finite numbers, found NaN at layer 1, query "
                             "head 3, token 5, channel 7"}}) {
    const TempFolder folder;
    DumpParts parts;
    parts.tensor(c.tensor)[c.index] = c.value;
    parts.tensor("layers.0.k")[0] = 0x7BFF;  // the largest finite halves are fine
    parts.tensor("layers.0.k")[1] = 0xFBFF;
    const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
    ASSERT_TRUE(dump.ok()) << dump.status().message();
    EXPECT_TRUE(dump->Load(0).ok());
    const Status status = dump->Load(1).status();
    EXPECT_EQ(status.code(), ErrorCode::kNonFinite);
    ExpectGoodMessage(status, folder.file("dump.safetensors"));
    EXPECT_NE(status.message().find(c.text), std::string::npos) << status.message();
  }
}

// In tensors of every type and order, also where there is one head or one token.
TEST(Dump, NamesWhereABadNumberIs) {
  struct Bad {
    Dtype dtype;
    const char* bytes;  // little-endian
    const char* name;
  };
  const Bad bads[] = {{KVMIX_F16, "\x00\x7C", "Inf"},        {KVMIX_F16, "\x01\xFC", "NaN"},
                      {KVMIX_BF16, "\x80\xFF", "Inf"},       {KVMIX_BF16, "\xC0\x7F", "NaN"},
                      {KVMIX_BF16, "\x81\x7F", "NaN"},       {KVMIX_F32, "\x00\x00\x80\x7F", "Inf"},
                      {KVMIX_F32, "\x01\x00\x80\xFF", "NaN"}};
  for (const auto& [tokens, heads] : {std::pair<std::size_t, std::size_t>{5, 3}, {5, 1}, {1, 3}}) {
    DumpParts halves;
    halves.header = {{"__metadata__", {{"kv_heads", std::to_string(heads)}}}};
    halves.buffer.clear();
    for (const char* kind : {"k", "v", "q"}) {
      halves.Add(std::string("layers.0.") + kind, "F16", {tokens, heads, 8},
                 std::string(tokens * heads * 8 * 2, '\x7B'));  // large, and finite
    }
    for (const Bad& bad : bads) {
      for (const bool heads_first : {false, true}) {
        const DumpParts good = halves.As(bad.dtype, heads_first);
        const std::size_t bytes = kvmix_dtype_bytes(bad.dtype);
        for (std::size_t i = 0; i < tokens * heads; ++i) {
          const std::size_t t = i / heads, h = i % heads, c = (i * 5 + 2) % 8,
                            row = heads_first ? h * tokens + t : i;
          const char letter = "kvq"[i % 3];
          DumpParts parts = good;
          const std::string name = std::string("layers.0.") + letter;
          std::memcpy(parts.data(name) + (row * 8 + c) * bytes, bad.bytes, bytes);
          const TempFolder folder;
          const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
          ASSERT_TRUE(dump.ok()) << dump.status().message();
          const Status status = dump->Load(0).status();
          EXPECT_EQ(status.code(), ErrorCode::kNonFinite);
          ExpectGoodMessage(status, folder.file("dump.safetensors"));
          const std::string place = name + ": expected finite numbers, found " + bad.name +
                                    " at layer 0, " + (letter == 'q' ? "query" : "KV") + " head " +
                                    std::to_string(h) + ", token " + std::to_string(t) +
                                    ", channel " + std::to_string(c);
          EXPECT_TRUE(status.message().ends_with(place)) << status.message() << "\n" << place;
        }
        const TempFolder folder;
        EXPECT_TRUE(OpenBytes(folder, good.Bytes())->Load(0).ok());
      }
    }
  }
}

TEST(Dump, FindsNanAnywhereInALongTensor) {
  const TempFolder folder;
  DumpParts parts;
  parts.header = nlohmann::ordered_json::object();
  parts.buffer.clear();
  const std::string zeros(100 * 3 * 33 * 2, '\0');
  parts.Add("layers.0.k", "F16", {100, 3, 33}, zeros);
  parts.Add("layers.0.v", "F16", {100, 3, 33}, zeros);
  for (const std::size_t index : {0u, 15u, 4095u, 4096u, 8191u, 8192u, 9899u}) {
    DumpParts damaged = parts;
    damaged.tensor("layers.0.v")[index] = 0x7C01;
    const Result<Dump> dump = OpenBytes(folder, damaged.Bytes());
    ASSERT_TRUE(dump.ok()) << dump.status().message();
    const std::string place = "KV head " + std::to_string(index / 33 % 3) + ", token " +
                              std::to_string(index / 99) + ", channel " +
                              std::to_string(index % 33);
    EXPECT_NE(dump->Load(0).status().message().find(place), std::string::npos)
        << dump->Load(0).status().message();
  }
}

TEST(Dump, RefusesWhatDisagrees) {
  struct Case {
    ErrorCode code;
    const char* text;
    std::function<void(DumpParts&)> damage;
  };
  // Swaps a tensor's entry for another name, or its shape for one with as many elements.
  const auto rename = [](const char* from, const char* to) {
    return [=](DumpParts& p) {
      p.header[to] = p.header[from];
      p.header.erase(from);
    };
  };
  const auto reshape = [](const char* name, std::vector<std::size_t> shape) {
    return [=](DumpParts& p) { p.header[name]["shape"] = shape; };
  };
  const auto metadata = [](const char* key, const char* value) {
    return [=](DumpParts& p) { p.header["__metadata__"][key] = value; };
  };
  const std::vector<Case> cases = {
      {ErrorCode::kMismatch, "tensor layers.1.v: expected dtype F16, BF16 or F32, found I16",
       [](DumpParts& p) { p.header["layers.1.v"]["dtype"] = "I16"; }},
      {ErrorCode::kMismatch, "layers.1.v: expected one in every layer",
       rename("layers.1.v", "other")},
      {ErrorCode::kMismatch, "layers.0.k: expected one in every layer",
       rename("layers.0.k", "other")},
      {ErrorCode::kMismatch, "layers.1.q: expected one in every layer",
       rename("layers.1.q", "other")},
      {ErrorCode::kMismatch, "layers.0.q: expected one in every layer",
       rename("layers.0.q", "other")},
      {ErrorCode::kMismatch,
       "layers.1.v: expected one in every layer from 0 to 18446744073709551615",
       rename("layers.1.v", "layers.18446744073709551615.v")},
      {ErrorCode::kMismatch, "layers.0.v: expected shape [6, 2, 4], found [6, 4, 4]",
       reshape("layers.0.v", {6, 4, 4})},
      {ErrorCode::kMismatch, "layers.1.k: expected shape [6, 1, 8], found [12, 1, 8]",
       reshape("layers.1.k", {12, 1, 8})},
      {ErrorCode::kMismatch, "layers.1.q: expected shape [6, 8, 8], found [6, 8, 4]",
       reshape("layers.1.q", {6, 8, 4})},
      {ErrorCode::kMismatch, "layers.0.q: expected a shape [tokens, heads, head_dim], found [192]",
       reshape("layers.0.q", {192})},
      {ErrorCode::kMismatch, "layers.0.k: expected a shape [tokens, heads, head_dim], found [96]",
       reshape("layers.0.k", {96})},
      {ErrorCode::kMismatch,
       "layers.0.k: expected a shape [tokens, heads, head_dim], found [2, 6, 2, 4]",
       reshape("layers.0.k", {2, 6, 2, 4})},
      {ErrorCode::kMismatch, "layers.0.k: expected a shape [tokens, heads, head_dim], found []",
       [](DumpParts& p) {
         p.header["layers.0.k"] = {{"dtype", "F16"},
                                   {"shape", nlohmann::ordered_json::array()},
                                   {"data_offsets", {0, 2}}};
         p.header["rest"] = {{"dtype", "F16"}, {"shape", {95}}, {"data_offsets", {2, 192}}};
       }},
      {ErrorCode::kMismatch, "layers.0.q: expected shape [6, 4, 8], found [1, 4, 6, 8]",
       reshape("layers.0.q", {1, 4, 6, 8})},
      {ErrorCode::kMismatch, "layers.0.v: expected shape [1, 2, 6, 8], found [6, 2, 8]",
       reshape("layers.0.k", {1, 2, 6, 8})},
      {ErrorCode::kMismatch,
       "layers.0.q: expected a shape [tokens, heads, head_dim], found [2, 2, 6, 8]",
       reshape("layers.0.q", {2, 2, 6, 8})},
      {ErrorCode::kMismatch, "metadata layers: expected 2, as the tensors have it, found \"3\"",
       metadata("layers", "3")},
      {ErrorCode::kMismatch, "metadata tokens", metadata("tokens", "7")},
      {ErrorCode::kMismatch, "metadata kv_heads", metadata("kv_heads", "-2")},
      {ErrorCode::kMismatch, "metadata query_heads", metadata("query_heads", "8")},
      {ErrorCode::kMismatch, "metadata head_dim", metadata("head_dim", "8 ")},
      {ErrorCode::kCorrupt, "metadata attention_scale", metadata("attention_scale", "nan")},
      {ErrorCode::kCorrupt, "metadata attention_scale", metadata("attention_scale", "0")},
      {ErrorCode::kCorrupt, "metadata attention_scale", metadata("attention_scale", "1e-99")},
      {ErrorCode::kCorrupt, "metadata prompt_tokens", metadata("prompt_tokens", "")},
      {ErrorCode::kCorrupt, "metadata prompt_tokens", metadata("prompt_tokens", "7,-3,x")},
      {ErrorCode::kCorrupt, "metadata prompt_tokens", metadata("prompt_tokens", "4,2,")},
      {ErrorCode::kCorrupt, "found \"4?2\"", metadata("prompt_tokens", "4\n2")},
      {ErrorCode::kMismatch, "prompt_tokens: expected lengths of at least 1, found 0",
       metadata("prompt_tokens", "6,0")},
      {ErrorCode::kMismatch, "prompt_tokens: expected a sum of 6", metadata("prompt_tokens", "5")},
      {ErrorCode::kMismatch, "prompt_tokens: expected a sum of 6",
       metadata("prompt_tokens", "4,3")},
      {ErrorCode::kMismatch, "prompt_tokens: expected a sum of 6",
       metadata("prompt_tokens", "18446744073709551615,7")},
      {ErrorCode::kVersion, "metadata format: expected kvmix-dump-1, found \"kvmix-dump-2\"",
       metadata("format", "kvmix-dump-2")},
      {ErrorCode::kVersion, "metadata format: expected kvmix-dump-1, found \"kvmix-dump-10\"",
       metadata("format", "kvmix-dump-10")},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text);
    DumpParts parts;
    c.damage(parts);
    ExpectRefused(parts.Bytes(), c.code, c.text);
  }
}

// Dumps whose tensors agree with each other and are still none.
TEST(Dump, RefusesImpossibleGeometry) {
  struct Case {
    std::vector<std::size_t> kv, q;
    const char* text;
  };
  for (const Case& c :
       {Case{{0, 2, 8}, {0, 4, 8}, "expected at least 1 token"},
        Case{{4, 0, 8}, {4, 4, 8}, "layers: expected one with K and V, found none"},
        Case{{4, 2, 0}, {4, 2, 0}, "k_dim: expected 1 to 512"},
        Case{{4, 2, 513}, {4, 2, 513}, "k_dim: expected 1 to 512, found 513"},
        Case{{4, 2, 8}, {4, 3, 8}, "query_heads: expected a multiple of the 2 KV heads, found 3"},
        Case{{4, 2, 8}, {4, 0, 8}, "query_heads: expected 1 to"},
        Case{{1, 65537, 1}, {1, 65537, 1}, "kv_heads: expected 1 to 65536, found 65537"}}) {
    SCOPED_TRACE(c.text);
    DumpParts parts;
    parts.header = nlohmann::ordered_json::object();
    parts.buffer.clear();
    for (const char* kind : {"k", "v", "q"}) {
      const auto& shape = *kind == 'q' ? c.q : c.kv;
      parts.Add(std::string("layers.0.") + kind, "F16", shape,
                std::string(shape[0] * shape[1] * shape[2] * 2, '\0'));
    }
    const TempFolder folder;
    const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
    ExpectGoodMessage(dump.status(), folder.file("dump.safetensors"));
    EXPECT_NE(dump.status().message().find(c.text), std::string::npos) << dump.status().message();
  }
  ExpectRefused(SafetensorsBytes("{}", ""), ErrorCode::kNotFound,
                "expected tensors layers.0.k and so on, found none");
  DumpParts parts(false);
  parts.header["__metadata__"]["query_heads"] = "3";
  ExpectRefused(parts.Bytes(), ErrorCode::kInvalidArgument, "query_heads: expected a multiple");
}

// Without layer_shapes, layers may still be unlike: each has the shape of its tensors.
TEST(Dump, ShapesFollowFromTheTensorsOfEachLayer) {
  const TempFolder folder;
  DumpParts parts;
  for (const char* key : {"kv_heads", "query_heads", "head_dim", "attention_scale"})
    parts.header["__metadata__"].erase(key);
  parts.header["layers.1.k"]["shape"] = {6, 1, 16};
  parts.header["layers.1.v"]["shape"] = {6, 1, 16};
  parts.header["layers.1.q"]["shape"] = {6, 2, 16};
  const Result<Dump> dump = OpenBytes(folder, parts.Bytes());
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  EXPECT_EQ(dump->model(), Model({{2, 4, 8, 8}, {1, 2, 16, 16}}));
  EXPECT_EQ(dump->Load(1)->head(0, KVMIX_V).head_dim, 16u);
  parts.header["__metadata__"]["head_dim"] = "8";
  ExpectRefused(parts.Bytes(), ErrorCode::kMismatch,
                "metadata head_dim: expected 16, as the tensors have it, found \"8\"");
}

// A windowed layer; values narrower than keys, with sinks; one without K and V; one that reads the
// first one's.
DumpParts UnlikeParts(bool with_q = true) {
  DumpParts parts;
  parts.header = nlohmann::ordered_json::object();
  parts.buffer.clear();
  parts.header["__metadata__"] = {{"layer_shapes", R"([
      {"kv_heads": 2, "query_heads": 4, "k_dim": 8, "v_dim": 8, "window": 3, "soft_cap": 50},
      {"kv_heads": 1, "query_heads": 2, "k_dim": 12, "v_dim": 4, "attention_scale": 0.28867513,
       "sinks": [1, -2]},
      null,
      {"kv_heads": 2, "query_heads": 2, "k_dim": 8, "v_dim": 8, "kv_layer": 0}])"}};
  const auto add = [&](const char* name, std::size_t heads, std::size_t dim) {
    parts.Add(name, "F16", {5, heads, dim}, std::string(5 * heads * dim * 2, name[9]));
  };
  add("layers.0.k", 2, 8);
  add("layers.0.v", 2, 8);
  add("layers.1.k", 1, 12);
  add("layers.1.v", 1, 4);
  if (!with_q) return parts;
  add("layers.0.q", 4, 8);
  add("layers.1.q", 2, 12);
  add("layers.3.q", 2, 8);
  return parts;
}

TEST(Dump, UnlikeLayers) {
  for (const bool with_q : {true, false}) {
    const TempFolder folder;
    const Result<Dump> dump = OpenBytes(folder, UnlikeParts(with_q).Bytes());
    ASSERT_TRUE(dump.ok()) << dump.status().message();
    const Model expected(
        {{.kv_heads = 2, .query_heads = 4, .k_dim = 8, .v_dim = 8, .window = 3, .soft_cap = 50.0f},
         {.kv_heads = 1, .query_heads = 2, .k_dim = 12, .v_dim = 4, .sinks = {1.0f, -2.0f}},
         {},
         {.kv_heads = 2, .query_heads = 2, .k_dim = 8, .v_dim = 8, .kv_layer = 0}});
    EXPECT_EQ(dump->model(), expected);  // 0.28867513 is what layer 1 has anyway
    EXPECT_EQ(dump->has_q(), with_q);
    EXPECT_EQ(dump->tokens(), 5u);
    EXPECT_EQ(dump->Load(1)->v.head_dim, 4u);
    EXPECT_EQ(dump->Load(3)->k.data, dump->Load(0)->k.data);
    EXPECT_EQ(dump->Load(3)->head(1, KVMIX_V).tokens, 5u);
    EXPECT_EQ(dump->Load(3)->q.heads, with_q ? 2u : 0u);
    EXPECT_EQ(dump->Load(2)->k.data, nullptr);
    for (std::size_t layer = 0; layer < 4; ++layer) {
      EXPECT_TRUE(dump->Load(layer).ok());
    }
  }
}

TEST(Dump, RefusesLayersThatContradictTheirShapes) {
  const auto rename = [](const char* from, const char* to) {
    return [=](DumpParts& p) {
      p.header[to] = p.header[from];
      p.header.erase(from);
    };
  };
  const auto replace = [](const std::string& from, const std::string& to) {
    return [=](DumpParts& p) {
      auto& shapes = p.header["__metadata__"]["layer_shapes"];
      std::string text = shapes;
      shapes = text.replace(text.find(from), from.size(), to);
    };
  };
  const auto one_more = [](const char* name) {
    return [=](DumpParts& p) { p.Add(name, "F16", {5, 2, 8}, std::string(160, '\1')); };
  };
  struct Wrong {
    ErrorCode code;
    const char* text;
    std::function<void(DumpParts&)> damage;
  };
  const Wrong cases[] = {
      {ErrorCode::kMismatch,
       "layers.1.v: expected a tensor, as the shape of the layer says, found none",
       rename("layers.1.v", "other")},
      {ErrorCode::kMismatch, "layers.2.k: expected none, as the layer has no K and V, found one",
       one_more("layers.2.k")},
      {ErrorCode::kMismatch, "layers.3.q: expected a tensor", rename("layers.3.q", "other")},
      {ErrorCode::kMismatch, "layers.3.k: expected none, as the layer reads K and V of layer 0",
       one_more("layers.3.k")},
      {ErrorCode::kMismatch, "layers.4.q: expected layers from 0 to 3, found one more",
       rename("layers.3.q", "layers.4.q")},
      {ErrorCode::kMismatch, "layers.1.v: expected shape [5, 1, 8], found [5, 1, 4]",
       replace("\"v_dim\": 4", "\"v_dim\": 8")},
      {ErrorCode::kCorrupt, "metadata layer_shapes: expected JSON", replace("null", "nothing")},
      {ErrorCode::kCorrupt, "metadata layer_shapes: [2]: expected an object, found 7",
       replace("null", "7")},
      {ErrorCode::kCorrupt, "metadata layer_shapes: [0].window: expected a whole number",
       replace("\"window\": 3", "\"window\": -3")},
      {ErrorCode::kInvalidArgument, "layer 3: kv_layer: expected an earlier layer",
       replace("\"kv_layer\": 0", "\"kv_layer\": 2")},
      {ErrorCode::kInvalidArgument, "(a latent cache, MLA, is not supported), found 576",
       replace("\"k_dim\": 12", "\"k_dim\": 576")},
      {ErrorCode::kMismatch, "metadata attention_scale: expected 0.28867513, as layer_shapes",
       [](DumpParts& p) { p.header["__metadata__"]["attention_scale"] = "0.5"; }},
  };
  for (const Wrong& wrong : cases) {
    SCOPED_TRACE(wrong.text);
    DumpParts parts = UnlikeParts();
    wrong.damage(parts);
    ExpectRefused(parts.Bytes(), wrong.code, wrong.text);
  }
}

// Whatever the damage does, it ends in a one-line error or in a dump that can be walked through.
TEST(Dump, SurvivesRandomDamage) {
  const std::string good = DumpParts().Bytes();
  const std::size_t header_end = 8 + DumpParts().header.dump().size();
  const TempFolder folder;
  std::mt19937 random(7);
  const std::string alphabet = "{}[]\",:0123456789.-eE\\ kvq";
  std::size_t refused = 0;
  for (int round = 0; round < 300; ++round) {
    std::string bytes = good;
    for (unsigned flips = 1 + random() % 8; flips-- > 0;) {
      // Half of the flips are likely to leave JSON.
      bytes[random() % header_end] = static_cast<char>(
          random() % 2 == 0 ? random() % 256
                            : static_cast<unsigned>(alphabet[random() % alphabet.size()]));
    }
    const Result<Dump> dump = OpenBytes(folder, bytes);
    if (!dump.ok()) {
      ++refused;
      EXPECT_EQ(dump.status().message().find('\n'), std::string::npos);
      continue;
    }
    for (std::size_t layer = 0; layer < dump->model().layers.size(); ++layer) {
      (void)dump->Load(layer).status();
    }
  }
  EXPECT_GT(refused, 150u);
}

TEST(Dump, RefusesWhatIsNoFile) {
  const TempFolder folder;
  const Status missing = Dump::Open(folder.file("nothing")).status();
  EXPECT_EQ(missing.code(), ErrorCode::kNotFound);
  ExpectGoodMessage(missing, folder.file("nothing"));
  const Status is_folder = Dump::Open(folder.path()).status();
  EXPECT_EQ(is_folder.code(), ErrorCode::kIo);
  ExpectGoodMessage(is_folder, folder.path());
  ASSERT_EQ(mkfifo(folder.file("pipe").c_str(), 0600), 0);
  ExpectGoodMessage(Dump::Open(folder.file("pipe")).status(),
                    folder.file("pipe"));  // and does not wait for a writer
  ExpectGoodMessage(Dump::Open("/dev/zero").status(), "/dev/zero");
  EXPECT_FALSE(Dump::Open("").ok());
}

// What is known of a dump of a real model.
struct Facts {
  const char* file;
  Geometry geometry;
  std::size_t tokens;
  float largest_k;  // max |x| of the K head (0,0)
};

void ExpectFacts(const std::filesystem::path& folder, const Facts& facts) {
  SCOPED_TRACE(facts.file);
  const Result<Dump> dump = Dump::Open((folder / facts.file).string());
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  EXPECT_EQ(dump->model().geometry(), facts.geometry);
  EXPECT_TRUE(dump->has_q());
  EXPECT_EQ(dump->tokens(), facts.tokens);
  EXPECT_EQ(dump->prompt_tokens(), std::vector<std::size_t>{facts.tokens});
  for (std::size_t layer = 0; layer < facts.geometry.layers; ++layer)
    EXPECT_TRUE(dump->Load(layer).ok());
  const DumpLayer loaded = *dump->Load(0);
  const RowsView rows = loaded.head(0, KVMIX_K);
  float largest = 0.0f;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    for (std::size_t c = 0; c < rows.head_dim; ++c)
      largest = std::max(largest, std::abs(rows.At(t, 0, c)));
  }
  EXPECT_NEAR(largest, facts.largest_k, 0.5f);
}

constexpr Geometry kQwen{28, 2, 12, 128};

TEST(RealDumps, BuiltInSample) {
  const std::filesystem::path folder = std::filesystem::path(KVMIX_SOURCE_ROOT) / "data/sample";
  ExpectFacts(folder, {"qwen2.5-coder-1.5b.calibration.safetensors", kQwen, 64, 358.0f});
  ExpectFacts(folder, {"qwen2.5-coder-1.5b.holdout.safetensors", kQwen, 64, 358.0f});
}

TEST(RealDumps, LargerOnes) {
  const std::filesystem::path folder = std::filesystem::path(KVMIX_SOURCE_ROOT) / "../shared/dumps";
  if (!std::filesystem::exists(folder))
    GTEST_SKIP() << "NO LARGER DUMPS HERE: " << folder << " does not exist";
  ExpectFacts(folder, {"qwen2.5-coder-1.5b.c4.safetensors", kQwen, 256, 358.0f});
  ExpectFacts(folder, {"qwen2.5-coder-1.5b.wikitext.safetensors", kQwen, 512, 358.0f});
  ExpectFacts(folder, {"smollm2-135m.wikitext.safetensors", {30, 3, 9, 64}, 256, 6.3f});
}

}  // namespace
}  // namespace kvmix::tune
