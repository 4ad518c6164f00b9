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
      levels_.resize(static_cast<std::size_t>(depth) + 1);
      levels_.emplace_back();  // of the object that begins here
    } else if (event == json::parse_event_t::key) {
      levels_.resize(static_cast<std::size_t>(depth) + 1);  // what was inside is closed
      Level& level = levels_.back();
      level.last = value.get<std::string>();
      if (!level.keys.insert(level.last).second)
        throw std::runtime_error("the key " + Quoted(Way()) + " twice");
    }
    return true;
  }

 private:
  struct Level {
    std::set<std::string> keys;
    std::string last;
  };

  std::string Way() const {
    std::string way;
    for (const Level& level : levels_) {
      if (!level.last.empty()) way += (way.empty() ? "" : ".") + level.last;
    }
    return way;
  }

  std::vector<Level> levels_;  // the open objects, by depth
};

}  // namespace

Result<json> ParseJson(std::string_view text, const std::string& path, std::string_view what) try {
  // nlohmann::json takes a zero byte as the end of the text and would not look at what follows.
  if (text.find('\0') != text.npos) throw std::runtime_error("a zero byte");
  return json::parse(text.begin(), text.end(), Strictness());
} catch (const std::exception& e) {
  return FileError(ErrorCode::kCorrupt, path, what, "JSON", OneLine(e.what()));
}

Result<json> LoadJson(const std::string& path) {
  const Result<std::string> text = ReadFile(path, kMaxFileBytes);
  if (!text.ok()) return text.status();
  return ParseJson(*text, path, "");
}

std::string JsonText(std::string_view text) {
  return json(text).dump(-1, ' ', false, json::error_handler_t::replace);
}

bool JsonView::is_null() const { return value_ != nullptr && value_->is_null(); }

bool JsonView::has(const std::string& key) const {
  return value_ != nullptr && value_->is_object() && value_->contains(key);
}

std::vector<std::string> JsonView::keys() const {
  std::vector<std::string> keys;
  if (value_ == nullptr || !value_->is_object())
    WrongType("an object");
  else
    for (const auto& [key, value] : value_->items()) keys.push_back(key);
  return keys;
}

JsonView JsonView::operator[](const std::string& key) const {
  std::string where = where_.empty() ? key : where_ + '.' + key;
  if (has(key)) return JsonView(*this, &*value_->find(key), std::move(where));
  JsonView missing(*this, nullptr, std::move(where));
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

bool JsonView::HasSize(std::size_t expected, std::string_view of) const {
  const std::size_t found = size();
  if (found == expected) return true;
  Fail(ErrorCode::kCorrupt, fmt::format("{} {}", expected, of), fmt::format("{}", found));
  return false;
}

template <class T>
T JsonView::Get(bool (json::*has_type)() const noexcept, const char* expected) const {
  if (value_ != nullptr && (value_->*has_type)()) return value_->get<T>();
  WrongType(expected);
  return T();
}

std::string JsonView::Text() const { return Get<std::string>(&json::is_string, "a string"); }

std::size_t JsonView::Count() const {
  return Get<std::size_t>(&json::is_number_unsigned, "a whole number below 2^64");
}

double JsonView::Number() const { return Get<double>(&json::is_number, "a number"); }

float JsonView::Float() const {
  const double number = Number();
  if (std::abs(number) < 0x1.ffffffp127)
    return static_cast<float>(number);  // what rounds to a finite float
  WrongType("a 32-bit number");
  return 0.0f;
}

template <class T>
std::vector<T> JsonView::All(T (JsonView::*get)() const) const {
  std::vector<T> all(size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = ((*this)[i].*get)();
  return all;
}

std::vector<std::size_t> JsonView::Counts() const { return All(&JsonView::Count); }
std::vector<float> JsonView::Floats() const { return All(&JsonView::Float); }

void JsonView::Fail(ErrorCode code, std::string_view expected, std::string_view found) const {
  if (status_->ok()) *status_ = FileError(code, *path_, OneLine(where_), expected, found);
}

void JsonView::WrongType(std::string_view expected) const {
  if (value_ == nullptr) return;  // the error that led here is there already
  if (value_->is_string())
    return Fail(ErrorCode::kCorrupt, expected, Quoted(value_->get_ref<const std::string&>()));
  Fail(ErrorCode::kCorrupt, expected,
       value_->is_primitive() ? value_->dump()
       : value_->is_array()   ? "an array"
                              : "an object");
}

void CheckVersion(const JsonView& root, std::string_view format, std::size_t major) {
  if (const std::string found = root["format"].Text(); found != format)
    root["format"].Fail(ErrorCode::kCorrupt, Quoted(format), Quoted(found));
  const JsonView version = root["version"];
  if (!version.HasSize(2, "numbers, [major, minor]")) return;
  const std::size_t found = version[0].Count();
  (void)version[1].Count();
  if (found != major)
    version.Fail(found > major ? ErrorCode::kVersion : ErrorCode::kCorrupt,
                 fmt::format("major version {}", major), fmt::format("{}", found));
}

}  // namespace kvmix::internal
