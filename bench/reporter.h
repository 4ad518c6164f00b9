// From Google Benchmark's runs to what is shown. A benchmark here takes its own medians
// (workload.h) and leaves them in the counter kMedianSeconds; every reporter shows that as the
// time, and not the mean that Google Benchmark computes. cpu_time is set to the same: it is not
// measured.
#ifndef KVMIX_BENCH_REPORTER_H_
#define KVMIX_BENCH_REPORTER_H_

#include <memory>
#include <string>

#include <benchmark/benchmark.h>

#include "bench/machine.h"

namespace kvmix::bench {

inline constexpr const char* kMedianSeconds = "median_seconds";

// A label is "which limit; note". A skipped benchmark has a reason for a label and no counters.
inline constexpr const char* kNoteSeparator = "; ";

// A table for people, 100 columns wide, with the limits that were probed below it.
std::unique_ptr<benchmark::BenchmarkReporter> MakeTable(const Limits& limits);
// Google Benchmark's own "json", "console" or "csv"; refuses others.
std::unique_ptr<benchmark::BenchmarkReporter> MakeReporter(const std::string& format);

// Shows what is under way in tools/console.h's StatusLine; "" wipes it.
void ShowProgress(const std::string& text);

}  // namespace kvmix::bench

#endif  // KVMIX_BENCH_REPORTER_H_
