// Graphs as llama.cpp builds them, through kvmix and the CPU, against the CPU alone.
//   GGML_BACKEND_PATH: libggml-kvmix.so. The KVMIX_* settings hold as ever; with KVMIX_CODEC=f16
//   the outputs are alike to f16's rounding, otherwise to int8's.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

struct Shape {
  std::int64_t k_dim = 64, v_dim = 64, heads = 4, kv_heads = 2, cells = 256, streams = 1;
  ggml_type type = GGML_TYPE_F16;
  float max_bias = 0.0f, soft_cap = 0.0f;
  bool sinks = false;
};

// What a graph computes: tokens of each stream are written to cells, and queries see by a mask.
struct Step {
  std::int64_t first_stream, streams;
  std::vector<std::int64_t> cells;  // over all streams; as many for each
  std::int64_t seen;                // cells of a stream that the mask has
  std::vector<float> k, v, q, mask;
};

// Kept for the length of a process: its settings are read once.
ggml_backend_dev_t TheDevice() {
  static const ggml_backend_dev_t device = [] {
    if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr) {
      ggml_backend_register(ggml_backend_cpu_reg());  // as engines do that load their back-ends
    }
    const char* const path = std::getenv("GGML_BACKEND_PATH");
    const ggml_backend_reg_t reg = path != nullptr ? ggml_backend_load(path) : nullptr;
    return reg != nullptr ? ggml_backend_reg_dev_get(reg, 0) : nullptr;
  }();
  return device;
}

bool IsOn(const char* variable) {
  const char* const value = std::getenv(variable);
  return value != nullptr && std::string(value) == "1";
}

ggml_context_ptr NewContext(std::size_t tensors) {
  return ggml_context_ptr(
      ggml_init({tensors * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true}));
}

// A KV cache of one layer, and what computes over it.
class Engine {
 public:
  Engine(const Shape& shape, bool with_kvmix) : s_(shape), memory_(NewContext(4)) {
    if (with_kvmix) {
      kvmix_.reset(ggml_backend_dev_init(TheDevice(), nullptr));
      backends_.push_back(kvmix_.get());
    }
    cpu_.reset(ggml_backend_cpu_init());
    backends_.push_back(cpu_.get());
    sched_.reset(ggml_backend_sched_new(backends_.data(), nullptr,
                                        static_cast<int>(backends_.size()), GGML_DEFAULT_GRAPH_SIZE,
                                        false, true));
    const auto add = [&](std::int64_t channels, const char* name) {
      ggml_tensor* const t =
          ggml_new_tensor_3d(memory_.get(), s_.type, channels, s_.cells, s_.streams);
      ggml_set_name(t, name);
      return t;
    };
    k_ = add(s_.k_dim * s_.kv_heads, "cache_k_l0");
    v_ = add(s_.v_dim * s_.kv_heads, "cache_v_l0");
    buffer_.reset(
        ggml_backend_alloc_ctx_tensors_from_buft(memory_.get(), ggml_backend_cpu_buffer_type()));
    ggml_backend_buffer_clear(buffer_.get(), 0);
  }

  ggml_tensor* k() const { return k_; }
  ggml_tensor* v() const { return v_; }
  ggml_backend_buffer_t buffer() const { return buffer_.get(); }

  std::vector<float> Run(const Step& step) {
    const ggml_context_ptr context = NewContext(64);
    ggml_context* const c = context.get();
    const std::int64_t tokens = static_cast<std::int64_t>(step.cells.size());
    const std::int64_t queries = tokens / step.streams;
    std::vector<std::function<void()>> fill;
    const auto input = [&](ggml_type type, std::array<std::int64_t, 4> ne, const void* data) {
      ggml_tensor* const t = ggml_new_tensor(c, type, 4, ne.data());
      ggml_set_input(t);
      fill.push_back([t, data] { ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t)); });
      return t;
    };
    ggml_cgraph* const graph = ggml_new_graph(c);
    ggml_tensor* const cells = input(GGML_TYPE_I64, {tokens, 1, 1, 1}, step.cells.data());
    const auto store = [&](ggml_tensor* to, const std::vector<float>& rows) {
      ggml_tensor* const from = input(GGML_TYPE_F32, {to->ne[0], tokens, 1, 1}, rows.data());
      ggml_tensor* const flat = ggml_reshape_2d(c, to, to->ne[0], s_.cells * s_.streams);
      ggml_build_forward_expand(graph, ggml_set_rows(c, flat, from, cells));
    };
    store(k_, step.k);
    store(v_, step.v);
    const auto view = [&](ggml_tensor* t, std::int64_t dim) {
      ggml_tensor* x =
          ggml_view_4d(c, t, dim, s_.kv_heads, step.seen, step.streams, ggml_row_size(t->type, dim),
                       t->nb[1], t->nb[2], static_cast<std::size_t>(step.first_stream) * t->nb[2]);
      x = ggml_permute(c, x, 0, 2, 1, 3);
      return t->type == GGML_TYPE_F32 ? ggml_cast(c, x, GGML_TYPE_F16) : x;
    };
    ggml_tensor* q =
        input(GGML_TYPE_F32, {s_.k_dim, s_.heads, queries, step.streams}, step.q.data());
    q = ggml_permute(c, q, 0, 2, 1, 3);
    std::vector<ggml_fp16_t> halves(step.mask.size());
    ggml_fp32_to_fp16_row(step.mask.data(), halves.data(),
                          static_cast<std::int64_t>(halves.size()));
    ggml_tensor* const mask =
        input(GGML_TYPE_F16, {step.seen, queries, 1, step.streams}, halves.data());
    ggml_tensor* const out = ggml_flash_attn_ext(c, q, view(k_, s_.k_dim), view(v_, s_.v_dim), mask,
                                                 1.0f / std::sqrt(static_cast<float>(s_.k_dim)),
                                                 s_.max_bias, s_.soft_cap);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    const std::vector<float> sinks{0.5f, -1.0f, 2.0f, 0.0f, 1.0f, -3.0f, 0.25f, 1.5f};
    if (s_.sinks) {
      ggml_flash_attn_ext_add_sinks(out, input(GGML_TYPE_F32, {s_.heads, 1, 1, 1}, sinks.data()));
    }
    ggml_set_output(out);
    ggml_build_forward_expand(graph, out);
    return Compute(graph, out, fill);
  }

  // A context shift: K of all cells turns by some positions.
  void Shift(std::int32_t positions) {
    const ggml_context_ptr context = NewContext(8);
    ggml_context* const c = context.get();
    ggml_cgraph* const graph = ggml_new_graph(c);
    const std::int64_t cells = s_.cells * s_.streams;
    ggml_tensor* const at = ggml_new_tensor_1d(c, GGML_TYPE_I32, cells);
    ggml_set_input(at);
    ggml_tensor* const heads = ggml_view_3d(c, k_, s_.k_dim, s_.kv_heads, cells,
                                            ggml_row_size(k_->type, s_.k_dim), k_->nb[1], 0);
    ggml_build_forward_expand(
        graph,
        ggml_rope_ext_inplace(c, heads, at, nullptr, static_cast<int>(s_.k_dim),
                              GGML_ROPE_TYPE_NEOX, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f));
    const std::vector<std::int32_t> numbers(static_cast<std::size_t>(cells), positions);
    Compute(graph, nullptr,
            {[&] { ggml_backend_tensor_set(at, numbers.data(), 0, ggml_nbytes(at)); }});
  }

  ggml_backend_t attended() const { return attended_; }

 private:
  std::vector<float> Compute(ggml_cgraph* graph, ggml_tensor* out,
                             const std::vector<std::function<void()>>& fill) {
    ggml_backend_sched_reset(sched_.get());
    EXPECT_TRUE(ggml_backend_sched_alloc_graph(sched_.get(), graph));
    for (const auto& f : fill) f();
    EXPECT_EQ(ggml_backend_sched_graph_compute(sched_.get(), graph), GGML_STATUS_SUCCESS);
    if (out == nullptr) return {};
    attended_ = ggml_backend_sched_get_tensor_backend(sched_.get(), out);
    std::vector<float> numbers(static_cast<std::size_t>(ggml_nelements(out)));
    ggml_backend_tensor_get(out, numbers.data(), 0, ggml_nbytes(out));
    return numbers;
  }

  Shape s_;
  ggml_context_ptr memory_;
  ggml_tensor *k_, *v_;
  ggml_backend_buffer_ptr buffer_;
  ggml_backend_ptr kvmix_, cpu_;
  std::vector<ggml_backend_t> backends_;
  ggml_backend_sched_ptr sched_;
  ggml_backend_t attended_ = nullptr;
};

using See = std::function<float(std::int64_t query, std::int64_t cell)>;

class Pair {
 public:
  explicit Pair(const Shape& shape) : s_(shape), cpu_(shape, false), both_(shape, true) {}

  // Rows for these cells; query i of a stream sees cell c of it by see(i, c).
  void Run(std::vector<std::int64_t> cells, std::int64_t seen, const See& see,
           std::int64_t first_stream = 0, std::int64_t streams = 1) {
    const std::size_t n = cells.size(), heads = static_cast<std::size_t>(s_.heads);
    Step step{first_stream, streams, std::move(cells), seen, {}, {}, {}, {}};
    const auto size = [](std::int64_t x) { return static_cast<std::size_t>(x); };
    step.k = Random(n * size(s_.k_dim * s_.kv_heads));
    step.v = Random(n * size(s_.v_dim * s_.kv_heads));
    step.q = Random(n * heads * size(s_.k_dim));
    const std::int64_t queries = static_cast<std::int64_t>(n) / streams;
    for (std::int64_t s = 0; s < streams; ++s) {
      for (std::int64_t i = 0; i < queries; ++i) {
        for (std::int64_t c = 0; c < seen; ++c) step.mask.push_back(see(i, c));
      }
    }
    const std::vector<float> expected = cpu_.Run(step), found = both_.Run(step);
    EXPECT_STREQ(ggml_backend_name(both_.attended()), "KVMIX");
    double error = 0.0, sum = 0.0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      error += std::pow(static_cast<double>(found[i]) - expected[i], 2.0);
      sum += std::pow(static_cast<double>(expected[i]), 2.0);
    }
    const char* const codec = std::getenv("KVMIX_CODEC");
    const bool is_f16 = codec != nullptr && std::string(codec) == "f16";
    EXPECT_GT(sum, 0.0);
    // An engine's q8_0 is an error of the CPU's, which kvmix does not make.
    const double bound = s_.type == GGML_TYPE_Q8_0 ? 1e-3 : is_f16 ? 1e-5 : 5e-4;
    EXPECT_LT(error, bound * sum);
  }
  void Causal(std::int64_t first, std::int64_t count) {
    std::vector<std::int64_t> cells;
    for (std::int64_t c = first; c < first + count; ++c) cells.push_back(c);
    Run(cells, std::min((first + count + 31) / 32 * 32, s_.cells),
        [&](std::int64_t i, std::int64_t c) { return c <= first + i ? 0.0f : kHidden; });
  }

  Engine& cpu() { return cpu_; }
  Engine& both() { return both_; }

 private:
  std::vector<float> Random(std::size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float& number : x) number = normal(rng_);
    return x;
  }

  Shape s_;
  Engine cpu_, both_;
  std::mt19937 rng_{5};
};

class Graph : public testing::Test {
 protected:
  void SetUp() override {
    if (TheDevice() == nullptr) GTEST_FAIL() << "GGML_BACKEND_PATH names no plug-in that loads";
  }
};

TEST_F(Graph, ShapesAndTypes) {
  std::vector<Shape> shapes;
  for (const std::int64_t dim : {64, 80, 96, 128, 256, 512}) {
    shapes.push_back({.k_dim = dim, .v_dim = dim});
  }
  shapes.push_back({.k_dim = 192, .v_dim = 128});
  shapes.push_back({.heads = 4, .kv_heads = 4});
  shapes.push_back({.heads = 8, .kv_heads = 1});
  shapes.push_back({.heads = 7, .kv_heads = 1});
  shapes.push_back({.type = GGML_TYPE_BF16});
  shapes.push_back({.type = GGML_TYPE_Q8_0});
  if (!IsOn("KVMIX_MEMORY")) shapes.push_back({.type = GGML_TYPE_F32});
  for (const Shape& s : shapes) {
    SCOPED_TRACE(testing::Message() << s.k_dim << " x " << s.v_dim << ", " << s.heads << " / "
                                    << s.kv_heads << ", " << ggml_type_name(s.type));
    Pair p(s);
    p.Causal(0, 70);
    p.Causal(70, 1);
    p.Causal(71, 33);
    p.Causal(104, 1);
  }
}

TEST_F(Graph, BiasesCapsAndSinks) {
  for (const float max_bias : {0.0f, 8.0f}) {
    for (const float soft_cap : {0.0f, 20.0f}) {
      for (const bool sinks : {false, true}) {
        Pair p({.heads = 8, .max_bias = max_bias, .soft_cap = soft_cap, .sinks = sinks});
        const auto alibi = [](std::int64_t i, std::int64_t c) {
          return c <= i ? -static_cast<float>(i - c) : kHidden;
        };
        std::vector<std::int64_t> cells;
        for (std::int64_t c = 0; c < 40; ++c) cells.push_back(c);
        p.Run(cells, 64, alibi);
        p.Run({40}, 64, [&](std::int64_t, std::int64_t c) { return alibi(40, c); });
      }
    }
  }
}

// Sequences in a unified cache, windows, tokens that see what comes after them.
TEST_F(Graph, AnyMask) {
  Pair p({});
  p.Causal(0, 100);
  p.Run({100, 101, 102}, 128, [](std::int64_t i, std::int64_t c) {
    return (c < 103 && c % 3 == i) || c == 100 + i ? 0.0f : kHidden;
  });
  p.Run({7, 50, 110, 3}, 128, [](std::int64_t i, std::int64_t c) {  // cells are free again
    return c == 7 || (c > 20 * i && c < 20 * i + 30) ? 0.0f : kHidden;
  });
  p.Run({120, 121}, 128, [](std::int64_t i, std::int64_t c) {
    return c >= 60 + i && c < 122 && (c < 103 || c >= 120) ? 0.0f : kHidden;
  });
  p.Run({200, 201, 202}, 256,
        [](std::int64_t, std::int64_t c) { return c >= 200 && c < 203 ? 0.0f : kHidden; });
}

TEST_F(Graph, Streams) {
  Pair p({.cells = 128, .streams = 4});
  const auto causal = [](std::int64_t first) {
    return [first](std::int64_t i, std::int64_t c) { return c <= first + i ? 0.0f : kHidden; };
  };
  const auto cells = [](std::vector<std::int64_t> streams, std::int64_t first, std::int64_t n) {
    std::vector<std::int64_t> all;
    for (const std::int64_t s : streams) {
      for (std::int64_t c = first; c < first + n; ++c) all.push_back(128 * s + c);
    }
    return all;
  };
  p.Run(cells({2}, 0, 30), 32, causal(0), 2);
  p.Run(cells({0, 1}, 0, 20), 32, causal(0), 0, 2);
  p.Run(cells({3}, 0, 30), 32, causal(0), 3);
  p.Run(cells({2, 3}, 30, 1), 32, causal(30), 2, 2);
  p.Run(
      cells({0, 1, 2, 3}, 31, 2), 64,
      [](std::int64_t i, std::int64_t c) {
        return c < 20 || (c >= 31 && c <= 31 + i) ? 0.0f : kHidden;
      },
      0, 4);
}

// What an engine does to its cache outside of attention.
TEST_F(Graph, StatesShiftsAndClears) {
  Pair p({.cells = 128, .streams = 2});
  const auto both = [&](const std::function<void(Engine&)>& f) {
    f(p.cpu());
    f(p.both());
  };
  p.Causal(0, 60);
  // A saved state: what the engine gets is what it had, up to the codec.
  std::vector<ggml_fp16_t> expected(60 * 128), found(60 * 128);
  ggml_backend_tensor_get(p.cpu().k(), expected.data(), 0, expected.size() * 2);
  ggml_backend_tensor_get(p.both().k(), found.data(), 0, found.size() * 2);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(ggml_fp16_to_fp32(found[i]), ggml_fp16_to_fp32(expected[i]), 0.05) << i;
  }
  // It is read into other cells, and a part of a row is written.
  both([&](Engine& e) {
    for (ggml_tensor* t : {e.k(), e.v()}) {
      ggml_backend_tensor_set(t, expected.data(), 70 * t->nb[1], 20 * t->nb[1]);
      ggml_backend_tensor_set(t, expected.data(), 3 * t->nb[1] + 10, 20);
    }
  });
  p.Run({90}, 96, [](std::int64_t, std::int64_t c) {
    return c <= 60 || (c >= 70 && c <= 90) ? 0.0f : kHidden;
  });
  // A sequence is copied into another stream.
  both([&](Engine& e) {
    for (ggml_tensor* t : {e.k(), e.v()}) {
      ggml_backend_tensor_set(t, t->data, t->nb[2], t->nb[2]);
    }
  });
  p.Run(
      {128 + 91}, 96,
      [](std::int64_t, std::int64_t c) { return c < 60 || (c >= 70 && c <= 91) ? 0.0f : kHidden; },
      1);
  both([](Engine& e) { e.Shift(-5); });
  p.Run({92}, 96, [](std::int64_t, std::int64_t c) {
    return c < 60 || (c >= 70 && c <= 90) || c == 92 ? 0.0f : kHidden;
  });
  both([](Engine& e) {
    ggml_backend_tensor_memset(e.k(), 0, 0, 10 * e.k()->nb[1]);
    ggml_backend_tensor_memset(e.v(), 0, 0, 10 * e.v()->nb[1]);
  });
  p.Run({93}, 96,
        [](std::int64_t, std::int64_t c) { return c < 60 || c == 92 || c == 93 ? 0.0f : kHidden; });
  both([](Engine& e) { ggml_backend_buffer_clear(e.buffer(), 0); });
  p.Causal(0, 20);
}

}  // namespace
