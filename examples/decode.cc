// One sequence of a model: a prompt in one call (prefill), tokens one by one (decode), and drafts
// of four tokens that are checked in one call and taken back in part (speculative decoding).
//   c++ -std=c++20 decode.cc $(pkg-config --cflags --libs kvmix) -o decode && ./decode
#include <cstddef>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include <kvmix/attention.h>
#include <kvmix/cache.h>
#include <kvmix/plan.h>

namespace {

constexpr std::size_t kPrompt = 100, kDraft = 4, kRounds = 8;

// Stands for the model: K, V and Q of some tokens, all random.
class Model {
 public:
  explicit Model(const kvmix::Geometry& shape) : shape_(shape) {}

  // Tokens of one layer: their K and V go into the cache, and their queries see these and all
  // before them.
  kvmix::Status Forward(kvmix::Cache& cache, std::size_t layer, std::size_t tokens) {
    const std::vector<float> k = Rows(tokens * shape_.kv_heads * shape_.head_dim),
                             v = Rows(k.size()),
                             q = Rows(tokens * shape_.query_heads * shape_.head_dim);
    const auto rows = [&](const std::vector<float>& x, std::size_t heads) {
      return kvmix::RowsView::F32(x.data(), tokens, heads, shape_.head_dim);
    };
    kvmix::Status done = cache.Append(layer, rows(k, shape_.kv_heads), rows(v, shape_.kv_heads));
    if (!done.ok()) return done;
    out_.resize(q.size());
    return kvmix::Attend(cache, layer, rows(q, shape_.query_heads), out_.data());
  }
  // The same through all layers.
  kvmix::Status Forward(kvmix::Cache& cache, std::size_t tokens) {
    for (std::size_t layer = 0; layer < shape_.layers; ++layer) {
      if (kvmix::Status s = Forward(cache, layer, tokens); !s.ok()) return s;
    }
    return {};
  }
  float first_output() const { return out_[0]; }

 private:
  std::vector<float> Rows(std::size_t n) {
    std::vector<float> x(n);
    for (float& number : x) number = uniform_(random_);
    return x;
  }

  kvmix::Geometry shape_;
  std::minstd_rand random_{1};
  std::uniform_real_distribution<float> uniform_{-1.0f, 1.0f};
  std::vector<float> out_;  // [tokens, query_heads, head_dim] of the last layer
};

kvmix::Status Generate(const kvmix::Geometry& shape, kvmix::Cache& cache) {
  Model model(shape);
  if (kvmix::Status s = model.Forward(cache, kPrompt); !s.ok()) return s;
  std::printf("prompt: %zu tokens\n", cache.tokens(0));
  for (std::size_t round = 0; round < kRounds; ++round) {
    // One token as always, and a draft of four in one call, of which the model would have written
    // `accepted` itself. The others go.
    if (kvmix::Status s = model.Forward(cache, 1); !s.ok()) return s;
    if (kvmix::Status s = model.Forward(cache, kDraft); !s.ok()) return s;
    const std::size_t accepted = round % (kDraft + 1);
    if (kvmix::Status s = cache.Truncate(cache.tokens(0) - kDraft + accepted); !s.ok()) return s;
  }
  std::printf("%zu tokens, first output %.4f\n", cache.tokens(0),
              static_cast<double>(model.first_output()));
  return {};
}

}  // namespace

int main() {
  const kvmix::Geometry shape{.layers = 4, .kv_heads = 8, .query_heads = 32, .head_dim = 64};
  const kvmix::Plan plan = kvmix::DefaultPlan(shape);  // or kvmix::LoadPlan("plan.json")
  kvmix::Result<kvmix::Cache> cache = kvmix::Cache::Create(plan, 4096);
  const kvmix::Status done = cache.ok() ? Generate(shape, *cache) : cache.status();
  if (!done.ok()) {
    std::fprintf(stderr, "%s\n", done.message().c_str());
    return 1;
  }
  std::printf("%.1f %% of the fp16 bytes saved\n", 100.0 * kvmix::SavedFraction(plan));
}
