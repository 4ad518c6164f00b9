// The safetensors reader against headers that lie about their file in every way.
#include "lib/files/safetensors.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>

#include "dump_files.h"

namespace kvmix {
namespace {

using internal::ParseSafetensors;
using testing::DumpParts;
using testing::ExpectGoodMessage;
using testing::SafetensorsBytes;

void ExpectRefused(const std::string& bytes, const std::string& text) {
  const auto parsed = ParseSafetensors(bytes, "a-file");
  ASSERT_FALSE(parsed.ok()) << "expected: " << text;
  ExpectGoodMessage(parsed.status(), "a-file: ");
  EXPECT_EQ(parsed.status().code(), ErrorCode::kCorrupt);
  EXPECT_NE(parsed.status().message().find(text), std::string::npos)
      << parsed.status().message() << "\nshould speak of: " << text;
}

// Every way in which the header's JSON can lie about the file.
TEST(Safetensors, RefusesLyingHeaders) {
  const auto edited = [](const std::function<void(nlohmann::ordered_json&)>& edit) {
    DumpParts parts;
    edit(parts.header);
    return parts.Bytes();
  };
  const auto offsets = [&](nlohmann::ordered_json value) {
    return edited([&](auto& h) { h["layers.0.k"]["data_offsets"] = std::move(value); });
  };
  const auto shape = [&](nlohmann::ordered_json value) {
    return edited([&](auto& h) { h["layers.0.v"]["shape"] = std::move(value); });
  };
  const std::uint64_t huge = std::uint64_t{1} << 40;
  const std::pair<std::string, const char*> cases[] = {
      {offsets({-4, 10}), "expected a whole number below 2^64, found -4"},
      {offsets({0, 1e15}), "expected a whole number below 2^64, found 1e+15"},
      {offsets({0, std::uint64_t{1000000000000000}}), "data_offsets in order within the buffer"},
      {offsets({192, 0}), "data_offsets in order within the buffer"},
      {offsets({2, 194}), "without a hole, found 2"},
      {offsets({0, 190}), "expected 192 bytes (dtype x shape), found 190"},
      {offsets({0, 192, 192}), "data_offsets: expected 2 numbers, begin and end, found 3"},
      {offsets({0}), "data_offsets: expected 2 numbers, begin and end, found 1"},
      {offsets(nullptr), "data_offsets: expected an array, found null"},
      {offsets("0"), "expected an array, found \"0\""},
      {offsets({"0", "192"}), "expected a whole number"},
      {shape({huge, huge, huge}), "expected a shape whose bytes can be counted, found an overflow"},
      {shape({6, 2, 9}), "expected 216 bytes (dtype x shape), found 192"},
      {shape({6, 2, true}), "expected a whole number below 2^64, found true"},
      {shape(nlohmann::ordered_json::parse("[6, 2, [8]]")), "found an array"},
      {shape(nlohmann::ordered_json::object()), "found an object"},
      {edited([](auto& h) { h["layers.0.q"]["shape"][0] = 0; }),
       "expected 0 bytes (dtype x shape)"},
      {edited([](auto& h) { h["layers.0.v"]["dtype"] = "I64"; }), "dtype x shape"},
      {edited([](auto& h) { h["layers.0.v"]["dtype"] = "F17"; }),
       "expected a dtype of the format, found \"F17\""},
      {edited([](auto& h) { h["layers.0.v"]["dtype"] = 16; }), "expected a string, found 16"},
      {edited([](auto& h) { h["layers.0.v"].erase("dtype"); }),
       "layers.0.v.dtype: expected a value, found none"},
      {edited([](auto& h) { h["layers.0.v"]["extra"] = 1; }), "found \"extra\""},
      {edited([](auto& h) {
         h["layers.0.v"] = {1, 2};
       }),
       "expected an object, found an array"},
      {edited([](auto& h) { h["layers.0.v"] = 7; }), "expected an object, found 7"},
      {edited([](auto& h) { h["__metadata__"]["tokens"] = 6; }),
       "__metadata__.tokens: expected a string, found 6"},
      {edited([](auto& h) {
         h["__metadata__"]["tokens"] = {{"a", "b"}};
       }),
       "expected a string, found an object"},
      {edited([](auto& h) { h["__metadata__"] = nullptr; }), "expected an object, found null"},
      {edited([](auto& h) { h.erase("layers.1.q"); }), "without a hole"},
      {edited([](auto& h) { h.erase("layers.1.v"); }), "bytes that the header lists"},
      {edited([](auto& h) { h["layers.1.v"]["data_offsets"] = h["layers.1.k"]["data_offsets"]; }),
       "without an overlap"},
      {edited([](auto& h) {
         h["odd"] = {{"dtype", "F4"}, {"shape", {1}}, {"data_offsets", {0, 0}}};
       }),
       "expected whole bytes, found 4 bits"},
  };
  for (const auto& [bytes, text] : cases) {
    SCOPED_TRACE(text);
    ExpectRefused(bytes, text);
  }
}

// What an editor of objects cannot write.
TEST(Safetensors, RefusesBadText) {
  DumpParts parts;
  const std::string good = parts.header.dump();
  const auto with = [&](const std::string& header) {
    return SafetensorsBytes(header, parts.buffer);
  };
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string header = good;
    header.replace(header.find(from), from.size(), to);
    return with(header);
  };
  const std::pair<std::string, const char*> cases[] = {
      {with(""), "expected { as its first byte"},
      {with(" " + good), "expected { as its first byte"},
      {with("\xEF\xBB\xBF" + good), "expected { as its first byte"},
      {with("[" + good + "]"), "expected { as its first byte"},
      {with(good.substr(0, good.size() - 1)), "expected JSON"},
      {with(good + "{}"), "expected JSON"},
      {with(good + std::string(8, '\0')), "expected JSON, found a zero byte"},
      {replaced("\"model\"",
                "\"mo\xFF"
                "del\""),
       "expected JSON"},
      {replaced("\"layers.1.k\"", "\"layers.0.k\""),
       "expected JSON, found the key \"layers.0.k\" twice"},
      {replaced("\"model\"", "\"corpus\""), "found the key \"__metadata__.corpus\" twice"},
      {replaced("\"dtype\":\"F16\"", "\"dtype\":\"F16\",\"dtype\":\"F16\""),
       "found the key \"layers.0.k.dtype\" twice"},
      {replaced("\"layers.0.k\"", "\"__metadata__\""), "found the key \"__metadata__\" twice"},
      {replaced("[0,192]", "[0,192.0]"), "expected a whole number below 2^64, found 192.0"},
      {replaced("[0,192]", "[0,18446744073709551616]"),
       "expected a whole number below 2^64, found 1.8446744073709552e+19"},
      {replaced("[0,192]", "[-0,192]"), "expected a whole number below 2^64"},
      {replaced("[0,192]", "[NaN,192]"), "expected JSON"},
      {replaced("[0,192]", std::string(1'000'000, '[')), "found nesting deeper than 16"},
      {with("{\"a\":" + std::string(1'000'000, '{')), "expected JSON"},
      {replaced("layers.0.k", "new\\nline" + std::string(1000, 'x') + "\":{\"y\":1},\"z"),
       "new?line"},
  };
  for (const auto& [bytes, text] : cases) {
    SCOPED_TRACE(text);
    ExpectRefused(bytes, text);
  }
  EXPECT_TRUE(ParseSafetensors(with(good + std::string(64, ' ')), "padded").ok());
}

TEST(Safetensors, RefusesBadLengths) {
  const std::string good = DumpParts().Bytes();
  const auto with_length = [&](std::uint64_t length) {
    std::string bytes = good;
    for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> (8 * i) & 0xFFu);
    return bytes;
  };
  ExpectRefused("", "expected a safetensors file of 8 bytes or more, found 0");
  ExpectRefused(good.substr(0, 5), "expected a safetensors file of 8 bytes or more, found 5");
  for (const std::uint64_t length :
       {std::uint64_t{100'000'001}, std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
    ExpectRefused(with_length(length), "header length: expected at most 100000000");
  }
  ExpectRefused(with_length(good.size() - 7), "bytes up to the end of the file");
  ExpectRefused(good + "x", "bytes that the header lists");
}

TEST(Safetensors, RefusesEveryTruncation) {
  const DumpParts parts;
  const std::string good = parts.Bytes();
  ASSERT_TRUE(ParseSafetensors(good, "good").ok());
  for (std::size_t length = 0; length < good.size(); ++length) {
    const std::string cut =
        good.substr(0, length);  // a copy, so that a sanitizer sees a read past the end
    const auto parsed = ParseSafetensors(cut, "cut");
    ASSERT_FALSE(parsed.ok()) << length << " of " << good.size() << " bytes";
    ExpectGoodMessage(parsed.status(), "cut: ");
  }
}

// Whatever the damage does, it ends in a one-line error or in tensors that lie within the file.
TEST(Safetensors, SurvivesRandomDamage) {
  const std::string good = DumpParts().Bytes();
  const std::size_t header_end = 8 + DumpParts().header.dump().size();
  std::mt19937 random(7);
  const std::string alphabet = "{}[]\",:0123456789.-eE\\ kvq";
  std::size_t refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = good;
    for (unsigned flips = 1 + random() % 8; flips-- > 0;) {
      // Half of the flips are likely to leave JSON.
      bytes[random() % header_end] = static_cast<char>(
          random() % 2 == 0 ? random() % 256
                            : static_cast<unsigned>(alphabet[random() % alphabet.size()]));
    }
    const auto parsed = ParseSafetensors(bytes, "damaged");
    refused += !parsed.ok();
    if (!parsed.ok()) {
      ExpectGoodMessage(parsed.status(), "damaged: ");
      continue;
    }
    for (const auto& [name, tensor] : parsed->tensors) {
      EXPECT_TRUE(tensor.first >= 8 && tensor.first <= bytes.size() &&
                  tensor.bytes <= bytes.size() - tensor.first)
          << name;
    }
  }
  EXPECT_GT(refused, 1000u);
}

TEST(Safetensors, WrittenAsRead) {
  testing::TempFolder folder;
  const std::string path = folder.file("x");
  ASSERT_TRUE(
      internal::WriteSafetensors(
          path, {{"a", "\"1\""}},
          {{"later", "U8", {3}, "abc"}, {"first", "F16", {1, 1}, "de"}, {"none", "I8", {0}, ""}})
          .ok());
  std::string bytes = testing::ReadBytes(path);
  const internal::Safetensors file = ParseSafetensors(bytes, path).value();
  EXPECT_EQ(file.metadata, (std::map<std::string, std::string>{{"a", "\"1\""}}));
  ASSERT_EQ(file.tensors.size(), 4u);
  EXPECT_EQ(file.tensors.at("later").In(bytes), "abc");
  EXPECT_EQ(file.tensors.at("first").In(bytes), "de");
  EXPECT_EQ(file.tensors.at("first").shape, (std::vector<std::uint64_t>{1, 1}));
  EXPECT_EQ(file.tensors.at("checksum").In(bytes), bytes.substr(bytes.size() - 8));
  EXPECT_EQ(file.tensors.at("later").first % 8, 0u);
  EXPECT_TRUE(internal::CheckChecksum(bytes, path).ok());
  for (char& byte : bytes) {
    byte ^= 4;
    ExpectGoodMessage(internal::CheckChecksum(bytes, path), path);
    byte ^= 4;
  }
  EXPECT_FALSE(internal::CheckChecksum("1234567", path).ok());
  EXPECT_EQ(internal::WriteSafetensors(folder.path(), {}, {}).code(), ErrorCode::kIo);
  EXPECT_EQ(folder.entries(), 1u);
}

}  // namespace
}  // namespace kvmix
