// A number that is the whole of a text.
#ifndef KVMIX_LIB_FILES_PARSE_NUMBER_H_
#define KVMIX_LIB_FILES_PARSE_NUMBER_H_

#include <charconv>
#include <optional>
#include <string_view>
#include <system_error>

namespace kvmix::internal {

// Nothing where the text is anything else, or the number does not fit into a T.
template <class T>
std::optional<T> ParseNumber(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_FILES_PARSE_NUMBER_H_
