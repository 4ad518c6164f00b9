// kvmix-bench: how fast the kernels are, and how fast this machine would let them be.
//
// The table of benchmarks is workload.h's shapes and the contexts, codecs and sizes of
// attend_cases.cc and row_cases.cc. Google Benchmark filters, lists, repeats and reports; here each
// run is timed call by call, and its median is what gets reported.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include "bench/reporter.h"
#include "bench/workload.h"
#include "kernels/amx.h"
#include "kernels/kernels.h"
#include "kvmix/tune/speed.h"
#include "kvmix/version.h"
#include "lib/tune/stopwatch.h"
#include "tools/console.h"

namespace kvmix::bench {

std::string Shape::name() const {
  const std::string v = v_dim != head_dim ? fmt::format("x{}", v_dim) : "";
  return fmt::format("q{}kv{}d{}{}", query_heads, kv_heads, head_dim, v);
}

std::size_t Rotate(std::size_t bytes, bool cold, Workload* w) {
  const Machine& m = ThisMachine();
  if (bytes > m.most_memory()) {
    w->skip = fmt::format("{} is more than a quarter of memory ({})", SizeText(bytes),
                          SizeText(m.most_memory()));
    return 0;
  }
  if (!cold) return 1;
  const std::size_t copies = std::min((m.cold_wanted() - 1) / bytes + 1, m.most_memory() / bytes);
  if (copies * bytes < m.cold_wanted())
    w->note = fmt::format("cold set of {}: a quarter of memory, twice the last cache would be {}",
                          SizeText(copies * bytes), SizeText(m.cold_wanted()));
  return copies;
}

namespace {

using tools::Refuse;

constexpr const char* kProgram = "kvmix-bench";

constexpr const char* kExamples = R"(
Names:
  attend_decode/TARGET/k=CODEC,v=CODEC/SHAPE/CONTEXT/tTHREADS
  attend_prefill/TARGET/k=CODEC,v=CODEC/SHAPE/QUERIESxCONTEXT/tTHREADS
  attend_batch/TARGET/k=CODEC,v=CODEC/SHAPE/SEQUENCESxCONTEXT/tTHREADS
  quantize_token|quantize_head|dequantize_f32|dequantize_f16/TARGET/SHAPE/SIZE/tTHREADS
  append|append_rotated|append_i4|append_shaped|store|fork|shift/TARGET/SHAPE/SIZE/t1
SHAPE q14kv2d64: 14 query heads, 2 KV heads, head_dim 64. Contexts of 32k and 128k, and 8k of
q32kv32d128, are cold. All flags of Google Benchmark work: --benchmark_filter=REGEX,
--benchmark_list_tests, --benchmark_format=json|console|csv, --benchmark_out=FILE,
--benchmark_repetitions=N, --benchmark_enable_random_interleaving=true, ...

Examples:
  kvmix-bench --quick
  kvmix-bench --benchmark_filter='attend_decode/.*k=i8-token,v=i8-token/q32kv8d128/32k'
  kvmix-bench --target AVX2 --benchmark_filter='prefill.*512x4k/t1$' --benchmark_format=json)";

constexpr double kSeconds = 0.5, kQuickSeconds = 0.1;  // of one benchmark's samples
constexpr std::size_t kSamples = 7;                    // at least
constexpr double kShortestSample = 20e-6;              // so that reading the clock costs nothing

struct Options {
  std::string target;
  bool quick = false;
  double seconds() const { return quick ? kQuickSeconds : kSeconds; }
};

// Median seconds of one unit of work, and of as much of the reference.
struct Times {
  double call = 0.0, reference = 0.0;
};

Times Measure(const Workload& w, double seconds) {
  const double once = tune::MedianSeconds({w.call}, 0.0, 1)[0];
  const std::size_t repeat =
      once >= kShortestSample
          ? 1
          : static_cast<std::size_t>(kShortestSample / std::max(once, 1e-9)) + 1;
  const auto repeated = [repeat](const std::function<void()>& f) {
    return [repeat, f] {
      for (std::size_t i = 0; i < repeat; ++i) f();
    };
  };
  std::vector<std::function<void()>> functions{repeated(w.call)};
  if (w.reference) functions.push_back(repeated(w.reference));
  const std::vector<double> medians = tune::MedianSeconds(functions, seconds, kSamples);
  const double units = static_cast<double>(repeat * w.calls);
  return {medians[0] / units, medians.back() / units};
}

void Run(benchmark::State& state, const Case& c, double seconds, Bench& bench) {
  ShowProgress(c.name);
  const Workload w = c.prepare(bench);
  if (!w.skip.empty()) {
    state.SetLabel(w.skip);
    state.SkipWithError(w.skip.c_str());
    return;
  }
  std::vector<Times> all;
  for ([[maybe_unused]] auto _ : state) all.push_back(Measure(w, seconds));
  std::ranges::sort(all, {}, &Times::call);
  const Times& times = all[all.size() / 2];

  state.counters[kMedianSeconds] = times.call;
  state.counters["bytes_per_second"] = w.bytes / times.call;
  state.counters["mac_per_second"] = w.macs / times.call;
  state.counters["limit_fraction"] = (w.reference ? times.reference : w.ideal) / times.call;
  state.SetLabel(w.note.empty() ? w.limit : w.limit + kNoteSeparator + w.note);
}

// The value of one of Google Benchmark's flags, which it keeps to itself: --NAME=VALUE, or the
// environment's; the last one wins.
std::string FlagValue(const std::vector<std::string>& args, const std::string& name) {
  std::string variable = name, value;
  for (char& c : variable) c = static_cast<char>(std::toupper(c));
  if (const char* set = std::getenv(variable.c_str())) value = set;
  const std::string prefix = "--" + name + "=";
  for (const std::string& arg : args) {
    if (arg.starts_with(prefix)) value = arg.substr(prefix.size());
  }
  return value;
}

// `args`: the command line without the flags of Options.
void RunBenchmarks(const Options& options, const kernels::Kernels& kernels,
                   std::vector<std::string> args) {
  const std::string format = FlagValue(args, "benchmark_format"),
                    out = FlagValue(args, "benchmark_out"),
                    out_format = FlagValue(args, "benchmark_out_format"),
                    filter = FlagValue(args, "benchmark_filter");

  Bench bench(kernels, options.seconds());
  const auto display = format.empty() ? MakeTable(bench.limits) : MakeReporter(format);
  const auto file = out.empty() ? nullptr : MakeReporter(out_format.empty() ? "json" : out_format);

  // One iteration is a whole measurement, many calls long.
  args.insert(args.begin(), {kProgram, "--benchmark_min_time=" KVMIX_MIN_TIME});
  std::vector<char*> argv;
  argv.reserve(args.size() + 1);
  for (std::string& arg : args) argv.push_back(arg.data());
  int argc = static_cast<int>(argv.size());
  argv.push_back(nullptr);
  benchmark::Initialize(&argc, argv.data());
  if (argc > 1) Refuse("unknown argument '{}'; --help lists those there are", argv[1]);

  std::vector<Case> cases;
  AddAttendCases(kernels.target, &cases);
  AddRowCases(kernels.target, &cases);
  AddSequenceCases(kernels.target, &cases);
  for (const Case& c : cases) {
    if (options.quick && !c.quick && filter.empty()) continue;
    benchmark::RegisterBenchmark(
        c.name.c_str(), [&c, &bench, seconds = options.seconds()](benchmark::State& state) {
          Run(state, c, seconds, bench);
        });
  }
  benchmark::AddCustomContext("target", kernels.target);
  benchmark::AddCustomContext("cpu", tune::ThisMachine().cpu);
  if (const std::string& why_not = kernels::Amx().why_not; !why_not.empty())
    benchmark::AddCustomContext("amx_not_used", why_not);
  benchmark::AddCustomContext("kvmix_version", std::string(Version()));
  const std::size_t matched = benchmark::RunSpecifiedBenchmarks(display.get(), file.get());
  benchmark::Shutdown();
  if (matched == 0) Refuse("no benchmark's name matches '{}'", filter);
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app(
      "Times kvmix's kernels, and says what fraction of this machine's own limits they reach. "
      "Without --benchmark_filter: all of them, which takes long.",
      kProgram);
  app.add_option("--target", options.target,
                 fmt::format("instruction set to time: {} (default: the first)",
                             fmt::join(Targets(), ", ")))
      ->type_name("NAME");
  app.add_flag("--quick", options.quick,
               "under a minute: short measurements, and without --benchmark_filter a few "
               "benchmarks that stand for all");
  app.footer(kExamples);
  app.allow_extras();
  return tools::RunProgram(&app, argc, argv, [&] {
    const kernels::Kernels* kernels = kernels::FindKernels(options.target);
    if (kernels == nullptr)
      Refuse("--target '{}': this machine and build have {}", options.target,
             fmt::join(Targets(), ", "));
    RunBenchmarks(options, *kernels, app.remaining());
  });
}

}  // namespace
}  // namespace kvmix::bench

// All but the options' definition runs in RunProgram(). NOLINTNEXTLINE(bugprone-exception-escape)
int main(int argc, char** argv) { return kvmix::bench::Main(argc, argv); }
