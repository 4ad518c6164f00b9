// The findings of kvmix-tune, as text for people and as JSON for programs.
#ifndef KVMIX_TOOLS_TUNE_REPORT_H_
#define KVMIX_TOOLS_TUNE_REPORT_H_

#include <cstddef>
#include <string>
#include <vector>

#include "kvmix/tune/tune.h"

namespace kvmix::tools {

struct TuneReport : tune::Tuned {
  bool times_are_kept = false;  // in a wisdom file
  bool explain = false;         // say of every K and V why it is not stored smaller
};

std::string ReportText(const TuneReport& report);
std::string ReportJson(const TuneReport& report);

// ---- shared by both forms

// A candidate's errors over the query heads that read its KV head.
Fidelity OfHead(const tune::CandidateError& candidate);

// KV heads that plain int8 hurts, the worst first.
std::vector<const tune::HeadErrors*> Outliers(const tune::ErrorTable& table);

// A context takes another number of bytes than its tokens alone would: less by windows, more by
// tokens that are kept twice.
bool ContextMatters(const TuneReport& report);

const char* LimitName(tune::Limit limit);

// Bytes per token of a K or V with this codec.
std::size_t TensorBytes(const TuneReport& report, const tune::HeadErrors& head,
                        const CodecKind& kind);

}  // namespace kvmix::tools

#endif  // KVMIX_TOOLS_TUNE_REPORT_H_
