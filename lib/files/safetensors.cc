#include "lib/files/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "lib/files/file.h"

namespace kvmix::internal {

namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

struct Dtype {
  std::string_view name;
  std::uint64_t bits;
};
constexpr std::array kDtypes = {
    Dtype{"BOOL", 8},    Dtype{"F4", 4},   Dtype{"F6_E2M3", 6}, Dtype{"F6_E3M2", 6},
    Dtype{"U8", 8},      Dtype{"I8", 8},   Dtype{"F8_E5M2", 8}, Dtype{"F8_E4M3", 8},
    Dtype{"F8_E8M0", 8}, Dtype{"I16", 16}, Dtype{"U16", 16},    Dtype{"F16", 16},
    Dtype{"BF16", 16},   Dtype{"I32", 32}, Dtype{"U32", 32},    Dtype{"F32", 32},
    Dtype{"C64", 64},    Dtype{"F64", 64}, Dtype{"I64", 64},    Dtype{"U64", 64},
};

// What the header says of one tensor, before any of it is checked.
struct Claim {
  std::string dtype;
  std::vector<std::uint64_t> shape;
  std::vector<std::uint64_t> offsets;  // begin and end in the buffer
  bool has_dtype = false, has_shape = false, has_offsets = false;
};
using Claims = std::map<std::string, Claim>;

// Receives the header's JSON event by event and accepts the one shape that it may have, so depth
// and memory are bounded by that shape.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::map<std::string, std::string> metadata;
  Claims claims;
  std::string error;  // empty: none

  bool null() override { return Unexpected("null"); }
  bool boolean(bool value) override { return Unexpected(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override {
    return Unexpected(fmt::format("{}", value));
  }
  bool number_float(number_float_t, const string_t& text) override {
    return Unexpected(OneLine(text, 60));
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != Place::kShape && place_ != Place::kOffsets)
      return Unexpected(fmt::format("{}", value));
    (place_ == Place::kShape ? claim_->shape : claim_->offsets).push_back(value);
    return true;
  }

  bool string(string_t& value) override {
    const bool is_dtype = place_ == Place::kTensor && field_ == "dtype";
    if (!is_dtype && place_ != Place::kMetadata) return Unexpected(Quoted(value));
    (is_dtype ? claim_->dtype : metadata[field_]) = std::move(value);
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ != Place::kFile && place_ != Place::kNames) return Unexpected("an object");
    place_ = place_ == Place::kFile    ? Place::kNames
             : name_ == "__metadata__" ? Place::kMetadata
                                       : Place::kTensor;
    return true;
  }

  bool key(string_t& value) override {
    if (place_ == Place::kNames) return Name(std::move(value));
    field_ = std::move(value);
    if (place_ == Place::kMetadata) return !metadata.contains(field_) || Twice();
    for (auto [name, has] : {std::pair{"dtype", &claim_->has_dtype},
                             {"shape", &claim_->has_shape},
                             {"data_offsets", &claim_->has_offsets}}) {
      if (field_ == name) return !std::exchange(*has, true) || Twice();
    }
    error = fmt::format("{}: expected dtype, shape and data_offsets, found {}", Quoted(name_),
                        Quoted(field_));
    return false;
  }

  bool end_object() override {
    if (place_ == Place::kTensor &&
        !(claim_->has_dtype && claim_->has_shape && claim_->has_offsets)) {
      error = fmt::format("{}: expected dtype, shape and data_offsets, found not all of them",
                          Quoted(name_));
      return false;
    }
    place_ = place_ == Place::kNames ? Place::kFile : Place::kNames;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::kTensor || field_ == "dtype") return Unexpected("an array");
    place_ = field_ == "shape" ? Place::kShape : Place::kOffsets;
    return true;
  }

  bool end_array() override {
    place_ = Place::kTensor;
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& e) override {
    error = "header: expected JSON, found " + OneLine(e.what());
    return false;
  }

 private:
  enum class Place { kFile, kNames, kMetadata, kTensor, kShape, kOffsets };

  bool Name(std::string name) {
    name_ = std::move(name);
    field_.clear();
    if (name_ == "__metadata__") return !std::exchange(has_metadata_, true) || Twice();
    const auto [entry, is_new] = claims.try_emplace(name_);
    claim_ = &entry->second;
    return is_new || Twice();
  }

  bool Twice() {
    error = fmt::format("{}: expected once, found twice", Where());
    return false;
  }

  bool Unexpected(std::string_view found) {
    error = fmt::format("{}: expected {}, found {}", Where(), Expected(), found);
    return false;
  }

  std::string_view Expected() const {
    switch (place_) {
      case Place::kMetadata:
        return "a string";
      case Place::kTensor:
        return field_ == "dtype" ? "a string" : "an array of whole numbers";
      case Place::kShape:
      case Place::kOffsets:
        return "a whole number below 2^64";
      default:
        return "an object";
    }
  }

  std::string Where() const {
    if (place_ == Place::kFile) return "header";
    return field_.empty() ? Quoted(name_) : Quoted(name_) + ' ' + Quoted(field_);
  }

  Place place_ = Place::kFile;
  std::string name_;   // the last key of the outer object
  std::string field_;  // the last key inside it
  Claim* claim_ = nullptr;
  bool has_metadata_ = false;
};

bool Multiply(std::uint64_t factor, std::uint64_t* product) {
  if (factor != 0 && *product > std::numeric_limits<std::uint64_t>::max() / factor) return false;
  *product *= factor;
  return true;
}

// Whether the claim agrees with itself; `buffer` is where offsets point into.
Status CheckClaim(const std::string& path, const std::string& name, const Claim& claim,
                  std::size_t buffer) {
  const auto fail = [&](std::string_view expected, std::string_view found) {
    return FileError(ErrorCode::kCorrupt, path, "tensor " + Quoted(name), expected, found);
  };
  const auto dtype = std::find_if(kDtypes.begin(), kDtypes.end(),
                                  [&](const Dtype& d) { return d.name == claim.dtype; });
  if (dtype == kDtypes.end()) return fail("a dtype of the format", Quoted(claim.dtype));
  if (claim.offsets.size() != 2)
    return fail("2 data_offsets", fmt::format("{}", claim.offsets.size()));
  const std::uint64_t begin = claim.offsets[0];
  const std::uint64_t end = claim.offsets[1];
  if (begin > end || end > buffer) {
    return fail(fmt::format("data_offsets in order within the buffer of {} bytes", buffer),
                fmt::format("[{}, {}]", begin, end));
  }
  std::uint64_t bits = dtype->bits;
  for (const std::uint64_t size : claim.shape) {
    if (!Multiply(size, &bits)) return fail("a shape whose bytes can be counted", "an overflow");
  }
  if (bits % 8 != 0) return fail("whole bytes", fmt::format("{} bits", bits));
  if (end - begin != bits / 8)
    return fail(fmt::format("{} bytes (dtype x shape)", bits / 8), fmt::format("{}", end - begin));
  return {};
}

// Every byte of the buffer belongs to exactly one tensor.
Status CheckCover(const std::string& path, const Claims& claims, std::size_t buffer) {
  std::vector<const Claims::value_type*> order;
  for (const auto& entry : claims) order.push_back(&entry);
  std::sort(order.begin(), order.end(),
            [](auto* a, auto* b) { return a->second.offsets < b->second.offsets; });
  std::uint64_t covered = 0;
  for (const auto* entry : order) {
    const std::uint64_t begin = entry->second.offsets[0];
    if (begin != covered) {
      return FileError(ErrorCode::kCorrupt, path, "tensor " + Quoted(entry->first),
                       fmt::format("to begin at byte {} of the buffer, without {}", covered,
                                   begin > covered ? "a hole" : "an overlap"),
                       fmt::format("{}", begin));
    }
    covered = entry->second.offsets[1];
  }
  if (covered != buffer) {
    return FileError(ErrorCode::kCorrupt, path, "buffer",
                     fmt::format("the {} bytes that the header lists", covered),
                     fmt::format("{}", buffer));
  }
  return {};
}

// The header's text, whole and within the file.
Result<std::string_view> HeaderText(std::string_view file, const std::string& path) {
  if (file.size() < kLengthBytes) {
    return FileError(ErrorCode::kCorrupt, path, "", "a safetensors file of 8 bytes or more",
                     fmt::format("{}", file.size()));
  }
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;)
    length = length << 8 | static_cast<unsigned char>(file[i]);
  if (length > kMaxHeaderBytes) {
    return FileError(ErrorCode::kCorrupt, path, "header length",
                     fmt::format("at most {}", kMaxHeaderBytes), fmt::format("{}", length));
  }
  if (length > file.size() - kLengthBytes) {
    return FileError(ErrorCode::kCorrupt, path, "", fmt::format("a header of {} bytes", length),
                     fmt::format("{} bytes up to the end of the file", file.size() - kLengthBytes));
  }
  const std::string_view text = file.substr(kLengthBytes, length);
  if (!text.starts_with('{'))
    return FileError(ErrorCode::kCorrupt, path, "header", "{ as its first byte",
                     Quoted(text.substr(0, 1)));
  // nlohmann::json takes a zero byte as the end of the text and would not look at what follows.
  if (text.find('\0') != text.npos)
    return FileError(ErrorCode::kCorrupt, path, "header", "JSON", "a zero byte");
  return text;
}

}  // namespace

Result<Safetensors> ParseSafetensors(std::string_view file, const std::string& path) try {
  const Result<std::string_view> text = HeaderText(file, path);
  if (!text.ok()) return text.status();
  HeaderReader header;
  if (!nlohmann::json::sax_parse(text->begin(), text->end(), &header))
    return Status(ErrorCode::kCorrupt, OneLine(path, 4096) + ": " + header.error);

  const std::string_view buffer = file.substr(kLengthBytes + text->size());
  for (const auto& [name, claim] : header.claims) {
    if (Status s = CheckClaim(path, name, claim, buffer.size()); !s.ok()) return s;
  }
  if (Status s = CheckCover(path, header.claims, buffer.size()); !s.ok()) return s;

  Safetensors result;
  result.metadata = std::move(header.metadata);
  for (auto& [name, claim] : header.claims) {
    const std::string_view data =
        buffer.substr(claim.offsets[0], claim.offsets[1] - claim.offsets[0]);
    result.tensors.emplace(name,
                           SafetensorsEntry{std::move(claim.dtype), std::move(claim.shape), data});
  }
  return result;
} catch (const std::exception& e) {  // of nlohmann::json or of an allocation
  return FileError(ErrorCode::kCorrupt, path, "header", "a header that fits into memory",
                   OneLine(e.what()));
}

}  // namespace kvmix::internal
