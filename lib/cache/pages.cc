#include "lib/cache/pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "lib/cache/round.h"

namespace kvmix::internal {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kChunk = 16 * kHugePage;
// Unused memory that is kept for the next page: this fraction of what is in use, or this much.
constexpr std::size_t kKeptFraction = 8, kKeptBytes = std::size_t{1} << 20;

// Has the system map memory that is about to be written, at a tenth of what a fault for each 4 KiB
// costs. Where it cannot, the faults come.
void Populate([[maybe_unused]] std::uint8_t* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  madvise(memory, bytes, MADV_POPULATE_WRITE);
#endif
}

}  // namespace

PageMemory::~PageMemory() {
  for (const Chunk& chunk : chunks_) munmap(chunk.memory, chunk.bytes);
}

std::size_t PageMemory::AddKind(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  kinds_.push_back({RoundUp(bytes, 4096), nullptr, nullptr});
  return kinds_.size() - 1;
}

std::size_t PageMemory::page_bytes(std::size_t kind) const {
  const std::lock_guard lock(mutex_);
  return kinds_[kind].bytes;
}

// Memory that was never used, all zeros; null if the system has none.
std::uint8_t* PageMemory::Carve(std::size_t bytes) {
  if (chunks_.empty() || chunks_.back().bytes - carved_ < bytes) {
    const std::size_t size = RoundUp(std::max(bytes, kChunk), kHugePage);
    void* p = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    std::uint8_t* const start = static_cast<std::uint8_t*>(p);
    madvise(p, size + kHugePage, MADV_HUGEPAGE);  // a wish; a few percent of decode speed
    chunks_.push_back({start, size + kHugePage});
    carved_ = RoundUp(reinterpret_cast<std::uintptr_t>(start), kHugePage) -
              reinterpret_cast<std::uintptr_t>(start);
  }
  std::uint8_t* const memory = chunks_.back().memory + carved_;
  carved_ += bytes;
  return memory;
}

Page* PageMemory::Get(std::size_t kind) {
  const std::lock_guard lock(mutex_);
  Kind& k = kinds_[kind];
  if (k.bytes > most_ - std::min(most_, used())) return nullptr;
  Page* page = nullptr;
  if (k.dirty != nullptr) {
    page = std::exchange(k.dirty, k.dirty->next);
    dirty_ -= k.bytes;
  } else if (k.clean != nullptr) {
    page = std::exchange(k.clean, k.clean->next);
    Populate(page->memory, k.bytes);
  } else if (std::uint8_t* memory = Carve(k.bytes)) {
    pages_.push_back(std::make_unique<Page>());
    page = pages_.back().get();
    page->memory = memory;
    page->kind = kind;
    Populate(memory, k.bytes);
  } else {
    return nullptr;
  }
  page->users.store(1, std::memory_order_relaxed);
  used_.fetch_add(k.bytes, std::memory_order_relaxed);
  return page;
}

void PageMemory::Release(Page* page) {
  if (page->users.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::lock_guard lock(mutex_);
  Kind& k = kinds_[page->kind];
  page->next = std::exchange(k.dirty, page);
  dirty_ += k.bytes;
  used_.fetch_sub(k.bytes, std::memory_order_relaxed);
  if (used() == 0 || dirty_ > std::max(used() / kKeptFraction, kKeptBytes)) GiveBack();
}

void PageMemory::GiveBack() {
  for (Kind& k : kinds_) {
    while (k.dirty != nullptr) {
      Page* const page = std::exchange(k.dirty, k.dirty->next);
      madvise(page->memory, k.bytes, MADV_DONTNEED);
      page->next = std::exchange(k.clean, page);
    }
  }
  // A huge page can reach beyond the pages.
  for (const Chunk& chunk : chunks_) {
    if (used() == 0) madvise(chunk.memory, chunk.bytes, MADV_DONTNEED);
  }
  dirty_ = 0;
}

}  // namespace kvmix::internal
