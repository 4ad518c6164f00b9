// JSON files read strictly and without exceptions: the first thing that is missing or of the wrong
// type becomes a Status that says where in the file it stands.
#ifndef KVMIX_LIB_FILES_JSON_VIEW_H_
#define KVMIX_LIB_FILES_JSON_VIEW_H_

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvmix/status.h"

namespace kvmix::internal {

// Refuses malformed text, nesting deeper than 16 and keys given twice. `path` and `what`, a part of
// the file or "", are for messages.
Result<nlohmann::json> ParseJson(std::string_view text, const std::string& path,
                                 std::string_view what);
// A whole file, of at most 64 MB.
Result<nlohmann::json> LoadJson(const std::string& path);

// A string as JSON, with its quotes, for text that is written by hand. Bytes that are no UTF-8
// become U+FFFD.
std::string JsonText(std::string_view text);

// A value inside a document, and the way to it ("codecs[3][1].k"). Getters put an error into the
// status that all views of a document share, unless it holds one, and return zeros or another empty
// view: read everything, then look at the status. Copies are cheap enough for files of a few
// thousand values.
class JsonView {
 public:
  // The document must outlive its views.
  JsonView(const nlohmann::json& document, const std::string& path, Status* status)
      : value_(&document), path_(&path), status_(status) {}

  bool is_null() const;                                           // the file says null
  bool has(const std::string& key) const;                         // false if this is no object
  std::vector<std::string> keys() const;                          // of an object
  JsonView operator[](const std::string& key) const;              // an error if it is missing
  std::size_t size() const;                                       // of an array
  JsonView operator[](std::size_t i) const;                       // i < size()
  bool HasSize(std::size_t expected, std::string_view of) const;  // an error if not

  std::string Text() const;
  std::size_t Count() const;  // a whole number from 0 to 2^64 - 1
  double Number() const;
  float Float() const;  // a number within float's range
  std::vector<std::size_t> Counts() const;
  std::vector<float> Floats() const;

  void Fail(ErrorCode code, std::string_view expected, std::string_view found) const;

 private:
  JsonView(const JsonView& parent, const nlohmann::json* value, std::string where)
      : value_(value), path_(parent.path_), status_(parent.status_), where_(std::move(where)) {}
  template <class T>
  T Get(bool (nlohmann::json::*has_type)() const noexcept, const char* expected) const;
  template <class T>
  std::vector<T> All(T (JsonView::*get)() const) const;
  void WrongType(std::string_view expected) const;

  const nlohmann::json* value_;  // null after an error
  const std::string* path_;
  Status* status_;
  std::string where_;
};

// For files that begin with "format": FORMAT, "version": [MAJOR, minor]: to be called before
// anything else is read, as what a newer major version means by a field is unknown. A newer minor
// version may add fields, which are not looked at.
void CheckVersion(const JsonView& root, std::string_view format, std::size_t major);

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_FILES_JSON_VIEW_H_
