// What the command-line programs share in talking to people: errors, progress, tables.
#ifndef KVMIX_TOOLS_CONSOLE_H_
#define KVMIX_TOOLS_CONSOLE_H_

#include <cstddef>
#include <string>
#include <vector>

namespace kvmix::tools {

// "PROGRAM: error: MESSAGE", one line on stderr; returns 1, the exit code of a program that failed.
int Fail(const std::string& program, const std::string& message);

// Writes a program's result to stdout; returns its exit code: 0, or Fail's where stdout does not
// take all of it.
int Print(const std::string& program, const std::string& text);

// A bar on stderr where that is a terminal, nothing elsewhere. Gone when it is destroyed.
class ProgressBar {
 public:
  explicit ProgressBar(std::string label);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  void Update(std::size_t done, std::size_t total);

 private:
  std::string label_;
  bool terminal_;
};

// Rows of cells in columns as wide as they need: the first `left` columns aligned to the left, the
// others to the right.
class Table {
 public:
  Table(std::vector<std::string> header, std::size_t left);
  void Add(std::vector<std::string> row);
  std::string Text() const;  // each line indented by two spaces

 private:
  std::vector<std::vector<std::string>> rows_;
  std::size_t left_;
};

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_CONSOLE_H_
