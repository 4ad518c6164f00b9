// Dumps that are written row by row: what is read again, and what is left where something fails.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <string>
#include <vector>

#include "dump_files.h"
#include "kvmix/tune/dump.h"
#include "synthetic_dump.h"

namespace kvmix::testing {
namespace {

using tune::Dump;
using tune::DumpInfo;
using tune::DumpLayer;
using tune::DumpWriter;

const LayerShape kShape{.kv_heads = 2, .query_heads = 4, .k_dim = 8, .v_dim = 4, .window = 5};

// K, V and Q of one call; all numbers differ.
struct Rows {
  std::vector<float> k, v, q;

  Rows(std::size_t tokens, float first) : k(tokens * 16), v(tokens * 8), q(tokens * 32) {
    for (std::vector<float>* x : {&k, &v, &q})
      for (float& number : *x) number = first++;
  }
  Status AddTo(DumpWriter* writer, std::size_t layer, std::size_t stream = 0) const {
    const std::size_t n = k.size() / 16;
    return writer->Add(layer, RowsView::F32(k.data(), n, 2, 8), RowsView::F32(v.data(), n, 2, 4),
                       RowsView::F32(q.data(), n, 4, 8), stream);
  }
};

DumpInfo Info(std::vector<std::size_t> prompts) {
  return {Model({kShape, {}, kShape}), std::move(prompts), "a \"model\"\n", "ein Text, ü"};
}

void ExpectNumbers(const RowsView& rows, const std::vector<float>& first,
                   const std::vector<float>& then) {
  std::vector<float> expected = first, found;
  expected.insert(expected.end(), then.begin(), then.end());
  for (std::size_t i = 0; i < rows.tokens * rows.heads; ++i)
    for (std::size_t c = 0; c < rows.head_dim; ++c)
      found.push_back(rows.At(i / rows.heads, i % rows.heads, c));
  EXPECT_EQ(found, expected);
}

TEST(DumpWriter, ReadAsWritten) {
  const TempFolder folder;
  const std::string path = folder.file("dump");
  const Rows a(5, 0.0f), b(2, 500.0f), c(3, 1000.0f);
  {
    DumpWriter writer(path);
    for (const std::size_t layer : {2, 0}) {  // streams and layers in any order
      ASSERT_TRUE(c.AddTo(&writer, layer, 7).ok());
      ASSERT_TRUE(a.AddTo(&writer, layer).ok());
      ASSERT_TRUE(b.AddTo(&writer, layer).ok());
      ASSERT_TRUE(writer.Drop(layer, 2).ok());
    }
    EXPECT_FALSE(std::filesystem::exists(path));
    const Status s = writer.Finish(Info({5, 3}));
    ASSERT_TRUE(s.ok()) << s.message();
  }
  EXPECT_EQ(folder.entries(), 1u);
  const Result<Dump> dump = Dump::Open(path);
  ASSERT_TRUE(dump.ok()) << dump.status().message();
  EXPECT_EQ(dump->model(), Info({}).model);
  EXPECT_EQ(dump->model_name(), "a \"model\"\n");
  EXPECT_EQ(dump->corpus(), "ein Text, ü");
  EXPECT_EQ(dump->prompt_tokens(), (std::vector<std::size_t>{5, 3}));
  for (const std::size_t layer : {0, 2}) {
    const DumpLayer rows = *dump->Load(layer);
    ExpectNumbers(rows.k, a.k, c.k);
    ExpectNumbers(rows.v, a.v, c.v);
    ExpectNumbers(rows.q, a.q, c.q);
  }
}

TEST(DumpWriter, LayersThatReadAnothersAndDumpsWithoutQ) {
  const TempFolder folder;
  SyntheticDump{UnlikeModel(), {6, 3}}.Write(folder.file("unlike"));
  EXPECT_EQ(Dump::Open(folder.file("unlike"))->model(), UnlikeModel());
  const Rows rows(9, 1.0f);
  DumpWriter writer(folder.file("no_q"));
  for (const std::size_t layer : {0, 2})
    ASSERT_TRUE(writer
                    .Add(layer, RowsView::F32(rows.k.data(), 9, 2, 8),
                         RowsView::F32(rows.v.data(), 9, 2, 4), {})
                    .ok());
  ASSERT_TRUE(writer.Finish(Info({9})).ok());
  EXPECT_FALSE(Dump::Open(folder.file("no_q"))->has_q());
}

TEST(DumpWriter, RefusesWhatDisagrees) {
  const TempFolder folder;
  const std::string path = folder.file("dump");
  const Rows rows(9, 1.0f);
  const auto refused = [&](const DumpInfo& info, std::vector<std::size_t> layers,
                           const std::string& text) {
    DumpWriter writer(path);
    for (const std::size_t layer : layers) ASSERT_TRUE(rows.AddTo(&writer, layer).ok());
    const Status s = writer.Finish(info);
    EXPECT_FALSE(s.ok());
    EXPECT_TRUE(s.message().starts_with(path)) << s.message();
    EXPECT_NE(s.message().find(text), std::string::npos) << s.message();
  };
  refused(Info({8}), {0, 2}, "layers.0.k: expected [8, 2, 8], found [9, 2, 8]");
  refused(Info({9}), {0}, "layers.2.k: expected a tensor, as the model says, found none");
  refused(Info({9}), {0, 1, 2}, "layers.1.k: expected none, as the model says, found one");
  refused(Info({9}), {0, 2, 3}, "layers.3.k: expected none");
  DumpInfo bad = Info({9});
  bad.model.layers[0].query_heads = 3;
  refused(bad, {0, 2}, "query_heads: expected a multiple");
  DumpWriter writer(path);
  ASSERT_TRUE(rows.AddTo(&writer, 0).ok());
  for (int i = 0; i < 2; ++i)  // and stays an error
    EXPECT_EQ(writer.Add(0, RowsView::F32(rows.k.data(), 1, 1, 8), {}, {}).code(),
              ErrorCode::kInvalidArgument);
  EXPECT_FALSE(writer.Finish(Info({9})).ok());
  EXPECT_FALSE(std::filesystem::exists(path));
}

// No file may grow beyond 2000 bytes: the parts fit, or not even they.
TEST(DumpWriter, AFullDiskLeavesWhatWasThere) {
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const std::size_t tokens : {20, 100}) {
    const TempFolder folder;
    const std::string path = folder.file("dump");
    WriteBytes(path, "before");
    {
      DumpWriter writer(path);
      const Rows rows(tokens, 1.0f);
      const rlimit small{2000, old.rlim_max};
      ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
      const bool added = rows.AddTo(&writer, 0).ok() && rows.AddTo(&writer, 2).ok();
      const Status s = writer.Finish(Info({tokens}));
      ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
      EXPECT_EQ(added, tokens == 20);
      EXPECT_EQ(s.code(), ErrorCode::kIo) << s.message();
      EXPECT_TRUE(s.message().starts_with(path)) << s.message();
    }
    EXPECT_EQ(ReadBytes(path), "before");
    EXPECT_EQ(folder.entries(), 1u);
  }
  std::signal(SIGXFSZ, handler);
}

// The next writer removes what a killed one has left, also in the middle of its last file.
TEST(DumpWriter, AfterAProcessThatWasKilled) {
  const TempFolder folder;
  const std::string path = folder.file("dump");
  const Rows rows(9, 1.0f);
  const pid_t child = fork();
  if (child == 0) {
    DumpWriter writer(path);
    (void)rows.AddTo(&writer, 0);
    WriteBytes(path + "." + std::to_string(getpid()) + "-0.tmp", "half of a dump");
    raise(SIGKILL);
  }
  waitpid(child, nullptr, 0);
  EXPECT_EQ(folder.entries(), 2u);
  const std::string alive = path + "." + std::to_string(getppid()) + "-0.tmp";
  WriteBytes(alive, "of a process that lives");
  DumpWriter writer(path);
  for (const std::size_t layer : {0, 2}) ASSERT_TRUE(rows.AddTo(&writer, layer).ok());
  ASSERT_TRUE(writer.Finish(Info({9})).ok());
  EXPECT_EQ(folder.entries(), 3u);  // with the writer's own parts
  EXPECT_TRUE(std::filesystem::exists(alive));
  EXPECT_TRUE(Dump::Open(path).ok());
}

}  // namespace
}  // namespace kvmix::testing
