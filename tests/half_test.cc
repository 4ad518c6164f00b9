// Every half, and floats between them, against the definition of binary16; bf16 numbers.
#include "kvmix/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>

namespace kvmix {
namespace {

// From the definition of binary16.
double Value(Half h) {
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24)
                           : exponent == 31
                               ? (fraction ? std::nan("") : std::numeric_limits<double>::infinity())
                               : std::ldexp(1024 + fraction, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

TEST(Half, ToFloatIsExact) {
  for (unsigned h = 0; h < 65536; ++h) {
    const double expected = Value(static_cast<Half>(h));
    const float f = HalfToFloat(static_cast<Half>(h));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(f)) << h;
    } else {
      ASSERT_EQ(static_cast<double>(f), expected) << h;
    }
    ASSERT_EQ(std::signbit(f), (h & 0x8000) != 0) << h;
  }
}

TEST(Half, RoundTrip) {
  for (unsigned h = 0; h < 65536; ++h) {
    const Half back = FloatToHalf(HalfToFloat(static_cast<Half>(h)));
    if ((h & 0x7FFF) > 0x7C00) {
      ASSERT_GT(back & 0x7FFF, 0x7C00) << h;
    } else {
      ASSERT_EQ(back, h);
    }
  }
}

// Between every two neighbours: the middle goes to the even one, the floats beside it to the nearer
// one. 65520 is the middle between the largest half and infinity.
TEST(Half, RoundsToNearestEven) {
  for (unsigned h = 0; h < 0x7C00; ++h) {
    const double low = Value(static_cast<Half>(h)),
                 high = h == 0x7BFF ? 65536.0 : Value(static_cast<Half>(h + 1));
    const float middle = static_cast<float>((low + high) / 2);
    const Half even = static_cast<Half>(h + (h & 1));
    for (const unsigned sign : {0u, 0x8000u}) {
      const auto half = [&](float f) { return FloatToHalf(sign ? -f : f) ^ sign; };
      ASSERT_EQ(half(middle), even) << h;
      ASSERT_EQ(half(std::nextafter(middle, 0.0f)), h);
      ASSERT_EQ(half(std::nextafter(middle, 1e9f)), h + 1);
    }
  }
}

TEST(Half, Extremes) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float f : {inf, std::numeric_limits<float>::max(), 65536.0f, 1e20f}) {
    EXPECT_EQ(FloatToHalf(f), 0x7C00);
    EXPECT_EQ(FloatToHalf(-f), 0xFC00);
  }
  for (const float f : {0.0f, std::numeric_limits<float>::denorm_min(),
                        std::numeric_limits<float>::min(), 0x1p-26f}) {
    EXPECT_EQ(FloatToHalf(f), 0x0000);
    EXPECT_EQ(FloatToHalf(-f), 0x8000);
  }
  EXPECT_GT(FloatToHalf(std::numeric_limits<float>::quiet_NaN()) & 0x7FFF, 0x7C00);
  EXPECT_GT(FloatToHalf(std::bit_cast<float>(0x7F800001u)) & 0x7FFF,
            0x7C00);  // its payload is all in the bits that are dropped
}

TEST(Half, NoHalfIsNearer) {
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; ++i) {
    const float f = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (!(std::fabs(f) < 65504.0f)) continue;
    const Half h = FloatToHalf(f), magnitude = h & 0x7FFF;
    const double x = f, error = std::fabs(Value(h) - x);
    ASSERT_LE(error, std::fabs(Value(static_cast<Half>(h + 1)) - x)) << f;
    if (magnitude == 0) continue;
    ASSERT_LE(error, std::fabs(Value(static_cast<Half>(h - 1)) - x)) << f;
  }
}

TEST(BFloat, IsTheUpperHalfOfAFloat) {
  for (const auto& [bits, value] : {std::pair<std::uint16_t, float>{0x3F80, 1.0f},
                                    {0xC040, -3.0f},
                                    {0x0001, 0x1p-133f},
                                    {0x7F7F, 0x1.FEp127f},
                                    {0x8000, -0.0f},
                                    {0x7F80, std::numeric_limits<float>::infinity()}}) {
    EXPECT_EQ(BFloatToFloat(bits), value);
    EXPECT_EQ(std::signbit(BFloatToFloat(bits)), std::signbit(value));
  }
  EXPECT_TRUE(std::isnan(BFloatToFloat(0x7FC0)));
}

}  // namespace
}  // namespace kvmix
