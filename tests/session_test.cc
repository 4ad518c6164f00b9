// Sessions: what is saved on any target loads on any other with the same bits; what is damaged, cut
// or of another plan is refused, and the cache stays as it was.
#include "kvmix/session.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvmix/quantize.h"
#include "tests/cache_rows.h"

namespace kvmix::testing {
namespace {

const Names kKCodecs = {"i8-token-bf16+centre+hadamard", "f16", "i8-head"};
const Names kVCodecs = {"i8-token", "i8-token-bf16+centre", "i4-token-bf16+hadamard"};

struct Case {
  Geometry g{2, 3, 6, 48};
  Rows rows, others;
  Plan plan;

  explicit Case(std::size_t tokens, std::size_t head_dim = 48)
      : g{2, 3, 6, head_dim},
        rows(RandomRows(g, tokens, 1)),
        others(RandomRows(g, tokens, 2)),
        plan(MakePlan(g, rows, kKCodecs, kVCodecs)) {
    plan.provenance.model = "a-model";
  }
};

std::string Saved(const Cache& cache) {
  std::ostringstream out;
  const Status s = SaveSession(cache, out);
  EXPECT_TRUE(s.ok()) << s.message();
  return out.str();
}
Status Load(Cache& cache, const std::string& bytes) {
  std::istringstream in(bytes);
  return LoadSession(cache, in);
}

std::string Directory() {
  const std::string path = std::filesystem::path(::testing::TempDir()) / "kvmix_session_test";
  std::filesystem::remove_all(path);
  std::filesystem::create_directory(path);
  return path;
}

std::size_t FilesIn(const std::string& path) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path), {}));
}

void Write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}
std::string Read(const std::string& path) {
  std::ostringstream out;
  out << std::ifstream(path, std::ios::binary).rdbuf();
  return out.str();
}

TEST(Session, FromAnyTargetToAnyOther) {
  const Case c(1400);
  ForAllTargets([&](std::string_view from) {
    for (const std::size_t tokens : {0, 1, 255, 256, 257, 1400}) {
      SCOPED_TRACE(tokens);
      Cache cache = Filled(c.plan, {}, 1500, from);
      AppendToAll(cache, c.rows, 0, tokens);
      ASSERT_TRUE(AppendTokens(cache, 1, c.others, 0, 10).ok());  // layers of unlike lengths
      const std::string bytes = Saved(cache);
      ForAllTargets([&](std::string_view to) {
        Cache loaded = Filled(c.plan, c.others, 1600, to), expected = Filled(c.plan, {}, 1600, to);
        const Status s = Load(loaded, bytes);
        ASSERT_TRUE(s.ok()) << s.message();
        AppendToAll(expected, c.rows, 0, tokens);
        ASSERT_TRUE(AppendTokens(expected, 1, c.others, 0, 10).ok());
        ExpectSame(loaded, expected);
        EXPECT_EQ(Saved(loaded), bytes);
        AppendToAll(loaded, c.others, 0, 20);  // and it goes on from there
        AppendToAll(expected, c.others, 0, 20);
        ExpectSame(loaded, expected);
      });
    }
  });
}

TEST(Session, OfForgottenTokensAndOfCellsNeverWritten) {
  const Case c(900);
  ForAllTargets([&](std::string_view target) {
    Cache cache = Filled(c.plan, c.rows, 3000, target);
    ASSERT_TRUE(cache.Forget(0, 600).ok());
    ASSERT_TRUE(cache.Forget(1, 900).ok());  // all of them
    const std::int64_t cells[] = {2500, 1700};
    ASSERT_TRUE(cache
                    .Store(0, cells, KvView(c.g, c.others.k).Tokens(0, 2),
                           KvView(c.g, c.others.v).Tokens(0, 2))
                    .ok());
    Cache loaded = Filled(c.plan, {}, 3000, target);
    const Status s = Load(loaded, Saved(cache));
    ASSERT_TRUE(s.ok()) << s.message();
    ASSERT_EQ(loaded.forgotten(0), 600u);
    ASSERT_EQ(loaded.tokens(0), 2501u);
    ASSERT_EQ(loaded.forgotten(1), 900u);
    ASSERT_EQ(loaded.tokens(1), 900u);
    EXPECT_TRUE(Export(loaded, 0) == Export(cache, 0));
    EXPECT_LT(loaded.bytes(), Filled(c.plan, RandomRows(c.g, 2501, 1), 3000, target).bytes());
  });
}

// A layer that has forgotten all its tokens still says what its first ones were.
TEST(Session, OfForgottenTokensThatArePartlyExact) {
  Case c(40);
  c.plan.exact_first = 3;
  Cache cache = Filled(c.plan, c.rows, 100);
  ASSERT_TRUE(cache.Forget(1, 40).ok());
  const std::string bytes = Saved(cache);
  Cache loaded = Filled(c.plan, {}, 100);
  const Status s = Load(loaded, bytes);
  ASSERT_TRUE(s.ok()) << s.message();
  EXPECT_EQ(loaded.forgotten(1), 40u);
  EXPECT_EQ(Saved(loaded), bytes);
  AppendToAll(loaded, c.others, 0, 20);
  AppendToAll(cache, c.others, 0, 20);
  ExpectSame(loaded, cache);
}

// The bytes as docs/formats.md lists them.
TEST(Session, IsAsLongAsItsDescriptionSays) {
  Case c(300);
  c.plan.exact_first = 3;
  const std::size_t header = 8 + 4 + 8 + 4 + std::string("a-model").size() + 8;
  Cache cache = Filled(c.plan, {}, 400);
  EXPECT_EQ(Saved(cache).size(), header + 2 * (8 + 8 + 8));  // without tokens no exact rows
  cache = Filled(c.plan, c.rows, 400);
  std::size_t token = 0;  // bytes of a token in all layers
  for (const HeadCodec& head : c.plan.codecs) {
    const RowCodec codec = *RowCodec::Create(head, 48);
    token += codec.row_bytes() + (codec.stores_scales() ? sizeof(float) : 0);
  }
  // Of every KV head the exact first tokens: factors of K and V, rows of K and V, in whole lines.
  constexpr std::size_t kExact = (3 * (4 + 4 + (48 + 48) * sizeof(Half)) + 63) / 64 * 64;
  EXPECT_EQ(Saved(cache).size(), header + 2 * (8 + 8 + 3 * kExact + 8) + 300 * token);
}

// A stream that throws for everything, as many programs have it, is a Status all the same.
TEST(Session, StreamsThatThrow) {
  const Case c(300);
  Cache cache = Filled(c.plan, c.rows, 400), other = Filled(c.plan, c.others, 400);
  const std::string bytes = Saved(cache), before = Saved(other);
  const auto all = std::ios::failbit | std::ios::badbit | std::ios::eofbit;
  for (const std::size_t length : {std::size_t{0}, std::size_t{5}, bytes.size() / 2}) {
    std::istringstream cut(bytes.substr(0, length));
    cut.exceptions(all);
    EXPECT_EQ(LoadSession(other, cut).code(), ErrorCode::kCorrupt);
    EXPECT_EQ(cut.exceptions(), all);
    EXPECT_TRUE(cut.fail());
    EXPECT_EQ(Saved(other), before);
  }
  std::istringstream whole(bytes);
  whole.exceptions(all);
  EXPECT_TRUE(LoadSession(other, whole).ok());
  std::ofstream nowhere;
  EXPECT_FALSE(SaveSession(cache, nowhere).ok());
  if (std::filesystem::exists("/dev/full")) {
    std::ofstream full("/dev/full", std::ios::binary);
    full.exceptions(all);
    EXPECT_EQ(SaveSession(cache, full).code(), ErrorCode::kIo);
    EXPECT_EQ(full.exceptions(), all);
    full.exceptions(std::ios::goodbit);  // so that its end is quiet as well
  }
}

TEST(Session, OfForksAndOverThem) {
  const Case c(700);
  const Pool pool = Pool::Create(c.plan).value();
  Cache origin = Cache::Create(pool, 1000).value();
  AppendToAll(origin, c.rows, 0, 700);
  Cache fork = std::move(*origin.Fork());
  ASSERT_TRUE(fork.Truncate(300).ok());
  const std::string bytes = Saved(fork);
  Cache other = std::move(*origin.Fork());
  ASSERT_TRUE(Load(other, bytes).ok());
  ExpectSame(other, fork);
  ExpectSame(origin, Filled(c.plan, c.rows, 1000));
}

// Two sessions in one stream, and what follows is left where it is.
TEST(Session, StreamsGoOn) {
  const Case c(300);
  const Cache a = Filled(c.plan, c.rows, 400), b = Filled(c.plan, c.others, 400);
  std::stringstream stream;
  ASSERT_TRUE(SaveSession(a, stream).ok());
  ASSERT_TRUE(SaveSession(b, stream).ok());
  stream << "end";
  Cache first = Filled(c.plan, {}, 400), second = Filled(c.plan, {}, 400);
  ASSERT_TRUE(LoadSession(first, stream).ok());
  ASSERT_TRUE(LoadSession(second, stream).ok());
  ExpectSame(first, a);
  ExpectSame(second, b);
  std::string rest;
  stream >> rest;
  EXPECT_EQ(rest, "end");
}

// ---- damage

TEST(SessionDamage, EveryByteAndEveryLength) {
  const Case c(5, 4);
  const std::string good = Saved(Filled(c.plan, c.rows, 300));
  Cache cache = Filled(c.plan, c.others, 300);
  const Cache expected = Filled(c.plan, c.others, 300);
  ASSERT_LT(good.size(), 3000u);
  const auto refused = [&](const std::string& bytes, const std::string& what) {
    SCOPED_TRACE(what);
    const Status s = Load(cache, bytes);
    ASSERT_FALSE(s.ok());
    ASSERT_NE(s.message().find("session"), std::string::npos) << s.message();
    ASSERT_EQ(s.message().find('\n'), std::string::npos) << s.message();
    ASSERT_EQ(cache.tokens(0), 5u);
  };
  for (std::size_t i = 0; i < good.size(); ++i) {
    refused(good.substr(0, i), "cut to " + std::to_string(i));
    for (const unsigned flip : {1u, 0x80u, 0xFFu}) {
      std::string bad = good;
      bad[i] = static_cast<char>(static_cast<unsigned char>(bad[i]) ^ flip);
      refused(bad, "byte " + std::to_string(i));
    }
    if (i % 64 == 0) ExpectSame(cache, expected);
  }
  ExpectSame(cache, expected);
  for (std::size_t i = 0; i + 8 < good.size(); i += 8) {  // bytes that have gone, or come twice
    refused(good.substr(0, i) + good.substr(i + 8), "without " + std::to_string(i));
    refused(good.substr(0, i + 8) + good.substr(i), "twice " + std::to_string(i));
  }
  ASSERT_TRUE(Load(cache, good).ok());
}

// A number of tokens that no memory would hold, where the capacity would let it pass.
TEST(SessionDamage, NumbersOfTokensBeyondMemory) {
  const Case c(5, 4);
  const Pool pool = Pool::Create(c.plan, {.bytes = 1 << 20}).value();
  Cache cache = Cache::Create(pool, std::numeric_limits<std::size_t>::max()).value();
  AppendToAll(cache, c.rows, 0, 5);
  const std::string good = Saved(cache);
  const std::size_t at = 8 + 4 + 8 + 4 + std::string("a-model").size() + 8;  // forgotten, tokens
  ASSERT_EQ(static_cast<int>(good[at]), 0);
  ASSERT_EQ(static_cast<int>(good[at + 8]), 5);
  for (std::size_t i = at; i < at + 16; ++i) {
    for (const char x : {'\x01', '\x7F', '\xFF'}) {
      std::string bad = good;
      bad[i] = x;
      EXPECT_FALSE(Load(cache, bad).ok()) << "byte " << i;
    }
  }
  EXPECT_EQ(cache.tokens(0), 5u);
  const std::int64_t cell = std::int64_t{1} << 60;
  ExpectError(cache.Store(0, {&cell, 1}, KvView(c.g, c.rows.k).Tokens(0, 1),
                          KvView(c.g, c.rows.v).Tokens(0, 1)),
              ErrorCode::kOutOfMemory, {"layer 0", std::to_string(cell)});
  EXPECT_EQ(cache.tokens(0), 5u);
}

TEST(SessionDamage, OtherPlansVersionsAndSizes) {
  const Case c(300);
  const Cache cache = Filled(c.plan, c.rows, 400);
  const std::string good = Saved(cache);
  Plan other = c.plan;
  other.codec(1, 2, KVMIX_K).head_scale *= 2.0f;
  other.provenance.model = "another-model";
  Cache of_other = Filled(other, c.others, 400);
  const Cache before = Filled(other, c.others, 400);
  ExpectError(Load(of_other, good), ErrorCode::kMismatch, {"a-model", "another-model"});
  ExpectSame(of_other, before);
  Cache small = Filled(c.plan, {}, 299);
  ExpectError(Load(small, good), ErrorCode::kPastCapacity, {"layer 0", "300", "299"});
  std::string newer = good;
  newer[8] = 3;
  Cache same = Filled(c.plan, {}, 400);
  ExpectError(Load(same, newer), ErrorCode::kVersion, {"expected version 2", "found 3"});
  ExpectError(Load(same, "{\"a\": \"JSON\"}, not a session"), ErrorCode::kCorrupt,
              {"expected a kvmix session"});
  EXPECT_EQ(same.tokens(0), 0u);
  ExpectError(LoadSession(same, "nowhere"), ErrorCode::kIo, {"nowhere"});
  Release(same);
  ExpectError(Load(same, good), ErrorCode::kInvalidArgument, {"null"});
  std::ostringstream out;
  ExpectError(SaveSession(same, out), ErrorCode::kInvalidArgument, {"null"});
}

TEST(SessionDamage, AFullPool) {
  const Case c(600);
  const std::string good = Saved(Filled(c.plan, c.rows, 700));
  const std::size_t bytes = Filled(c.plan, c.rows, 700).bytes();
  const Pool pool = Pool::Create(c.plan, {.bytes = 2 * bytes - 1}).value();
  Cache cache = Cache::Create(pool, 700).value();
  AppendToAll(cache, c.others, 0, 600);
  ExpectError(Load(cache, good), ErrorCode::kPoolFull, {"pool"});
  EXPECT_EQ(pool.bytes(), bytes);
  ExpectSame(cache, Filled(c.plan, c.others, 700));
  ASSERT_TRUE(cache.Truncate(0).ok());
  ASSERT_TRUE(Load(cache, good).ok());
  ExpectSame(cache, Filled(c.plan, c.rows, 700));
}

// ---- files

TEST(SessionFile, RoundTripAndReplacement) {
  const Case c(600);
  const std::string directory = Directory(), path = directory + "/a.session";
  const Cache a = Filled(c.plan, c.rows, 700), b = Filled(c.plan, c.others, 700);
  ASSERT_TRUE(SaveSession(a, path).ok());
  EXPECT_EQ(Read(path), Saved(a));
  ASSERT_TRUE(SaveSession(b, path).ok());
  EXPECT_EQ(FilesIn(directory), 1u);
  Cache loaded = Filled(c.plan, {}, 700);
  ASSERT_TRUE(LoadSession(loaded, path).ok());
  ExpectSame(loaded, b);
}

TEST(SessionFile, DamageIsNamedWithItsFile) {
  const Case c(20);
  const std::string path = Directory() + "/a.session";
  const std::string good = Saved(Filled(c.plan, c.rows, 100));
  Cache cache = Filled(c.plan, c.others, 100);
  const Cache expected = Filled(c.plan, c.others, 100);
  const auto refused = [&](ErrorCode code, const std::string& part) {
    ExpectError(LoadSession(cache, path), code, {path, part});
    ExpectSame(cache, expected);
  };
  refused(ErrorCode::kIo, "can be read");
  Write(path, good + '\0');
  refused(ErrorCode::kCorrupt, "nothing after the last layer");
  Write(path, good + good);
  refused(ErrorCode::kCorrupt, "nothing after the last layer");
  Write(path, good.substr(0, good.size() - 1));
  refused(ErrorCode::kCorrupt, "layer 1");
  Write(path, "");
  refused(ErrorCode::kCorrupt, "session");
  Write(path, good);
  EXPECT_TRUE(LoadSession(cache, path).ok());
}

TEST(SessionFile, LeavesNothingBehindWhereItCannotWrite) {
  const Case c(20);
  const std::string directory = Directory();
  const Cache cache = Filled(c.plan, c.rows, 100);
  const std::string nowhere = directory + "/missing/a.session";
  ExpectError(SaveSession(cache, nowhere), ErrorCode::kNotFound, {nowhere});
  // A directory stands where the file should: the rename fails after all is written.
  const std::string taken = directory + "/taken";
  std::filesystem::create_directories(taken + "/full");
  ExpectError(SaveSession(cache, taken), ErrorCode::kIo, {taken});
  EXPECT_EQ(FilesIn(directory), 1u);
  Cache released = Filled(c.plan, {}, 1);
  Release(released);
  Write(directory + "/kept", "kept");
  ExpectError(SaveSession(released, directory + "/kept"), ErrorCode::kInvalidArgument, {"null"});
  EXPECT_EQ(Read(directory + "/kept"), "kept");
  EXPECT_EQ(FilesIn(directory), 2u);
  // A device without room takes the bytes, and says so only when they are flushed.
  if (std::filesystem::exists("/dev/full")) {
    std::ofstream full("/dev/full", std::ios::binary);
    ExpectError(SaveSession(cache, full), ErrorCode::kIo, {"stream"});
  }
}

// ---- what a session belongs to, and what ImportRows takes

TEST(Fingerprint, OfAllThatDecidesWhatBytesMean) {
  const Case c(50);
  const std::uint64_t own = Fingerprint(c.plan);
  Plan plan = c.plan;
  plan.provenance.model = "another name";
  plan.provenance.calibration_tokens = 77;
  EXPECT_EQ(Fingerprint(plan), own);
  const std::string path = Directory() + "/plan.json";
  ASSERT_TRUE(SavePlan(c.plan, path).ok());
  EXPECT_EQ(Fingerprint(LoadPlan(path).value()), own);

  std::vector<std::uint64_t> seen = {own};
  const auto differs = [&](const std::function<void(Plan&)>& change, const char* what) {
    Plan changed = c.plan;
    change(changed);
    const std::uint64_t found = Fingerprint(changed);
    EXPECT_EQ(std::count(seen.begin(), seen.end(), found), 0) << what;
    seen.push_back(found);
  };
  differs([](Plan& p) { std::swap(p.codec(0, 0, KVMIX_K), p.codec(0, 1, KVMIX_K)); }, "order");
  differs([](Plan& p) { std::swap(p.codec(0, 0, KVMIX_V), p.codec(0, 1, KVMIX_V)); }, "order");
  differs([](Plan& p) { p.codec(1, 2, KVMIX_K).head_scale *= 1.0000002f; }, "a scale");
  differs([](Plan& p) { p.codec(1, 0, KVMIX_V).kind.scale = KVMIX_SCALE_TOKEN_BF16; }, "a kind");
  for (const std::size_t layer : {0, 1}) {
    differs(
        [&](Plan& p) {
          CodecVectors vectors = *p.codec(layer, 0, KVMIX_K).vectors;
          vectors.mean[47] += 1.0f;
          p.codec(layer, 0, KVMIX_K).vectors = std::make_shared<const CodecVectors>(vectors);
        },
        "a mean");
  }
  const HeadCodec f16;
  for (const Geometry& g : {Geometry{2, 2, 2, 16}, {2, 2, 2, 32}, {1, 4, 4, 16}, {4, 1, 1, 16}}) {
    const std::uint64_t found = Fingerprint(UniformPlan(g, f16, f16));
    EXPECT_EQ(std::count(seen.begin(), seen.end(), found), 0) << ToString(g);
    seen.push_back(found);
  }
}

TEST(ImportRows, RefusesWhatNoEncoderMakes) {
  const Case c(30);
  const LayerRows good = Export(Filled(c.plan, c.rows, 40), 0);
  Cache cache = Filled(c.plan, c.others, 90);
  const Cache expected = Filled(c.plan, c.others, 90);
  const auto refused = [&](const LayerRows& rows, const std::vector<std::string>& parts) {
    ExpectError(Import(cache, 0, rows), ErrorCode::kInvalidArgument, parts);
    ExpectSame(cache, expected);
  };
  for (std::size_t i = 0; i < good.size(); ++i) {
    const std::string head = "KV head " + std::to_string(i / 2) + ", " + (i % 2 == 0 ? "K" : "V");
    const HeadCodec& codec = c.plan.codec(0, i / 2, static_cast<Tensor>(i % 2));
    const bool f16 = codec.kind.storage == KVMIX_STORAGE_F16;
    for (const std::size_t row : {0, 29}) {
      const std::vector<std::string> parts = {"layer 0", head, "row " + std::to_string(row)};
      LayerRows bad = good;
      if (f16) {
        for (const unsigned bits : {0x7C00u, 0xFC00u, 0x7E01u}) {
          bad[i].codes[row * 96 + 94] = static_cast<std::uint8_t>(bits & 0xFF);
          bad[i].codes[row * 96 + 95] = static_cast<std::uint8_t>(bits >> 8);
          refused(bad, parts);
        }
      } else if (codec.kind.storage == KVMIX_STORAGE_I8) {  // every nibble is a code of i4
        bad[i].codes[row * 48 + 47] = 0x80;
        refused(bad, parts);
      }
      if (codec.kind.scale != KVMIX_SCALE_TOKEN && codec.kind.scale != KVMIX_SCALE_TOKEN_BF16)
        continue;
      for (const float scale : {kNaN, kInf, -kInf}) {
        bad = good;
        bad[i].scales[row] = scale;
        refused(bad, parts);
      }
    }
  }
  LayerRows none = good;
  for (HeadRows& rows : none) rows = {};
  EXPECT_TRUE(Import(cache, 0, none).ok());
  ExpectSame(cache, expected);
  Cache empty = Filled(c.plan, {}, 10);
  EXPECT_TRUE(Import(empty, 0, none).ok());
  EXPECT_EQ(empty.bytes(), 0u);
  EXPECT_TRUE(Import(cache, 0, good).ok());
}

}  // namespace
}  // namespace kvmix::testing
