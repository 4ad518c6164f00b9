// Dumps as the command-line programs take them: what people should know of one, the built-in
// sample.
#ifndef KVMIX_TOOLS_DUMPS_H_
#define KVMIX_TOOLS_DUMPS_H_

#include <string>

#include "kvmix/tune/dump.h"

namespace kvmix::tools {

// Warns where the dump has prompts far longer than the calibration of the plan had.
void WarnOfLength(const tune::Dump& dump, const Plan& plan);

// The path of the sample's "calibration" or "holdout" file: under KVMIX_DATA_DIR if that is set,
// else in share/kvmix beside the program's bin folder, else where the sources were when it was
// built.
std::string SamplePath(const std::string& part);

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_DUMPS_H_
