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
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "ggml-backend-impl.h"
#include "ggml.h"

#include "engines/common/mirror.h"

namespace kvmix::llama {

// One for the process, which never ends: ggml calls a buffer's functions with the buffer alone.
// Contexts may run on threads of their own.
class Watch {
 public:
  Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // From now on the mirror hears of what the engine does to these tensors, as long as their buffers
  // live, or until Remove. alone: the mirror is, and stands for the rows.
  void Add(engine::Mirror* mirror, ggml_tensor* k, ggml_tensor* v, bool alone);
  void Remove(engine::Mirror* mirror);

  // Of mirrors that are alone; nothing for other tensors.
  // After an Attend over these streams: the pages of those that have any go back.
  void GiveBack(engine::Mirror* mirror, std::size_t first_stream, std::size_t streams);
  // Whether a tensor is a part of one that a mirror stands for. Null is none.
  bool IsGivenBack(const ggml_tensor* tensor);
  // The engine's rows of a tensor become what the mirror holds, until the next Attend.
  void Restore(const ggml_tensor* tensor);

 private:
  struct Hooks;  // the buffers' functions
  struct Layer {
    engine::Mirror* mirror;
    ggml_tensor* tensors[2];  // K, V: [channels, cells, streams]
    bool alone;               // the mirror
    std::vector<bool> empty;  // by stream: the engine's pages are given back

    const ggml_tensor* tensor(Tensor t) const { return tensors[t == KVMIX_V]; }
    bool IsIn(ggml_backend_buffer_t buffer) const {
      return tensors[0]->buffer == buffer || tensors[1]->buffer == buffer;
    }
    std::size_t cells() const;
    std::size_t StreamOf(std::size_t cell) const;
    // The rows of those of some cells that the mirror holds.
    void DecodeRows(Tensor tensor, std::size_t first, std::size_t count, char* rows) const;
    // The engine's rows of some cells hold again, and it may write them.
    void HandOver(std::size_t first, std::size_t count);
  };
  // What part of a layer's tensor some bytes are.
  struct Place {
    Layer* layer = nullptr;
    Tensor tensor = KVMIX_K;
    std::size_t first = 0, count = 0;  // cells that cover the bytes
    std::size_t skip = 0;              // bytes of the first cell before them

    bool is_away() const { return layer != nullptr && layer->alone; }
    // Rows of the cells as the engine would have them.
    std::vector<char> Read() const;
  };
  Place Find(const void* data, std::size_t bytes);
  void Hook(ggml_backend_buffer_t buffer);
  // The engine is about to write these bytes.
  void BeforeWrite(const void* data, std::size_t bytes);

  std::recursive_mutex mutex_;
  std::list<Layer> layers_;
  std::map<ggml_backend_buffer_t, ggml_backend_buffer_i> buffers_;  // as they were
};

}  // namespace kvmix::llama

#endif  // KVMIX_ENGINES_LLAMA_CPP_WATCH_H_
