// The command-line programs talk to people by this: arguments, errors, progress, tables.
#ifndef KVMIX_TOOLS_CONSOLE_H_
#define KVMIX_TOOLS_CONSOLE_H_

#include <chrono>
#include <cstddef>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kvmix/status.h"

namespace CLI {
class App;
}

namespace kvmix::tools {

// Programs give up by an exception, which RunProgram() tells people: with a message of their own,
// as in Refuse("{}: has no tokens", path), or with the library's, where it has no value for them.
template <class... Args>
[[noreturn]] void Refuse(fmt::format_string<Args...> message, Args&&... args) {
  throw std::runtime_error(fmt::format(message, std::forward<Args>(args)...));
}
inline void Require(const Status& status) {
  if (!status.ok()) Refuse("{}", status.message());
}
template <class T>
T Require(Result<T> result) {
  Require(result.status());
  return std::move(*result);
}

// Reads the command line, runs the program, and returns what main() returns. --help is answered;
// whatever goes wrong is one line on stderr, "PROGRAM: error: MESSAGE", and the exit code 1.
// SIGTERM also leaves such a line.
int RunProgram(CLI::App* app, int argc, char** argv, const std::function<void()>& run);

// One line on stderr, "PROGRAM: warning: MESSAGE", of what people should know; the work goes on.
void Warn(const std::string& message);

// Writes a program's result to stdout, or to a file, all of it.
void Print(const std::string& text);
void WriteFile(const std::string& path, const std::string& text);

// "3:14" as {3, 14}; nothing where the text is anything else.
std::optional<std::pair<std::size_t, std::size_t>> ParsePair(std::string_view text);

// One line on stderr that says what is under way. On a terminal each takes the place of the one
// before, and the last one goes; elsewhere one a minute is written, with the minutes since the
// start.
class StatusLine {
 public:
  using Clock = std::chrono::steady_clock;
  explicit StatusLine(Clock::time_point start = Clock::now());
  ~StatusLine() { Wipe(); }
  StatusLine(const StatusLine&) = delete;
  StatusLine& operator=(const StatusLine&) = delete;
  void Show(const std::string& text, Clock::time_point now = Clock::now());
  void Wipe();
  bool on_terminal() const { return on_terminal_; }

 private:
  bool on_terminal_;
  Clock::time_point start_, shown_;
};

// The number of layers that are done: a bar on a terminal, words elsewhere.
class ProgressBar {
 public:
  explicit ProgressBar(std::string label);
  void Update(std::size_t done, std::size_t total,
              StatusLine::Clock::time_point now = StatusLine::Clock::now());
  // Update() as the callback that measuring takes; true: the work goes on.
  std::function<bool(std::size_t done, std::size_t total)> Callback() {
    return [this](std::size_t done, std::size_t total) {
      Update(done, total);
      return true;
    };
  }

 private:
  std::string label_;
  StatusLine line_;
};

// A bar for every step of a piece of work that names its steps, one after the other.
class StepBar {
 public:
  void Update(const std::string& step, std::size_t done, std::size_t total);

 private:
  std::string step_;
  std::optional<ProgressBar> bar_;
};

// Columns as wide as they need: the first `left` aligned to the left, the others to the right. Tabs
// stand between the cells of a row.
class Table {
 public:
  Table(std::string header, std::size_t left) : rows_{std::move(header)}, left_(left) {}
  template <class... Args>
  void Add(fmt::format_string<Args...> row, Args&&... args) {
    rows_.push_back(fmt::format(row, std::forward<Args>(args)...));
  }
  std::string Text() const;  // each line indented by two spaces

 private:
  std::vector<std::string> rows_;
  std::size_t left_;
};

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_CONSOLE_H_
