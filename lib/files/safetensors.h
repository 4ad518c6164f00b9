// The safetensors format: 8 bytes of little-endian header length, a JSON header, a buffer of
// tensors. Read as strictly as the format's own reader does, and a little more: unknown fields of a
// tensor and any name or field given twice are refused as well. Written with a checksum.
#ifndef KVMIX_LIB_FILES_SAFETENSORS_H_
#define KVMIX_LIB_FILES_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "kvmix/status.h"
#include "lib/files/file.h"

namespace kvmix::internal {

struct SafetensorsEntry {
  std::string dtype;                   // "F16"
  std::vector<std::uint64_t> shape;    // its product times the dtype's size is `bytes`
  std::uint64_t first = 0, bytes = 0;  // its data in the file; any alignment

  std::string_view In(std::string_view file) const { return file.substr(first, bytes); }
};

struct Safetensors {
  std::map<std::string, std::string> metadata;
  std::map<std::string, SafetensorsEntry> tensors;
};

// `file` is the whole file; `path` is for messages only. kCorrupt for everything that is refused:
// a header longer than 100 MB or than the file, that does not begin with `{`, is no JSON, holds
// anything but tensors (dtype, shape, data_offsets) and a `__metadata__` of strings; an unknown
// dtype; a length that is not dtype x shape (or overflows); a buffer that the tensors do not cover
// exactly once.
Result<Safetensors> ParseSafetensors(std::string_view file, const std::string& path);
// The same for a file of which only the header is read.
Result<Safetensors> ReadSafetensors(const File& file);

// The data of a tensor of this type and shape in `file`, which `content` was parsed from. kCorrupt:
// it is missing (`what` says what was hoped for) or another one.
Result<std::string_view> TensorData(std::string_view file, const Safetensors& content,
                                    const std::string& path, const std::string& name,
                                    std::string_view dtype, const std::vector<std::uint64_t>& shape,
                                    std::string_view what);

// A tensor to be written. `data`: its numbers in C order, little-endian.
struct SafetensorsTensor {
  std::string name, dtype;
  std::vector<std::uint64_t> shape;
  std::string_view data;
};

// A tensor whose numbers are written by somebody else. `bytes`: its dtype x shape.
struct SafetensorsSize {
  std::string name, dtype;
  std::vector<std::uint64_t> shape;
  std::uint64_t bytes;
};

// The begin of a file whose tensors follow in this order: length and JSON, a multiple of 8 bytes.
std::string SafetensorsHeader(const std::map<std::string, std::string>& metadata,
                              const std::vector<SafetensorsSize>& tensors);

// Writes the tensors in this order, atomically, and behind them "checksum" (U64, [1]): XXH3 (64
// bits) of all that stands before its 8 bytes, which are the last of the file.
Status WriteSafetensors(const std::string& path, const std::map<std::string, std::string>& metadata,
                        const std::vector<SafetensorsTensor>& tensors);

// kCorrupt where a file that was so written is not what it was.
Status CheckChecksum(std::string_view file, const std::string& path);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_FILES_SAFETENSORS_H_
