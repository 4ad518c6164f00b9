// Parts of a job on OpenMP's threads.
#ifndef KVMIX_LIB_CACHE_PARALLEL_H_
#define KVMIX_LIB_CACHE_PARALLEL_H_

#include <cstddef>

#include "kvmix/status.h"

namespace kvmix::internal {

// Not negative.
Status CheckThreads(int num_threads);

// Threads for `parts` pieces of work. num_threads 0: as many as this process may use. 1 in the
// child of a fork, where OpenMP would wait for threads that are not there.
int ThreadsFor(int num_threads, std::size_t parts);

// run(0), ..., run(parts - 1) on that many threads, which take `chunk` neighbouring ones at a time.
// One thread does not touch OpenMP.
template <class Run>
void RunParts(std::size_t parts, int threads, std::size_t chunk, const Run& run) {
  if (threads <= 1) {
    for (std::size_t p = 0; p < parts; ++p) run(p);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (std::size_t p = 0; p < parts; ++p) run(p);
}

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_PARALLEL_H_
