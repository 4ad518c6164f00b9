// A program in C that uses kvmix from its header alone: a plan by hand, a cache in a pool, a decode
// loop, outputs of three types, a session through functions.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvmix/kvmix.h"

#define HEADS 2
#define QUERY_HEADS 4
#define DIM 32
#define TOKENS 40

static kvmix_error error;

// Stops the program where a call fails.
static void Must(kvmix_code code) {
  if (code == KVMIX_OK) return;
  fprintf(stderr, "c_test: %s: %s\n", kvmix_code_name(code), error.text);
  exit(1);
}

static void Expect(int is_true, const char* what) {
  if (is_true) return;
  fprintf(stderr, "c_test: expected %s\n", what);
  exit(1);
}

typedef struct Buffer {
  unsigned char bytes[1 << 16];
  size_t size, at;
} Buffer;

static int Write(void* self, const void* data, size_t bytes) {
  Buffer* to = self;
  if (bytes > sizeof(to->bytes) - to->size) return 1;
  memcpy(to->bytes + to->size, data, bytes);
  to->size += bytes;
  return 0;
}

static int Read(void* self, void* data, size_t bytes) {
  Buffer* from = self;
  if (bytes > from->size - from->at) return 1;
  memcpy(data, from->bytes + from->at, bytes);
  from->at += bytes;
  return 0;
}

static void RunAll(void* self, size_t parts, void (*part)(void* job, size_t index), void* job) {
  for (size_t p = parts; p-- > 0;) part(job, p);
  ++*(size_t*)self;
}

static float FromBF16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, sizeof(x));
  return x;
}

static kvmix_plan* MakePlan(void) {
  kvmix_layer layer = KVMIX_INIT(kvmix_layer);
  layer.kv_heads = HEADS;
  layer.query_heads = QUERY_HEADS;
  layer.k_dim = layer.v_dim = DIM;
  kvmix_plan* plan = NULL;
  Must(kvmix_plan_create(&layer, 1, &plan, &error));
  kvmix_codec codec = KVMIX_INIT(kvmix_codec);
  Must(kvmix_codec_parse("i8-token+hadamard", &codec, &error));
  Must(kvmix_plan_set_codec(plan, 0, KVMIX_ALL, KVMIX_K, &codec, &error));
  Must(kvmix_plan_set_codec(plan, 0, KVMIX_ALL, KVMIX_V, &codec, &error));
  Must(kvmix_plan_set_exact_first(plan, 4, &error));
  return plan;
}

static void Fill(float* x, size_t n, float step) {
  for (size_t i = 0; i < n; ++i) x[i] = sinf(step * (float)(i + 1));
}

static void Append(kvmix_cache* cache) {
  float k[HEADS * DIM], v[HEADS * DIM];
  for (int t = 0; t < TOKENS; ++t) {
    Fill(k, HEADS * DIM, 0.1f * (float)(t + 1));
    Fill(v, HEADS * DIM, 0.3f * (float)(t + 1));
    const kvmix_rows k_rows = {k, KVMIX_F32, 1, HEADS, DIM, HEADS * DIM, DIM};
    const kvmix_rows v_rows = {v, KVMIX_F32, 1, HEADS, DIM, HEADS * DIM, DIM};
    Must(kvmix_cache_append(cache, 0, &k_rows, &v_rows, NULL, &error));
  }
}

// One query, to f32 without gaps and to bf16 with them.
static void Attend(const kvmix_cache* cache, float* out) {
  float q[QUERY_HEADS * DIM];
  Fill(q, QUERY_HEADS * DIM, 0.7f);
  const kvmix_rows rows = {q, KVMIX_F32, 1, QUERY_HEADS, DIM, QUERY_HEADS * DIM, DIM};
  const kvmix_out dense = {out, KVMIX_F32, 0, 0};
  size_t calls = 0;
  const kvmix_runner runner = {RunAll, &calls, 2};
  Must(kvmix_cache_attend(cache, 0, &rows, &dense, NULL, &runner, &error));
  uint16_t narrow[QUERY_HEADS * (DIM + 8)];
  const kvmix_out wide = {narrow, KVMIX_BF16, QUERY_HEADS * (DIM + 8), DIM + 8};
  kvmix_sight sight = KVMIX_INIT(kvmix_sight);
  Must(kvmix_cache_sight(cache, 0, &sight, &error));
  Expect(sight.causal == 1 && sight.window == 0 && sight.scale > 0, "the layer's own sight");
  Must(kvmix_cache_attend(cache, 0, &rows, &wide, &sight, NULL, &error));
  for (int h = 0; h < QUERY_HEADS; ++h) {
    for (int c = 0; c < DIM; ++c) {
      const float x = out[h * DIM + c], y = FromBF16(narrow[h * (DIM + 8) + c]);
      Expect(fabsf(x - y) <= fabsf(x) / 256, "the same output as bf16");
    }
  }
}

int main(void) {
  Expect(strcmp(kvmix_version(), "") != 0 && kvmix_target(0) != NULL, "a version and a target");
  kvmix_plan* const plan = MakePlan();
  kvmix_pool* pool = NULL;
  Must(kvmix_pool_create(plan, NULL, &pool, &error));
  kvmix_cache *cache = NULL, *other = NULL;
  Must(kvmix_cache_create(pool, TOKENS, &cache, &error));
  Must(kvmix_cache_create_alone(plan, TOKENS, NULL, &other, &error));
  kvmix_plan_destroy(plan);
  kvmix_pool_destroy(pool);  // lives on in its cache
  Append(cache);
  Expect(kvmix_cache_tokens(cache, 0) == TOKENS, "the tokens");
  float out[QUERY_HEADS * DIM], again[QUERY_HEADS * DIM];
  Attend(cache, out);

  static Buffer session;
  Must(kvmix_cache_write(cache, Write, &session, &error));
  Must(kvmix_cache_read(other, Read, &session, &error));
  Attend(other, again);
  Expect(memcmp(out, again, sizeof(out)) == 0, "the same bits from a session");

  const kvmix_rows one = {out, KVMIX_F32, 1, HEADS, DIM, HEADS * DIM, DIM};
  Expect(kvmix_cache_append(cache, 0, &one, &one, NULL, &error) == KVMIX_PAST_CAPACITY,
         "a cache that is full");
  Expect(error.code == KVMIX_PAST_CAPACITY && strchr(error.text, '\n') == NULL, "a line");
  kvmix_cache_destroy(cache);
  kvmix_cache_destroy(other);
  return 0;
}
