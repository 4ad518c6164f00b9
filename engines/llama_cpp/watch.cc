#include "engines/llama_cpp/watch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "engines/llama_cpp/rows.h"

namespace kvmix::llama {

using engine::Mirror;

namespace {

constexpr std::size_t kCellsAtATime = 64;

Watch* the_watch = nullptr;

char* RowOf(const ggml_tensor* t, std::size_t cell) {
  return static_cast<char*>(t->data) + cell * t->nb[1];
}

// Zeros that take no memory.
void Empty(char* data, std::size_t bytes) {
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data), end = begin + bytes;
  const std::uintptr_t first = std::min((begin + page - 1) / page * page, end);
  const std::uintptr_t last = std::max(end / page * page, first);
  std::memset(data, 0, first - begin);
  std::memset(reinterpret_cast<char*>(last), 0, end - last);
  if (last == first) return;
  char* const pages = data + (first - begin);
  if (madvise(pages, last - first, MADV_DONTNEED) != 0) std::memset(pages, 0, last - first);
}

}  // namespace

// ---- a layer

std::size_t Watch::Layer::cells() const {
  return static_cast<std::size_t>(tensors[0]->ne[1] * tensors[0]->ne[2]);
}

std::size_t Watch::Layer::StreamOf(std::size_t cell) const {
  return cell / static_cast<std::size_t>(tensors[0]->ne[1]);
}

void Watch::Layer::DecodeRows(Tensor which, std::size_t first, std::size_t count,
                              char* rows) const {
  const ggml_tensor* const t = tensor(which);
  const std::size_t row = static_cast<std::size_t>(t->ne[0]);
  std::vector<float> numbers(std::min(count, kCellsAtATime) * row);
  for (std::size_t c = 0; c < count; ++c) {
    std::size_t n = 0;  // that follow on each other in one stream
    while (n < kCellsAtATime && c + n < count && mirror->Holds(first + c + n) &&
           StreamOf(first + c + n) == StreamOf(first + c)) {
      ++n;
    }
    if (n == 0) continue;
    mirror->Decode(which, first + c, n, numbers.data());
    for (std::size_t i = 0; i < n; ++i) {
      FromFloats(t->type, numbers.data() + i * row, rows + (c + i) * t->nb[1], t->ne[0]);
    }
    c += n - 1;
  }
}

void Watch::Layer::HandOver(std::size_t first, std::size_t count) {
  for (const Tensor t : {KVMIX_K, KVMIX_V}) {
    if (alone) DecodeRows(t, first, count, RowOf(tensor(t), first));
  }
  for (std::size_t s = StreamOf(first); s <= StreamOf(first + count - 1); ++s) empty[s] = false;
  mirror->Changed(first, count);
}

std::vector<char> Watch::Place::Read() const {
  const ggml_tensor* const t = layer->tensor(tensor);
  const char* const own = RowOf(t, first);
  std::vector<char> rows(own, own + count * t->nb[1]);
  layer->DecodeRows(tensor, first, count, rows.data());
  return rows;
}

Watch::Place Watch::Find(const void* data, std::size_t bytes) {
  const char* const at = static_cast<const char*>(data);
  for (Layer& layer : layers_) {
    for (const Tensor tensor : {KVMIX_K, KVMIX_V}) {
      const ggml_tensor* const t = layer.tensor(tensor);
      const char* const begin = static_cast<const char*>(t->data);
      if (at < begin || at >= begin + layer.cells() * t->nb[1]) continue;
      const std::size_t offset = static_cast<std::size_t>(at - begin);
      const std::size_t first = offset / t->nb[1];
      return {&layer, tensor, first, (offset + bytes - 1) / t->nb[1] - first + 1,
              offset - first * t->nb[1]};
    }
  }
  return {};
}

// ---- the buffers' functions

struct Watch::Hooks {
  static void Free(ggml_backend_buffer_t buffer) {
    Watch& w = *the_watch;
    const std::lock_guard lock(w.mutex_);
    const auto free_buffer = w.buffers_.at(buffer).free_buffer;
    w.buffers_.erase(buffer);
    w.layers_.remove_if([&](const Layer& l) { return l.IsIn(buffer); });
    free_buffer(buffer);
  }

  static void GetTensor(ggml_backend_buffer_t buffer, const ggml_tensor* t, void* data,
                        std::size_t offset, std::size_t size) {
    Watch& w = *the_watch;
    const std::lock_guard lock(w.mutex_);
    const Place at = w.Find(static_cast<const char*>(t->data) + offset, size);
    if (!at.is_away()) return w.buffers_.at(buffer).get_tensor(buffer, t, data, offset, size);
    std::memcpy(data, at.Read().data() + at.skip, size);
  }

  static void SetTensor(ggml_backend_buffer_t buffer, ggml_tensor* t, const void* data,
                        std::size_t offset, std::size_t size) {
    Watch& w = *the_watch;
    const std::lock_guard lock(w.mutex_);
    std::vector<char> rows;
    const Place from = w.Find(data, size);
    if (from.is_away()) {  // from stream to stream
      rows = from.Read();
      data = rows.data() + from.skip;
    }
    w.BeforeWrite(static_cast<char*>(t->data) + offset, size);
    w.buffers_.at(buffer).set_tensor(buffer, t, data, offset, size);
  }

  static void MemsetTensor(ggml_backend_buffer_t buffer, ggml_tensor* t, std::uint8_t value,
                           std::size_t offset, std::size_t size) {
    Watch& w = *the_watch;
    const std::lock_guard lock(w.mutex_);
    w.BeforeWrite(static_cast<char*>(t->data) + offset, size);
    w.buffers_.at(buffer).memset_tensor(buffer, t, value, offset, size);
  }

  // A copy from a buffer that is not the host's: ggml gets and sets instead.
  static bool CopyTensor(ggml_backend_buffer_t, const ggml_tensor*, ggml_tensor*) { return false; }

  static void Clear(ggml_backend_buffer_t buffer, std::uint8_t value) {
    Watch& w = *the_watch;
    const std::lock_guard lock(w.mutex_);
    bool alone = false;
    for (Layer& layer : w.layers_) {
      if (!layer.IsIn(buffer)) continue;
      alone |= layer.alone;
      layer.mirror->Changed(0, layer.cells());
      layer.empty.assign(layer.empty.size(), value == 0);
    }
    if (!alone || value != 0) return w.buffers_.at(buffer).clear(buffer, value);
    Empty(static_cast<char*>(ggml_backend_buffer_get_base(buffer)),
          ggml_backend_buffer_get_size(buffer));
  }
};

void Watch::Hook(ggml_backend_buffer_t buffer) {
  if (!buffers_.emplace(buffer, buffer->iface).second) return;
  buffer->iface.free_buffer = Hooks::Free;
  buffer->iface.get_tensor = Hooks::GetTensor;
  buffer->iface.set_tensor = Hooks::SetTensor;
  buffer->iface.memset_tensor = Hooks::MemsetTensor;
  buffer->iface.get_tensor_2d = nullptr;  // ggml takes the others, row by row
  buffer->iface.set_tensor_2d = nullptr;
  buffer->iface.cpy_tensor = Hooks::CopyTensor;
  buffer->iface.clear = Hooks::Clear;
}

void Watch::BeforeWrite(const void* data, std::size_t bytes) {
  const Place at = Find(data, bytes);
  if (at.layer != nullptr) at.layer->HandOver(at.first, at.count);
}

// ---- what the back-ends call

Watch::Watch() { the_watch = this; }

void Watch::Add(Mirror* mirror, ggml_tensor* k, ggml_tensor* v, bool alone) {
  const std::lock_guard lock(mutex_);
  layers_.push_back({mirror, {k, v}, alone, std::vector<bool>(static_cast<std::size_t>(k->ne[2]))});
  Hook(k->buffer);
  Hook(v->buffer);
}

void Watch::Remove(Mirror* mirror) {
  const std::lock_guard lock(mutex_);
  layers_.remove_if([&](const Layer& l) { return l.mirror == mirror; });
}

bool Watch::IsGivenBack(const ggml_tensor* tensor) {
  const std::lock_guard lock(mutex_);
  return tensor != nullptr && tensor->data != nullptr && Find(tensor->data, 1).is_away();
}

void Watch::GiveBack(Mirror* mirror, std::size_t first_stream, std::size_t streams) {
  const std::lock_guard lock(mutex_);
  for (Layer& layer : layers_) {
    if (layer.mirror != mirror || !layer.alone) continue;
    for (std::size_t s = first_stream; s < first_stream + streams; ++s) {
      if (layer.empty[s]) continue;
      layer.empty[s] = true;
      for (const ggml_tensor* t : layer.tensors) {
        Empty(static_cast<char*>(t->data) + s * t->nb[2], t->nb[2]);
      }
    }
  }
}

void Watch::Restore(const ggml_tensor* tensor) {
  const std::lock_guard lock(mutex_);
  const Place at = Find(tensor->data, 1);
  if (at.is_away()) at.layer->HandOver(0, at.layer->cells());
}

}  // namespace kvmix::llama
