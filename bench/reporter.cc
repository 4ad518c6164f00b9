#include "bench/reporter.h"

#include <algorithm>
#include <iostream>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "kernels/amx.h"
#include "kvmix/tune/speed.h"
#include "tools/console.h"

namespace kvmix::bench {
namespace {

using benchmark::BenchmarkReporter;
using Runs = std::vector<BenchmarkReporter::Run>;

// The time of one call in the run's unit, as Google Benchmark's reporters work it out, is then the
// median.
Runs WithMedians(Runs runs) {
  for (BenchmarkReporter::Run& run : runs) {
    const auto median = run.counters.find(kMedianSeconds);
    if (median == run.counters.end()) continue;
    const bool is_time = run.aggregate_unit == benchmark::kTime;
    run.real_accumulated_time =
        median->second.value * (is_time ? static_cast<double>(run.iterations) : 1.0);
    run.cpu_accumulated_time = run.real_accumulated_time;
    run.counters.erase(median);
  }
  return runs;
}

// One of Google Benchmark's reporters, or the table, with medians for times.
template <class Reporter>
class Medians : public Reporter {
 public:
  template <class... Args>
  explicit Medians(Args&&... args) : Reporter(std::forward<Args>(args)...) {
    this->SetErrorStream(&nowhere_);
  }
  bool ReportContext(const BenchmarkReporter::Context& context) override {
    if (&this->GetErrorStream() == &nowhere_) this->SetErrorStream(&std::cerr);
    return Reporter::ReportContext(context);
  }
  void ReportRuns(const Runs& runs) override {
    ShowProgress("");
    Reporter::ReportRuns(WithMedians(runs));
  }

 private:
  // Google Benchmark says here that a filter matches nothing: main.cc says it as all programs do.
  std::ostream nowhere_{nullptr};
};

std::string TimeText(double seconds) {
  const char* const units[] = {"s ", "ms", "us", "ns"};
  std::size_t unit = 0;
  for (; seconds < 1 && unit < 3; ++unit) seconds *= 1000;
  return fmt::format("{:.{}f} {}", seconds, seconds < 10 ? 3 : seconds < 100 ? 2 : 1, units[unit]);
}

std::string RateText(double per_second) {
  const double giga = per_second * 1e-9;
  return giga == 0 ? "-" : fmt::format("{:.{}f}", giga, giga < 10 ? 2 : giga < 100 ? 1 : 0);
}

class Table : public BenchmarkReporter {
 public:
  explicit Table(const Limits& limits) : limits_(limits) {}

  bool ReportContext(const Context&) override {
    const Machine& m = ThisMachine();
    GetOutputStream() << fmt::format(
                             "kvmix-bench {}, {}, {} core{}, L2 {}, last cache {}, memory {}\n",
                             tune::ThisMachine().version, m.cpu, m.cores, m.cores == 1 ? "" : "s",
                             SizeText(m.caches.l2), SizeText(m.caches.last), SizeText(m.memory))
                      << "Medians. GB/s: bytes read and written. of limit: 100 % is the time that "
                         "the limit next to it allows.\n";
    if (const std::string& why_not = kernels::Amx().why_not; !why_not.empty())
      GetOutputStream() << "This CPU has AMX, but it is not used: " << why_not << "\n";
    return true;
  }

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) PrintRun(run);
    GetOutputStream().flush();
  }

  void Finalize() override {
    if (limits_.probed().empty()) return;
    GetOutputStream() << "\nLimits of this machine, probed in this run:\n";
    for (const std::string& limit : limits_.probed()) GetOutputStream() << "  " << limit << "\n";
  }

 private:
  // "attend_decode/AVX2/k=f16,..." -> a heading "attend_decode/AVX2" over rows "k=f16,...".
  void PrintRun(const Run& run) {
    const std::string name = run.benchmark_name();
    const std::size_t split = name.find('/', name.find('/') + 1);
    const std::string family = name.substr(0, split), rest = name.substr(split + 1);
    std::ostream& out = GetOutputStream();
    if (family != family_)
      out << fmt::format("\n{:<46}{:>9}{:>6}{:>7}{:>9}  {}\n", family, "time", "GB/s", "Gmac/s",
                         "of limit", "limit");
    family_ = family;

    const std::size_t note_at = run.report_label.find(kNoteSeparator);
    const std::string limit = run.report_label.substr(0, note_at);
    if (run.counters.empty()) {
      out << fmt::format("  {:<44}  skipped: {}\n", rest, run.report_label);
    } else if (run.aggregate_unit == benchmark::kPercentage) {
      out << fmt::format("  {:<44}{:>7.1f} %\n", rest, 100 * run.real_accumulated_time);
    } else {
      const auto counter = [&](const char* of) { return run.counters.at(of).value; };
      const double seconds = run.real_accumulated_time / static_cast<double>(run.iterations);
      out << fmt::format("  {:<44}{:>9}{:>6}{:>7}{:>7.0f} %  {}\n", rest, TimeText(seconds),
                         RateText(counter("bytes_per_second")), RateText(counter("mac_per_second")),
                         100 * counter("limit_fraction"), limit);
    }
    if (note_at != std::string::npos)
      out << fmt::format("{:<10}{}\n", "", run.report_label.substr(note_at + 2));
  }

  const Limits& limits_;
  std::string family_;
};

}  // namespace

std::unique_ptr<BenchmarkReporter> MakeTable(const Limits& limits) {
  return std::make_unique<Medians<Table>>(limits);
}

std::unique_ptr<BenchmarkReporter> MakeReporter(const std::string& format) {
  if (format == "console") return std::make_unique<Medians<benchmark::ConsoleReporter>>();
  if (format == "json") return std::make_unique<Medians<benchmark::JSONReporter>>();
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  if (format == "csv") return std::make_unique<Medians<benchmark::CSVReporter>>();
#pragma GCC diagnostic pop
  tools::Refuse("unknown format '{}': json, console or csv expected", format);
}

void ShowProgress(const std::string& text) {
  static tools::StatusLine line;
  text.empty() ? line.Wipe() : line.Show(text);
}

}  // namespace kvmix::bench
