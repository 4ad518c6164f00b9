#include "lib/files/safetensors.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "lib/files/file.h"
#include "lib/files/json_view.h"

namespace kvmix::internal {

namespace {

static_assert(std::endian::native == std::endian::little);  // numbers are written as they lie

constexpr std::size_t kLengthBytes = 8, kChecksumBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

constexpr std::pair<std::string_view, std::uint64_t> kDtypeBits[] = {
    {"BOOL", 8}, {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16},
    {"U16", 16}, {"F16", 16},    {"BF16", 16},   {"I32", 32},    {"U32", 32},
    {"F32", 32}, {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};

// Bits of a tensor; nothing where they are 2^64 or more.
std::optional<std::uint64_t> Bits(std::uint64_t bits, const std::vector<std::uint64_t>& shape) {
  for (const std::uint64_t size : shape) {
    if (size != 0 && bits > std::numeric_limits<std::uint64_t>::max() / size) return std::nullopt;
    bits *= size;
  }
  return bits;
}

// The part of a file after its header.
struct Buffer {
  std::uint64_t first, bytes;
};

// A tensor that agrees with itself, within the buffer; else an error in the status of the view.
SafetensorsEntry ReadEntry(const JsonView& tensor, const Buffer& buffer) {
  const auto fail = [&](std::string_view expected, std::string_view found) {
    tensor.Fail(ErrorCode::kCorrupt, expected, found);
    return SafetensorsEntry();
  };
  for (const std::string& field : tensor.keys()) {
    if (field != "dtype" && field != "shape" && field != "data_offsets")
      return fail("dtype, shape and data_offsets", Quoted(field));
  }
  SafetensorsEntry entry{tensor["dtype"].Text(), tensor["shape"].Counts()};
  if (!tensor["data_offsets"].HasSize(2, "numbers, begin and end")) return {};
  const std::size_t begin = tensor["data_offsets"][0].Count();
  const std::size_t end = tensor["data_offsets"][1].Count();
  const auto* dtype =
      std::ranges::find(kDtypeBits, entry.dtype, [](const auto& d) { return d.first; });
  if (dtype == std::end(kDtypeBits)) return fail("a dtype of the format", Quoted(entry.dtype));
  if (begin > end || end > buffer.bytes) {
    return fail(fmt::format("data_offsets in order within the buffer of {} bytes", buffer.bytes),
                fmt::format("[{}, {}]", begin, end));
  }
  const std::optional<std::uint64_t> bits = Bits(dtype->second, entry.shape);
  if (!bits) return fail("a shape whose bytes can be counted", "an overflow");
  if (*bits % 8 != 0) return fail("whole bytes", fmt::format("{} bits", *bits));
  if (end - begin != *bits / 8)
    return fail(fmt::format("{} bytes (dtype x shape)", *bits / 8), fmt::format("{}", end - begin));
  entry.first = buffer.first + begin;
  entry.bytes = end - begin;
  return entry;
}

// Every byte of the buffer belongs to exactly one tensor.
Status CheckCover(const std::string& path, const Safetensors& file, const Buffer& buffer) {
  std::vector<std::tuple<std::uint64_t, std::uint64_t, std::string_view>> order;
  for (const auto& [name, tensor] : file.tensors) {
    order.emplace_back(tensor.first - buffer.first, tensor.bytes, name);
  }
  std::ranges::sort(order);
  std::uint64_t covered = 0;
  for (const auto& [begin, bytes, name] : order) {
    if (begin != covered) {
      return FileError(ErrorCode::kCorrupt, path, OneLine(name),
                       fmt::format("to begin at byte {} of the buffer, without {}", covered,
                                   begin > covered ? "a hole" : "an overlap"),
                       begin);
    }
    covered += bytes;
  }
  if (covered == buffer.bytes) return {};
  return FileError(ErrorCode::kCorrupt, path, "buffer",
                   fmt::format("the {} bytes that the header lists", covered), buffer.bytes);
}

std::uint64_t HeaderBytes(std::string_view file) {
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;)
    length = length << 8 | static_cast<unsigned char>(file[i]);
  return length;
}

// The header's text, whole and within a file of `size` bytes that begins with `file`.
Result<std::string_view> HeaderText(std::string_view file, std::uint64_t size,
                                    const std::string& path) {
  const auto fail = [&](std::string_view what, std::string_view expected, const auto& found) {
    return FileError(ErrorCode::kCorrupt, path, what, expected, found);
  };
  if (size < kLengthBytes) return fail("", "a safetensors file of 8 bytes or more", size);
  const std::uint64_t length = HeaderBytes(file), rest = size - kLengthBytes;
  if (length > kMaxHeaderBytes)
    return fail("header length", fmt::format("at most {}", kMaxHeaderBytes), length);
  if (length > rest) {
    return fail("", fmt::format("a header of {} bytes", length),
                fmt::format("{} bytes up to the end of the file", rest));
  }
  const std::string_view text = file.substr(kLengthBytes, length);
  if (!text.starts_with('{'))
    return fail("header", "{ as its first byte", Quoted(text.substr(0, 1)));
  return text;
}

// `file`: all of it, or its first bytes with the whole header.
Result<Safetensors> Parse(std::string_view file, std::uint64_t size, const std::string& path) {
  const Result<std::string_view> text = HeaderText(file, size, path);
  if (!text.ok()) return text.status();
  const Result<nlohmann::json> header = ParseJson(*text, path, "header");
  if (!header.ok()) return header.status();

  const std::uint64_t first = kLengthBytes + text->size();
  const Buffer buffer{first, size - first};
  Status status;
  const JsonView root(*header, path, &status);
  Safetensors result;
  for (const std::string& name : root.keys()) {
    const JsonView entry = root[name];
    if (name != "__metadata__") {
      result.tensors.emplace(name, ReadEntry(entry, buffer));
      continue;
    }
    for (const std::string& key : entry.keys()) result.metadata.emplace(key, entry[key].Text());
  }
  if (status.ok()) status = CheckCover(path, result, buffer);
  if (!status.ok()) return status;
  return result;
}

}  // namespace

Result<Safetensors> ParseSafetensors(std::string_view file, const std::string& path) {
  return Parse(file, file.size(), path);
}

Result<Safetensors> ReadSafetensors(const File& file) {
  std::string begin(std::min<std::uint64_t>(file.size(), kLengthBytes), '\0');
  if (Status s = file.Read(0, begin); !s.ok()) return s;
  if (begin.size() == kLengthBytes) {
    const std::uint64_t length = std::min(HeaderBytes(begin), kMaxHeaderBytes);
    begin.resize(kLengthBytes + std::min(length, file.size() - kLengthBytes));
    if (Status s = file.Read(0, begin); !s.ok()) return s;
  }
  return Parse(begin, file.size(), file.path());
}

Result<std::string_view> TensorData(std::string_view file, const Safetensors& content,
                                    const std::string& path, const std::string& name,
                                    std::string_view dtype, const std::vector<std::uint64_t>& shape,
                                    std::string_view what) {
  const auto at = content.tensors.find(name);
  if (at == content.tensors.end()) return FileError(ErrorCode::kCorrupt, path, name, what, "none");
  const SafetensorsEntry& tensor = at->second;
  if (tensor.dtype == dtype && tensor.shape == shape) return tensor.In(file);
  const auto text = [](std::string_view type, const std::vector<std::uint64_t>& of) {
    return fmt::format("{} [{}]", type, fmt::join(of, ", "));
  };
  return FileError(ErrorCode::kCorrupt, path, name, text(dtype, shape),
                   text(tensor.dtype, tensor.shape));
}

std::string SafetensorsHeader(const std::map<std::string, std::string>& metadata,
                              const std::vector<SafetensorsSize>& tensors) {
  nlohmann::ordered_json header = {{"__metadata__", metadata}};
  std::uint64_t at = 0;
  for (const SafetensorsSize& t : tensors) {
    header[t.name] = {{"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {at, at + t.bytes}}};
    at += t.bytes;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the tensors lie on whole words
  const std::uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + text;
}

Status WriteSafetensors(const std::string& path, const std::map<std::string, std::string>& metadata,
                        const std::vector<SafetensorsTensor>& tensors) {
  std::vector<SafetensorsSize> sizes;
  std::uint64_t bytes = kChecksumBytes;
  for (const SafetensorsTensor& t : tensors) {
    sizes.push_back({t.name, t.dtype, t.shape, t.data.size()});
    bytes += t.data.size();
  }
  sizes.push_back({"checksum", "U64", {1}, kChecksumBytes});
  const std::string header = SafetensorsHeader(metadata, sizes);

  return WriteFileAtomically(
      path, fmt::format("room for {} bytes and the right to write them", header.size() + bytes),
      [&](std::FILE* file) {
        XXH3_state_t hash;
        XXH3_64bits_reset(&hash);
        const auto write = [&](const void* data, std::size_t size) {
          XXH3_64bits_update(&hash, data, size);
          return std::fwrite(data, 1, size, file) == size;
        };
        bool good = write(header.data(), header.size());
        for (const SafetensorsTensor& t : tensors)
          good = good && write(t.data.data(), t.data.size());
        const std::uint64_t checksum = XXH3_64bits_digest(&hash);
        return good && write(&checksum, sizeof checksum);
      });
}

Status CheckChecksum(std::string_view file, const std::string& path) {
  std::uint64_t written = 0;
  if (file.size() < sizeof written)
    return FileError(ErrorCode::kCorrupt, path, "checksum", "8 bytes", file.size());
  const std::size_t size = file.size() - sizeof written;
  std::memcpy(&written, file.data() + size, sizeof written);
  const std::uint64_t found = XXH3_64bits(file.data(), size);
  if (found == written) return {};
  return FileError(ErrorCode::kCorrupt, path, "checksum",
                   fmt::format("{:016x}, as the file says", written),
                   fmt::format("{:016x}: the file is damaged or was edited", found));
}

}  // namespace kvmix::internal
