// Dumps of random numbers with the shape and the faults of real ones.
#ifndef KVMIX_TESTS_SYNTHETIC_DUMP_H_
#define KVMIX_TESTS_SYNTHETIC_DUMP_H_

#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dump_files.h"
#include "kvmix/half.h"
#include "kvmix/model.h"
#include "kvmix/tune/dump.h"

namespace kvmix::testing {

// Windows, caps, sinks and a scale; values narrower than keys; a layer without K and V, and two
// whose queries judge another's codecs.
inline Model UnlikeModel() {
  return Model({{.kv_heads = 1, .query_heads = 2, .k_dim = 16, .v_dim = 16, .window = 8},
                {.kv_heads = 2,
                 .query_heads = 4,
                 .k_dim = 24,
                 .v_dim = 16,
                 .attention_scale = 0.5f,
                 .sinks = {1.0f, -1.0f, 0.5f, 2.0f}},
                {},
                {.kv_heads = 1, .query_heads = 3, .k_dim = 16, .v_dim = 16, .kv_layer = 0},
                {.kv_heads = 2,
                 .query_heads = 2,
                 .k_dim = 24,
                 .v_dim = 16,
                 .window = 3,
                 .soft_cap = 2.0f,
                 .kv_layer = 1}});
}

struct SyntheticDump {
  Model model;
  std::vector<std::size_t> prompt_tokens;
  std::uint32_t seed = 1;
  // Tokens are normal, times exp(norm_spread * normal) of their own.
  double norm_spread = 0.0;
  double query_norm = 1.0;
  // K heads (layer, KV head) with an offset on some channels that is the same for all tokens: what
  // the bias of Qwen's K projection does.
  std::set<std::pair<std::size_t, std::size_t>> outliers = {};
  double offset = 60.0;

  std::size_t tokens() const {
    std::size_t sum = 0;
    for (const std::size_t n : prompt_tokens) sum += n;
    return sum;
  }

  // As a safetensors file.
  void Write(const std::string& path) const {
    std::mt19937 random(seed);
    tune::DumpWriter writer(path);
    for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
      const LayerShape& shape = model.layers[layer];
      std::vector<Half> numbers[3];  // of k, q and v
      RowsView rows[3];
      for (std::size_t i = 0; i < 3; ++i) {
        const char tensor = "kqv"[i];
        if (tensor == 'q' ? !shape.has_kv() : !shape.owns_kv()) continue;
        numbers[i] = Rows(layer, tensor, &random);
        rows[i] = RowsView::F16(numbers[i].data(), tokens(),
                                tensor == 'q' ? shape.query_heads : shape.kv_heads,
                                tensor == 'v' ? shape.v_dim : shape.k_dim);
      }
      EXPECT_TRUE(writer.Add(layer, rows[0], rows[2], rows[1]).ok());
    }
    const Status s = writer.Finish({model, prompt_tokens, "synthetic", ""});
    EXPECT_TRUE(s.ok()) << s.message();
  }

 private:
  std::vector<Half> Rows(std::size_t layer, char tensor, std::mt19937* random) const {
    std::normal_distribution<double> normal;
    std::vector<Half> rows;
    const LayerShape& shape = model.layers[layer];
    const std::size_t heads = tensor == 'q' ? shape.query_heads : shape.kv_heads;
    for (std::size_t t = 0; t < tokens(); ++t) {
      for (std::size_t h = 0; h < heads; ++h) {
        const double norm =
            (tensor == 'q' ? query_norm : 1.0) * std::exp(norm_spread * normal(*random));
        const bool biased = tensor == 'k' && outliers.contains({layer, h});
        for (std::size_t c = 0; c < (tensor == 'v' ? shape.v_dim : shape.k_dim); ++c) {
          const double bias =
              biased && c % 16 == (layer + h) % 16 ? (c % 32 < 16 ? offset : -offset) : 0.0;
          rows.push_back(FloatToHalf(static_cast<float>(norm * normal(*random) + bias)));
        }
      }
    }
    return rows;
  }
};

}  // namespace kvmix::testing

#endif  // KVMIX_TESTS_SYNTHETIC_DUMP_H_
