// A plan from a program: two dumps in, a plan out, byte for byte the plan that kvmix-tune writes.
//   c++ -std=c++20 tune.cc $(pkg-config --cflags --libs kvmix-tune) -o tune
//   ./tune calibration.safetensors holdout.safetensors 0.45 plan.json
#include <cstdio>
#include <cstdlib>
#include <string>

#include <kvmix/plan.h>
#include <kvmix/tune/tune.h>

namespace {

int Fail(const kvmix::Status& status) {
  std::fprintf(stderr, "%s\n", status.message().c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: tune CALIBRATION HOLDOUT BUDGET PLAN\n");
    return 2;
  }
  const kvmix::Result<kvmix::tune::Dump> calibration = kvmix::tune::Dump::Open(argv[1]);
  if (!calibration.ok()) return Fail(calibration.status());
  const kvmix::Result<kvmix::tune::Dump> holdout = kvmix::tune::Dump::Open(argv[2]);
  if (!holdout.ok()) return Fail(holdout.status());

  kvmix::tune::TuneOptions options;
  options.constraints.budget = std::atof(argv[3]);  // save this fraction of the fp16 bytes
  options.progress = [](const std::string& step, std::size_t done, std::size_t total) {
    if (done == total) std::fprintf(stderr, "%s: done\n", step.c_str());
    return true;  // false would stop the work
  };
  const kvmix::Result<kvmix::tune::Tuned> tuned =
      kvmix::tune::Tune({&*calibration}, {&*holdout}, options);
  if (!tuned.ok()) return Fail(tuned.status());

  const kvmix::Plan& plan = tuned->choice.plan;
  if (const kvmix::Status s = kvmix::SavePlan(plan, argv[4]); !s.ok()) return Fail(s);
  std::printf("saves %.1f %% of the bytes; on %s the worst query head has cosine %.5f\n",
              100.0 * kvmix::SavedFraction(plan), tuned->holdouts[0].name.c_str(),
              tuned->holdouts[0].found.worst_cosine);
}
