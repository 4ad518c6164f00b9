// Watches the buffers of the engine's KV cache: what it writes there by itself (state files, prompt
// caches, sequences copied from stream to stream) is read again by the mirror.
//
// With KVMIX_MEMORY=1 the mirror's codes take the place of the engine's rows, whose pages go back
// to the system. What reads or writes them all the same is led through here: rows are decoded where
// they are read, and read again where they were written; nodes of a graph (a context shift) find
// them restored.
#ifndef KVMIX_ENGINES_LLAMA_CPP_WATCH_H_
#define KVMIX_ENGINES_LLAMA_CPP_WATCH_H_

#include <cstddef>

#include "ggml.h"

#include "engines/common/mirror.h"

namespace kvmix::llama {

using namespace engine;

// From now on the mirror hears of what the engine does to these tensors, as long as their buffers
// live, or until Unwatch. alone: the mirror is, and stands for the rows.
void Watch(Mirror* mirror, ggml_tensor* k, ggml_tensor* v, bool alone);
void Unwatch(Mirror* mirror);

// Of mirrors that are alone; nothing for other tensors.
// After an Attend over these streams: the pages of those that have any go back.
void GiveBack(Mirror* mirror, std::size_t first_stream, std::size_t streams);
// Whether a tensor is a part of one that a mirror stands for. Null is none.
bool IsGivenBack(const ggml_tensor* tensor);
// The engine's rows of a tensor become what the mirror holds, until the next Attend.
void Restore(const ggml_tensor* tensor);

}  // namespace kvmix::llama

#endif  // KVMIX_ENGINES_LLAMA_CPP_WATCH_H_
