// A decode loop in C: a plan from a file or by hand, a cache, and for every token and layer one
// append and one attention. At the end a call that fails, and its error.
//   cc -std=c11 decode.c $(pkg-config --cflags --libs kvmix) -lm -o decode
//   ./decode [PLAN.json]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <kvmix/kvmix.h>

enum { CAPACITY = 32 };

static kvmix_error error;  // of the call that failed

// The shape of Llama-3.2-1B with rotated int8 in every head.
static kvmix_code PlanByHand(kvmix_plan** plan) {
  kvmix_layer layers[16];
  for (int i = 0; i < 16; ++i) {
    const kvmix_layer layer = {sizeof(kvmix_layer), .kv_heads = 8, .query_heads = 32, .k_dim = 64,
                               .v_dim = 64};
    layers[i] = layer;
  }
  kvmix_codec int8 = KVMIX_INIT(kvmix_codec);
  kvmix_code code = kvmix_codec_parse("i8-token+hadamard", &int8, &error);
  if (code == KVMIX_OK) code = kvmix_plan_create(layers, 16, plan, &error);
  for (size_t i = 0; i < 16 && code == KVMIX_OK; ++i) {
    code = kvmix_plan_set_codec(*plan, i, KVMIX_ALL, KVMIX_K, &int8, &error);
    if (code == KVMIX_OK) {
      code = kvmix_plan_set_codec(*plan, i, KVMIX_ALL, KVMIX_V, &int8, &error);
    }
  }
  return code;
}

// Rows of one token, [heads, dim], in the place of what a model computes.
static kvmix_rows Rows(float* x, size_t heads, size_t dim, double seed) {
  for (size_t i = 0; i < heads * dim; ++i) x[i] = (float)sin(seed * (double)(i + 1));
  const kvmix_rows rows = {x, KVMIX_F32, 1, heads, dim, (ptrdiff_t)(heads * dim), (ptrdiff_t)dim};
  return rows;
}

// One token of one layer: its K and V go into the cache, then its query sees them. *first becomes
// the first number of the output.
static kvmix_code Step(kvmix_cache* cache, size_t layer, const kvmix_layer* shape, double token,
                       float* first) {
  if (shape->kv_heads == 0) return KVMIX_OK;  // a layer without K and V
  const size_t heads = shape->query_heads,
               dim = shape->k_dim > shape->v_dim ? shape->k_dim : shape->v_dim;
  float* const x = malloc(4 * heads * dim * sizeof(float));  // kv_heads <= query_heads
  if (x == NULL) return KVMIX_OUT_OF_MEMORY;
  const kvmix_rows k = Rows(x, shape->kv_heads, shape->k_dim, token + 0.1),
                   v = Rows(x + heads * dim, shape->kv_heads, shape->v_dim, token + 0.2),
                   q = Rows(x + 2 * heads * dim, heads, shape->k_dim, token + 0.3);
  const kvmix_out out = {x + 3 * heads * dim, KVMIX_F32, 0, 0};  // or KVMIX_F16, KVMIX_BF16
  kvmix_code code = KVMIX_OK;
  if (shape->reads == 0) code = kvmix_cache_append(cache, layer, &k, &v, NULL, &error);
  if (code == KVMIX_OK) code = kvmix_cache_attend(cache, layer, &q, &out, NULL, NULL, &error);
  if (code == KVMIX_OK) *first = *(const float*)out.data;
  free(x);
  return code;
}

static kvmix_code Decode(kvmix_cache* cache, const kvmix_plan* plan, int tokens) {
  float first = 0.0f;
  for (int t = 0; t < tokens; ++t) {
    for (size_t i = 0; i < kvmix_plan_layers(plan); ++i) {
      kvmix_layer shape = KVMIX_INIT(kvmix_layer);
      kvmix_code code = kvmix_plan_layer(plan, i, &shape, &error);
      if (code == KVMIX_OK) code = Step(cache, i, &shape, t, &first);
      if (code != KVMIX_OK) return code;
    }
  }
  printf("%d more tokens in %zu layers, %zu bytes, first output %.4f\n", tokens,
         kvmix_plan_layers(plan), kvmix_cache_bytes(cache), (double)first);
  return KVMIX_OK;
}

int main(int argc, char** argv) {
  kvmix_plan* plan = NULL;
  kvmix_cache* cache = NULL;
  kvmix_code code = argc > 1 ? kvmix_plan_load(argv[1], &plan, &error) : PlanByHand(&plan);
  if (code == KVMIX_OK) code = kvmix_cache_create_alone(plan, CAPACITY, NULL, &cache, &error);
  if (code == KVMIX_OK) code = Decode(cache, plan, CAPACITY);
  if (code == KVMIX_OK) {
    // One more token than there is room for. (KVMIX_POOL_FULL would say: evict, and try again.)
    code = Decode(cache, plan, 1) == KVMIX_PAST_CAPACITY ? KVMIX_OK : KVMIX_INTERNAL;
    printf("%s: %s\n", kvmix_code_name(error.code), error.text);
  } else {
    fprintf(stderr, "%s: %s\n", kvmix_code_name(code), error.text);
  }
  kvmix_cache_destroy(cache);
  kvmix_plan_destroy(plan);
  return code == KVMIX_OK ? 0 : 1;
}
