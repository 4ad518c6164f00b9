// A server's sequences: a pool with a bound, a prompt that is forked, one append and one attention
// for all sequences of a step, and an eviction when the pool is full.
//   c++ -std=c++20 sequences.cc $(pkg-config --cflags --libs kvmix) -o sequences && ./sequences
#include <cstddef>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include <kvmix/attention.h>
#include <kvmix/cache.h>
#include <kvmix/plan.h>

namespace {

constexpr std::size_t kKvHeads = 2, kQueryHeads = 8, kDim = 64;
constexpr std::size_t kSequences = 6, kPrompt = 300, kSteps = 300;

using kvmix::RowsView, kvmix::Status;

// Rows that a model would compute.
std::vector<float> Rows(std::size_t tokens, std::size_t heads) {
  static std::minstd_rand random(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> x(tokens * heads * kDim);
  for (float& number : x) number = uniform(random);
  return x;
}

// One token of every sequence, each with rows of its own, through the one layer.
Status Step(std::vector<kvmix::Cache>& sequences, std::vector<float>& out) {
  const std::size_t n = sequences.size();
  const std::vector<float> k = Rows(n, kKvHeads), v = Rows(n, kKvHeads), q = Rows(n, kQueryHeads);
  const RowsView all_k = RowsView::F32(k.data(), n, kKvHeads, kDim),
                 all_v = RowsView::F32(v.data(), n, kKvHeads, kDim),
                 all_q = RowsView::F32(q.data(), n, kQueryHeads, kDim);
  out.resize(q.size());
  std::vector<kvmix::AppendRequest> appends;
  std::vector<kvmix::AttendRequest> attends;
  for (std::size_t s = 0; s < n; ++s) {
    appends.emplace_back(&sequences[s], all_k.Tokens(s, 1), all_v.Tokens(s, 1));
    attends.emplace_back(&sequences[s], all_q.Tokens(s, 1), out.data() + s * kQueryHeads * kDim);
  }
  if (Status appended = kvmix::Append(appends, 0); !appended.ok()) return appended;
  return kvmix::Attend(attends, 0);  // pages that sequences share are read once
}

Status Serve(const kvmix::Pool& pool) {
  kvmix::Result<kvmix::Cache> prompt = kvmix::Cache::Create(pool, 4096);
  if (!prompt.ok()) return prompt.status();
  const std::vector<float> k = Rows(kPrompt, kKvHeads), v = Rows(kPrompt, kKvHeads);
  const Status prefilled = prompt->Append(0, RowsView::F32(k.data(), kPrompt, kKvHeads, kDim),
                                          RowsView::F32(v.data(), kPrompt, kKvHeads, kDim));
  if (!prefilled.ok()) return prefilled;

  std::vector<kvmix::Cache> sequences;
  for (std::size_t s = 0; s < kSequences; ++s) {
    kvmix::Result<kvmix::Cache> fork = prompt->Fork();
    if (!fork.ok()) return fork.status();
    sequences.push_back(*std::move(fork));
  }
  std::printf("%zu sequences of %zu tokens in %zu bytes\n", kSequences, kPrompt, pool.bytes());

  std::vector<float> out;
  std::size_t evicted = 0;
  for (std::size_t step = 0; step < kSteps;) {
    const Status done = Step(sequences, out);
    if (done.ok()) {
      ++step;
    } else if (done.code() == kvmix::ErrorCode::kPoolFull && sequences.size() > 1) {
      sequences.pop_back();  // its pages go back, and the step is tried again
      ++evicted;
    } else {
      return done;
    }
  }
  std::printf("%zu sequences of %zu tokens in %zu of %zu bytes, %zu evicted, first output %.4f\n",
              sequences.size(), sequences[0].tokens(0), pool.bytes(), pool.most_bytes(), evicted,
              static_cast<double>(out[0]));
  return {};
}

}  // namespace

int main() {
  const kvmix::HeadCodec int8{kvmix::ParseCodecKind("i8-token+hadamard").value()};
  const kvmix::Geometry shape{
      .layers = 1, .kv_heads = kKvHeads, .query_heads = kQueryHeads, .head_dim = kDim};
  kvmix::PoolOptions options;
  options.bytes = 700 << 10;
  const kvmix::Result<kvmix::Pool> pool =
      kvmix::Pool::Create(kvmix::UniformPlan(shape, int8, int8), options);
  const Status done = pool.ok() ? Serve(*pool) : pool.status();
  if (done.ok()) return 0;
  std::fprintf(stderr, "%s\n", done.message().c_str());
  return 1;
}
