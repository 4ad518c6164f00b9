#include "console.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include <fmt/format.h>

namespace kvmix::tools {

int Fail(const std::string& program, const std::string& message) {
  std::string line = message;
  std::replace(line.begin(), line.end(), '\n', ' ');
  std::fputs(fmt::format("{}: error: {}\n", program, line).c_str(), stderr);
  return 1;
}

int Print(const std::string& program, const std::string& text) {
  const bool written =
      std::fputs(text.c_str(), stdout) >= 0;  // long texts are written here, not by fflush
  return written && std::fflush(stdout) == 0
             ? 0
             : Fail(program, "writing to the standard output failed");
}

ProgressBar::ProgressBar(std::string label)
    : label_(std::move(label)), terminal_(isatty(STDERR_FILENO) == 1) {
  Update(0, 1);
}

ProgressBar::~ProgressBar() {
  if (terminal_) std::fputs("\r\033[K", stderr);
}

void ProgressBar::Update(std::size_t done, std::size_t total) {
  if (!terminal_) return;
  constexpr std::size_t kWidth = 40;
  const std::size_t filled = kWidth * done / total;
  std::fputs(fmt::format("\r{} [{:#<{}}{:.<{}}] {:3} %\033[K", label_, "", filled, "",
                         kWidth - filled, 100 * done / total)
                 .c_str(),
             stderr);
  std::fflush(stderr);
}

Table::Table(std::vector<std::string> header, std::size_t left)
    : rows_{std::move(header)}, left_(left) {}

void Table::Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

std::string Table::Text() const {
  std::vector<std::size_t> widths(rows_[0].size(), 0);
  for (const auto& row : rows_)
    for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t c = 0; c < row.size(); ++c)
      line += c < left_ ? fmt::format("  {:<{}}", row[c], widths[c])
                        : fmt::format("  {:>{}}", row[c], widths[c]);
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

}  // namespace kvmix::tools
