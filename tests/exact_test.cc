// Attention over rows of halves, kernels/exact.h, on every target, against double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kvmix/half.h"

namespace kvmix::kernels {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

struct Shape {
  std::size_t rows, tokens, k_dim, v_dim;
};

struct Case {
  Shape shape;
  std::vector<Half> k, v;
  Floats k_scale, v_scale;  // or empty
  Floats q, added;
  float scale, soft_cap = 0.0f;
};

Floats Normal(std::mt19937& rng, std::size_t n) {
  std::normal_distribution<float> normal;
  Floats x(n);
  for (float& f : x) f = normal(rng);
  return x;
}
std::vector<Half> NormalHalves(std::mt19937& rng, std::size_t n) {
  std::vector<Half> halves;
  for (const float x : Normal(rng, n)) halves.push_back(FloatToHalf(x));
  return halves;
}

// Every row sees about two tokens of three.
Case RandomCase(Shape shape, unsigned seed) {
  std::mt19937 rng(seed);
  Case c{.shape = shape,
         .k = NormalHalves(rng, shape.tokens * shape.k_dim),
         .v = NormalHalves(rng, shape.tokens * shape.v_dim),
         .k_scale = {},
         .v_scale = {},
         .q = Normal(rng, shape.rows * shape.k_dim),
         .added = Normal(rng, shape.rows * shape.tokens),
         .scale = 1.0f / std::sqrt(static_cast<float>(shape.k_dim))};
  for (float& x : c.added) x = rng() % 3 == 0 ? -kInf : x;
  return c;
}

struct Outcome {
  Floats out, max, sum;
  explicit Outcome(const Shape& s) : out(s.rows * s.v_dim), max(s.rows, -kInf), sum(s.rows, 0.0f) {}
  bool operator==(const Outcome& o) const {
    const auto same = [](const Floats& a, const Floats& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
    };
    return same(out, o.out) && same(max, o.max) && same(sum, o.sum);
  }
};

// Rows [row, row + rows) over tokens [token, token + tokens), in memory of exactly their size.
void Attend(const Kernels& kernels, const Case& c, std::size_t row, std::size_t rows,
            std::size_t token, std::size_t tokens, Outcome& to) {
  const auto [all_rows, all_tokens, k_dim, v_dim] = c.shape;
  const auto part = [&](const auto& all, std::size_t width) {
    using Number = typename std::decay_t<decltype(all)>::value_type;
    if (all.empty()) return std::vector<Number>();
    const auto at = all.begin() + static_cast<std::ptrdiff_t>(token * width);
    return std::vector<Number>(at, at + static_cast<std::ptrdiff_t>(tokens * width));
  };
  const std::vector<Half> k = part(c.k, k_dim), v = part(c.v, v_dim);
  const Floats k_scale = part(c.k_scale, 1), v_scale = part(c.v_scale, 1);
  Floats added;
  for (std::size_t r = row; r < row + rows; ++r) {
    for (std::size_t t = token; t < token + tokens; ++t)
      added.push_back(c.added[r * all_tokens + t]);
  }
  kernels.exact.attend({.k = k.data(),
                        .v = v.data(),
                        .k_scale = k_scale.empty() ? nullptr : k_scale.data(),
                        .v_scale = v_scale.empty() ? nullptr : v_scale.data(),
                        .tokens = tokens,
                        .k_dim = k_dim,
                        .v_dim = v_dim,
                        .q = c.q.data() + row * k_dim,
                        .rows = rows,
                        .scale = c.scale,
                        .soft_cap = c.soft_cap,
                        .added = added.data(),
                        .out = to.out.data() + row * v_dim,
                        .max = to.max.data() + row,
                        .sum = to.sum.data() + row});
}

Outcome All(const Kernels& kernels, const Case& c) {
  Outcome o(c.shape);
  Attend(kernels, c, 0, c.shape.rows, 0, c.shape.tokens, o);
  return o;
}

// Scores of a row in units of log2.
Doubles Scores(const Case& c, std::size_t row) {
  Doubles s(c.shape.tokens);
  for (std::size_t t = 0; t < s.size(); ++t) {
    for (std::size_t i = 0; i < c.shape.k_dim; ++i)
      s[t] += double{c.q[row * c.shape.k_dim + i]} * HalfToFloat(c.k[t * c.shape.k_dim + i]);
    s[t] *= double{c.scale} * (c.k_scale.empty() ? 1.0f : c.k_scale[t]);
    if (c.soft_cap != 0.0f) s[t] = c.soft_cap * std::tanh(s[t] / c.soft_cap);
    s[t] = kLog2E * (s[t] + c.added[row * c.shape.tokens + t]);
  }
  return s;
}

// What an outcome has of a row, against double precision. slack: of a score, in units of log2.
void ExpectExact(const Case& c, const Outcome& o, double slack = 2e-5) {
  const std::size_t dim = c.shape.v_dim;
  for (std::size_t r = 0; r < c.shape.rows; ++r) {
    SCOPED_TRACE("row " + std::to_string(r));
    const Doubles s = Scores(c, r);
    const double max = std::ranges::max(s);
    if (max == -kInf) {
      EXPECT_EQ(o.max[r], -kInf);
      EXPECT_EQ(o.sum[r], 0.0f);
      for (std::size_t i = 0; i < dim; ++i) EXPECT_EQ(o.out[r * dim + i], 0.0f);
      continue;
    }
    double sum = 0.0, off = 0.0, size = 0.0;
    Doubles out(dim);
    for (std::size_t t = 0; t < s.size(); ++t) {
      const double weight = std::exp2(s[t] - max);
      sum += weight;
      for (std::size_t i = 0; i < dim; ++i) {
        out[i] += weight * HalfToFloat(c.v[t * dim + i]) * (c.v_scale.empty() ? 1 : c.v_scale[t]);
      }
    }
    EXPECT_NEAR(o.max[r], max, slack);
    const double to = std::exp2(o.max[r] - max);
    EXPECT_NEAR(o.sum[r] * to / sum, 1.0, 2e-4 + slack);
    for (std::size_t i = 0; i < dim; ++i) {
      off += std::pow(o.out[r * dim + i] / double{o.sum[r]} - out[i] / sum, 2);
      size += std::pow(out[i] / sum, 2);
    }
    EXPECT_LE(off, (2e-8 + slack * slack) * size);
  }
}

template <class F>
void ForTargets(const F& f) {
  for (const Kernels& kernels : AllKernels()) {
    SCOPED_TRACE(kernels.target);
    f(kernels);
  }
}

constexpr Shape kShapes[] = {{1, 1, 64, 64},   {1, 33, 128, 128}, {2, 17, 80, 40}, {3, 32, 64, 96},
                             {4, 64, 64, 64},  {5, 7, 1, 2},      {6, 65, 13, 7},  {7, 32, 64, 64},
                             {8, 32, 96, 128}, {9, 200, 64, 256}, {64, 64, 64, 64}};

TEST(Exact, IsAttention) {
  ForTargets([](const Kernels& kernels) {
    for (const Shape& shape : kShapes) {
      const Case c = RandomCase(shape, 1);
      ExpectExact(c, All(kernels, c));
    }
  });
}

TEST(Exact, ScalesMultiplyTheHalvesOfATokenBeforeTheCap) {
  ForTargets([](const Kernels& kernels) {
    for (const Shape& shape : kShapes) {
      Case c = RandomCase(shape, 2);
      for (std::size_t t = 0; t < shape.tokens; ++t) {
        c.k_scale.push_back(std::exp2(static_cast<float>(t % 5) - 2.0f));
        c.v_scale.push_back(std::exp2(static_cast<float>(t % 7)));
      }
      c.soft_cap = 3.0f;
      ExpectExact(c, All(kernels, c));
    }
  });
}

TEST(Exact, CarriesOn) {
  ForTargets([](const Kernels& kernels) {
    for (const Shape& shape : kShapes) {
      const Case c = RandomCase(shape, 3);
      Outcome o(shape);
      const std::size_t first = shape.tokens / 3;
      Attend(kernels, c, 0, shape.rows, 0, first, o);
      Attend(kernels, c, 0, shape.rows, first, shape.tokens - first, o);
      ExpectExact(c, o);
    }
  });
}

TEST(Exact, ARowGetsTheSameBitsAmongOthers) {
  ForTargets([](const Kernels& kernels) {
    for (const Shape& shape : kShapes) {
      const Case c = RandomCase(shape, 4);
      Outcome alone(shape);
      for (std::size_t r = 0; r < shape.rows; ++r) Attend(kernels, c, r, 1, 0, shape.tokens, alone);
      EXPECT_TRUE(alone == All(kernels, c)) << shape.rows;
    }
  });
}

// Row r sees the tokens [r, 3r): rows that share a turn see different vectors of them.
TEST(Exact, SeesNothingElse) {
  ForTargets([](const Kernels& kernels) {
    const Shape shape{50, 150, 64, 64};
    Case c = RandomCase(shape, 5);
    for (std::size_t r = 0; r < shape.rows; ++r) {
      for (std::size_t t = 0; t < shape.tokens; ++t)
        c.added[r * shape.tokens + t] = t >= r && t < 3 * r ? 0.0f : -kInf;
    }
    const Outcome o = All(kernels, c);
    ExpectExact(c, o);
    EXPECT_EQ(o.max[0], -kInf);
    Outcome none(shape);
    Attend(kernels, c, 0, shape.rows, 0, 0, none);
    EXPECT_TRUE(none == Outcome(shape));
  });
}

TEST(Exact, WhatIsNotFiniteMakesItsRowNaN) {
  ForTargets([](const Kernels& kernels) {
    const Shape shape{7, 20, 64, 64};
    Case c = RandomCase(shape, 6);
    c.q[1 * 64 + 5] = kNaN;
    c.q[3 * 64 + 6] = kInf;
    c.added[5 * 20 + 7] = kNaN;
    std::fill_n(&c.added[1 * 20 + 1], 19, -kInf);
    c.added[1 * 20] = 0.0f;
    c.q[6 * 64] = kNaN;
    std::fill_n(&c.added[6 * 20], 20, -kInf);
    Outcome o(shape);
    Attend(kernels, c, 0, 7, 0, 10, o);
    const Case healthy = RandomCase(shape, 6);
    Case second = c;
    second.q = healthy.q;
    Attend(kernels, second, 0, 7, 10, 10, o);  // NaN stays
    Outcome expected(shape);
    Attend(kernels, healthy, 0, 7, 0, 10, expected);
    Attend(kernels, healthy, 0, 7, 10, 10, expected);
    for (const std::size_t r : {1u, 3u, 5u}) {
      EXPECT_TRUE(std::isnan(o.max[r])) << r;
      EXPECT_TRUE(std::isnan(o.sum[r])) << r;
      EXPECT_TRUE(std::isnan(o.out[r * 64])) << r;
    }
    for (const std::size_t r : {0u, 2u, 4u}) {
      EXPECT_EQ(o.max[r], expected.max[r]);
      EXPECT_EQ(o.out[r * 64 + 3], expected.out[r * 64 + 3]);
    }
    EXPECT_EQ(o.max[6], -kInf);  // it has seen nothing
    EXPECT_EQ(o.sum[6], 0.0f);
  });
}

// Of scores of 2^30 an f32 has units of 128: the largest takes all, or shares it with its equals.
// Scores beyond 2^127 count as that.
TEST(Exact, HugeScores) {
  ForTargets([](const Kernels& kernels) {
    for (const float size : {0x1p30f, 0x1p100f, 0x1.8p127f}) {
      const Shape shape{2, 70, 1, 64};
      Case c = RandomCase(shape, 7);
      std::ranges::fill(c.added, 0.0f);
      c.k[9] = c.k[66] = FloatToHalf(1.0f);
      for (Half& k : c.k) {
        if (&k != &c.k[9] && &k != &c.k[66]) k = FloatToHalf(-0.5f);
      }
      c.q = {size, -size};
      const Outcome o = All(kernels, c);
      EXPECT_NEAR(o.sum[0], 2.0, 2e-4);  // as near as the exponential is
      EXPECT_NEAR(o.max[0], std::min(size * kLog2E, 0x1p127), size * 1e-6);
      for (std::size_t i = 0; i < 64; ++i) {
        const float both = HalfToFloat(c.v[9 * 64 + i]) + HalfToFloat(c.v[66 * 64 + i]);
        EXPECT_NEAR(o.out[i], both, std::fabs(both) * 1e-4);
      }
      EXPECT_NEAR(o.sum[1], 68.0, 68e-4);
    }
  });
}

}  // namespace
}  // namespace kvmix::kernels
