#include "lib/files/json_view.h"

#include <fmt/format.h>

#include <cmath>
#include <exception>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "lib/files/file.h"

namespace kvmix::internal {

namespace {

using nlohmann::json;

constexpr std::size_t kMaxFileBytes = 64u << 20;
constexpr int kMaxDepth = 16;

// Sees every key and every opening bracket as the parser meets them; throws what LoadJson catches.
class Strictness {
 public:
  bool operator()(int depth, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start) {
      if (depth >= kMaxDepth)
        throw std::runtime_error(fmt::format("nesting deeper than {}", kMaxDepth));
      keys_.resize(static_cast<std::size_t>(depth) + 1);
      keys_.emplace_back();  // of the object that begins here
    } else if (event == json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys_[static_cast<std::size_t>(depth)].insert(key).second)
        throw std::runtime_error("the key " + Quoted(key) + " twice");
    }
    return true;
  }

 private:
  std::vector<std::set<std::string>> keys_;  // of the open objects, by depth
};

}  // namespace

Result<json> LoadJson(const std::string& path) try {
  const Result<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  const std::string_view text = file->bytes();
  if (text.size() > kMaxFileBytes) {
    return FileError(ErrorCode::kCorrupt, path, "",
                     fmt::format("at most {} bytes of JSON", kMaxFileBytes),
                     fmt::format("{}", text.size()));
  }
  // nlohmann::json takes a zero byte as the end of the text and would not look at what follows.
  if (text.find('\0') != text.npos)
    return FileError(ErrorCode::kCorrupt, path, "", "JSON", "a zero byte");
  return json::parse(text.begin(), text.end(), Strictness());
} catch (const std::exception& e) {
  return FileError(ErrorCode::kCorrupt, path, "", "JSON", OneLine(e.what()));
}

std::string JsonText(std::string_view text) {
  return json(text).dump(-1, ' ', false, json::error_handler_t::replace);
}

bool JsonView::has(const std::string& key) const {
  return value_ != nullptr && value_->is_object() && value_->contains(key);
}

JsonView JsonView::operator[](const std::string& key) const {
  const std::string where = where_.empty() ? key : where_ + '.' + key;
  if (has(key)) return JsonView(*this, &*value_->find(key), where);
  const JsonView missing(*this, nullptr, where);
  if (value_ != nullptr && value_->is_object())
    missing.Fail(ErrorCode::kCorrupt, "a value", "none");
  else
    WrongType("an object");
  return missing;
}

std::size_t JsonView::size() const {
  if (value_ != nullptr && value_->is_array()) return value_->size();
  WrongType("an array");
  return 0;
}

JsonView JsonView::operator[](std::size_t i) const {
  return JsonView(*this, &(*value_)[i], fmt::format("{}[{}]", where_, i));
}

std::string JsonView::Text() const {
  if (value_ != nullptr && value_->is_string()) return value_->get<std::string>();
  WrongType("a string");
  return {};
}

std::size_t JsonView::Count() const {
  if (value_ != nullptr && value_->is_number_unsigned()) return value_->get<std::size_t>();
  WrongType("a whole number");
  return 0;
}

double JsonView::Number() const {
  if (value_ != nullptr && value_->is_number()) return value_->get<double>();
  WrongType("a number");
  return 0.0;
}

float JsonView::Float() const {
  const double number = Number();
  if (std::abs(number) < 0x1.ffffffp127)
    return static_cast<float>(number);  // what rounds to a finite float
  WrongType("a 32-bit number");
  return 0.0f;
}

void JsonView::Fail(ErrorCode code, std::string_view expected, std::string_view found) const {
  if (status_->ok()) *status_ = FileError(code, *path_, OneLine(where_), expected, found);
}

void JsonView::WrongType(std::string_view expected) const {
  if (value_ == nullptr) return;  // the error that led here is there already
  if (value_->is_string())
    return Fail(ErrorCode::kCorrupt, expected, Quoted(value_->get_ref<const std::string&>()));
  const bool is_short = value_->is_primitive();
  Fail(ErrorCode::kCorrupt, expected,
       is_short             ? value_->dump()
       : value_->is_array() ? "an array"
                            : "an object");
}

void CheckVersion(const JsonView& root, std::string_view format, std::size_t major) {
  if (const std::string found = root["format"].Text(); found != format)
    root["format"].Fail(ErrorCode::kCorrupt, Quoted(format), Quoted(found));
  const JsonView version = root["version"];
  if (const std::size_t size = version.size(); size != 2)
    return version.Fail(ErrorCode::kCorrupt, "[major, minor]", fmt::format("{} numbers", size));
  const std::size_t found = version[0].Count();
  (void)version[1].Count();
  if (found != major)
    version.Fail(found > major ? ErrorCode::kVersion : ErrorCode::kCorrupt,
                 fmt::format("major version {}", major), fmt::format("{}", found));
}

}  // namespace kvmix::internal
