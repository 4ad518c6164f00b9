#include "tune_options.h"

#include <fmt/format.h>

#include "console.h"

namespace kvmix::tools {
namespace {

// A number in (low, high), or in (low, high] if `closed`.
CLI::Validator Between(double low, double high, bool closed) {
  return CLI::Validator(
      [=](std::string& text) -> std::string {
        double x = 0.0;
        if (CLI::detail::lexical_cast(text, x) && x > low && (x < high || (closed && x == high)))
          return "";
        return fmt::format("expected a number above {} and {} {}, found '{}'", low,
                           closed ? "up to" : "below", high, text);
      },
      "NUMBER");
}

}  // namespace

std::pair<std::size_t, std::size_t> CommandLine::LayerRange(const Model& model) const {
  if (layers.empty()) return {0, model.layers.size()};
  const auto range = ParsePair(layers);
  if (!range)
    Refuse("--layers: expected FIRST:LAST, as 0:8 for the layers 0 to 7, found '{}'", layers);
  return *range;
}

void AddDumps(CLI::App* app, CommandLine* o, const std::string& what) {
  app->add_option("DUMP", o->dumps, what + ": safetensors files");
  app->add_option("--threads", o->threads, "0: all")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

void AddLayers(CLI::App* app, CommandLine* o) {
  app->add_option("--layers", o->layers,
                  "FIRST:LAST, as 0:8 for the layers 0 to 7; without it: all");
}

void AddMeasuring(CLI::App* app, CommandLine* o) {
  app->add_option("--candidates", o->how.candidates, "codecs to choose from")
      ->check(CLI::IsMember({"seed", "int8", "all"}))
      ->capture_default_str();
  app->add_option(
         "--exact-first", o->how.exact_first,
         "keep this number of first tokens of every layer in f16 as well as in codes (4, if "
         "that and --exact-newest take little of --context)")
      ->check(CLI::Range(std::size_t{0}, kMostExactFirst));
  app->add_option("--exact-newest", o->how.exact_newest,
                  "a query sees the stretch of this many tokens that it stands in exactly (64)")
      ->check(CLI::IsMember({0, 16, 32, 64, 128, 256}));
  app->add_option("--target", o->how.target,
                  "instruction set to measure with; without it: the best of this CPU. Parts that "
                  "are measured on CPUs of several kinds need one that all have");
}

void AddChoosing(CLI::App* app, CommandLine* o) {
  app->add_option("--budget", o->how.constraints.budget,
                  "save at least this fraction of the fp16 bytes of a context of --context tokens")
      ->check(Between(0.0, 1.0, false));
  app->add_option(
         "--min-cosine", o->how.constraints.min_cosine,
         "of the predicted worst query head; without --budget: save the most that holds it")
      ->check(Between(0.0, 1.0, true));
  app->add_option("--max-time", o->max_ms,
                  "at most this predicted decode time of a token over all layers, in ms")
      ->check(Between(0.0, 1e9, false));
  app->add_option("--holdout", o->holdouts,
                  "dump to measure the finished plan on; may be given several times, for other "
                  "texts and lengths")
      ->allow_extra_args(false);  // what follows its dump is another argument
  app->add_option("--context", o->how.context,
                  "tokens in the cache, for decode times, and for bytes where layers have a window")
      ->check(CLI::Range(1u, 1u << 20))
      ->capture_default_str();
  app->add_option(
      "--wisdom", o->how.wisdom,
      "file of kernel speeds of this CPU: read if it exists, completed, written; they then "
      "decide where codecs are about equally accurate");
  app->add_option(
      "-o,--output", o->output,
      fmt::format("the plan (default: {} if there is none yet; none with --json)", kDefaultPlan));
  app->add_flag("--json", o->json, "print the report as JSON");
  app->add_flag("--explain", o->explain,
                "say of every KV head's K and V why it is not stored smaller; as JSON also what "
                "every candidate costs each query head");
}

void AddPartOutput(CLI::App* app, CommandLine* o, const std::string& what) {
  app->add_option("-o,--output", o->output, what)->required();
}

}  // namespace kvmix::tools
