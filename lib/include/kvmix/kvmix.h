/* kvmix in C: a KV cache whose every head has the precision it needs, and attention over it.
 *
 * These functions are all that libkvmix.so exports. The C++ headers of this folder are inline over
 * them.
 *
 * Handles (kvmix_plan, kvmix_pool, kvmix_cache, kvmix_row_codec, kvmix_threads) are opaque. A
 * function that makes one writes it to `out`, or null where it fails; the caller destroys it.
 * Destroying a null handle does nothing. A handle keeps what it needs: a pool its plan, a cache its
 * pool.
 *
 * Structs that begin with struct_size have room to grow. Make one with KVMIX_INIT, or set
 * struct_size to sizeof the struct; 0 in any other field is a good beginning. A struct from a newer
 * header than the library's is longer, and is refused unless what the library does not know is 0.
 * The elements of an array have the first one's struct_size, which is also the distance from one to
 * the next. A struct that the library fills in must have its struct_size set as well.
 *
 * Errors: a function that can fail returns a kvmix_code: KVMIX_OK, or the reason; and writes a line
 * to `error` unless that is null. A call that failed has changed nothing, unless the function says
 * more. Nothing throws, and bad input aborts nothing. Functions that return no code give 0 or null
 * for a handle that is null or not theirs. A build with debug information keeps a mark where a
 * destroyed handle was, and refuses it; any other build must not see it again.
 *
 * Threads: different handles may be used by different threads at a time. Many threads may read a
 * layer of a cache while no thread writes it; other layers may be written meanwhile. Many threads
 * may use one plan or pool as long as none changes the plan.
 *
 * ABI: within a minor version (from 1.0 on, a major version) functions, numbers of enumerators and
 * fields of structs stay; structs grow at their end only, those without struct_size not at all. The
 * soname changes when this cannot be kept. lib/abi.txt lists all of it, and a test compares.
 */
#ifndef KVMIX_KVMIX_H_
#define KVMIX_KVMIX_H_

#include <stddef.h>
#include <stdint.h>

#include "kvmix/export.h"
#include "kvmix/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* kvmix_codec codec = KVMIX_INIT(kvmix_codec); */
#ifdef __cplusplus
extern "C++" {
namespace kvmix {
template <class T>
T Sized() {
  T made{};
  made.struct_size = sizeof(T);
  return made;
}
}  // namespace kvmix
}
#define KVMIX_INIT(type) (::kvmix::Sized<type>())
#else
#define KVMIX_INIT(type) \
  { .struct_size = sizeof(type) }
#endif

/* ---- errors and the library (kvmix_code: kvmix/types.h) */

/* One line: the thing it concerns, what was expected, what was found; ends with a 0 byte. */
typedef struct kvmix_error {
  kvmix_code code;
  char text[508];
} kvmix_error;

/* "invalid argument"; "unknown code" for a number that is no code. */
KVMIX_API const char* kvmix_code_name(kvmix_code code);

KVMIX_API const char* kvmix_version(void); /* "0.1.0" */

/* The name of the i-th instruction set that this CPU runs, the best first ("AVX3_DL", "AVX2", ...);
 * null past the last one, of which there is at least one. "AMX" comes first where the operating
 * system lets this process use AMX's tiles, which the first call asks for unless KVMIX_AMX=0 is in
 * the environment. A `target` is one of these names; null or "" stands for the best. */
KVMIX_API const char* kvmix_target(size_t i);

/* ---- threads */

/* run: calls part(job, 0), ..., part(job, parts - 1), each once, on any threads, in any order, and
 * returns when all of them have returned. A part neither throws nor waits for another part. Where
 * run is null, or a pointer to a runner is, the calling thread does everything.
 * threads: how many parts run at a time, about. The library gives each thread neighbouring work by
 * it; no result depends on it. */
typedef struct kvmix_runner {
  void (*run)(void* self, size_t parts, void (*part)(void* job, size_t index), void* job);
  void* self;
  size_t threads;
} kvmix_runner;

/* OpenMP's threads; 0: OpenMP's default (OMP_NUM_THREADS, say), but no more than the CPUs that this
 * process may use. A part that calls this runner runs everything itself. So does the child of a
 * fork, where OpenMP's threads are gone. (A child cannot know what it inherits if its parent used
 * OpenMP, but never this runner.) In a library that was built without OpenMP: this thread. */
KVMIX_API kvmix_runner kvmix_openmp_runner(size_t threads);
/* Whether the library was built with OpenMP. */
KVMIX_API int kvmix_has_openmp(void);

/* A pool of threads, which sleep between calls. Many threads may use one pool at a time: the pool
 * works for one call, and a call that comes meanwhile, or from inside a part, runs on the thread
 * that made it. So does every call in the child of a fork. */
typedef struct kvmix_threads kvmix_threads;

/* Microseconds that a thread of a pool looks for the next call before it sleeps, as long as calls
 * keep coming within that time; where they do not, an eighth of it. */
enum { KVMIX_SPIN_US = 100 };

/* `threads` threads, the caller of a run being one of them; 0: as many as this process may use.
 * Where threads outnumber the CPUs, nobody spins. Null: the system does not give so many. */
KVMIX_API kvmix_threads* kvmix_threads_create(size_t threads, unsigned spin_us);
/* Recalls lent threads, and returns when all have left. No call may be under way. Null: nothing. */
KVMIX_API void kvmix_threads_destroy(kvmix_threads* threads);
/* Valid as long as the pool. Its `threads` counts the threads that are lent at this moment. */
KVMIX_API kvmix_runner kvmix_threads_runner(kvmix_threads* threads);
/* The calling thread works in the pool, and returns after the next recall. */
KVMIX_API void kvmix_threads_lend(kvmix_threads* threads);
/* Threads that are lent now return when they have finished their part; nobody waits for that. */
KVMIX_API void kvmix_threads_recall(kvmix_threads* threads);

/* ---- rows: tensors on their way in and out */

/* [tokens, heads, head_dim]: channel c of head h of token t is element t * token_stride + h *
 * head_stride + c of `data`. Strides are in elements and may be negative. */
typedef struct kvmix_rows {
  const void* data;
  kvmix_dtype dtype;
  size_t tokens, heads, head_dim;
  ptrdiff_t token_stride, head_stride;
} kvmix_rows;

/* A place for rows, laid out in the same way; the call knows the shape. Strides that are both 0
 * stand for C order without gaps. Rows may overlap neither each other nor what the call reads. f16
 * and bf16 are rounded to nearest even. */
typedef struct kvmix_out {
  void* data;
  kvmix_dtype dtype;
  ptrdiff_t token_stride, head_stride;
} kvmix_out;

/* ---- codecs: how one KV head's K or V is stored (kvmix/codec.h has the formula) */

/* Vectors have head_dim numbers, shaping has head_dim * head_dim, where `steps` asks for them;
 * elsewhere they are null, of size 0. */
typedef struct kvmix_codec {
  size_t struct_size;
  kvmix_storage storage;
  kvmix_scale scale;
  kvmix_operands operands; /* what attention multiplies the codes with */
  uint32_t steps;          /* kvmix_step, added up */
  float head_scale;        /* the scale itself, of KVMIX_SCALE_HEAD */
  const float *mean, *factor, *shaping;
  size_t mean_size, factor_size, shaping_size;
} kvmix_codec;

/* "i8-token-bf16+hadamard" -> storage, scale, operands and steps; nothing else is written. */
KVMIX_API kvmix_code kvmix_codec_parse(const char* name, kvmix_codec* codec, kvmix_error* error);
/* The inverse, cut to `size` bytes with the 0 at its end. Returns the length of the whole name. */
KVMIX_API size_t kvmix_codec_name(const kvmix_codec* codec, char* name, size_t size);
/* The codec exists, fits head_dim, and has its numbers. */
KVMIX_API kvmix_code kvmix_codec_check(const kvmix_codec* codec, size_t head_dim,
                                       kvmix_error* error);
/* Bytes of one row's codes; and with its stored scale. */
KVMIX_API size_t kvmix_codec_row_bytes(const kvmix_codec* codec, size_t head_dim);
KVMIX_API size_t kvmix_codec_token_bytes(const kvmix_codec* codec, size_t head_dim);

/* ---- plans: a model's layers, and a codec for every KV head's K and V */

typedef struct kvmix_layer {
  size_t struct_size;
  size_t kv_heads;     /* 0: a layer without K and V */
  size_t query_heads;  /* a multiple of kv_heads */
  size_t k_dim, v_dim; /* head_dim of Q and K; of V and the output */
  size_t reads;        /* 1 + the earlier layer whose K and V this one reads; 0: it has its own */
  size_t window;       /* as in kvmix_sight, like the fields after it */
  float scale;         /* 0: 1 / sqrt(k_dim) */
  float soft_cap;
  const float* sinks;
  size_t sinks_size; /* query_heads, or 0 */
} kvmix_layer;

/* A query's view of a layer: it sees the tokens up to its own that are inside the window, and its
 * score for one is scale * q . k. kvmix_cache_sight gives a layer's own: change it, and hand it in.
 */
typedef struct kvmix_sight {
  size_t struct_size;
  int32_t causal;              /* 0: a query also sees the tokens after it */
  kvmix_residence residence;   /* a hint about speed */
  size_t window;               /* a query sees this many last tokens, itself included; 0: all */
  size_t bidirectional_prefix; /* the first tokens that see each other both ways; 0: none */
  float scale;                 /* above 0 */
  float soft_cap;              /* s -> soft_cap * tanh(s / soft_cap); 0: none */
  const float* sinks;          /* [query_heads] logits that take weight but have no V; null: none */
} kvmix_sight;

typedef struct kvmix_plan kvmix_plan;

/* The layers are those of a model: at least one with K and V of its own, every number in its
 * range. */
KVMIX_API kvmix_code kvmix_layers_check(const kvmix_layer* layers, size_t count,
                                        kvmix_error* error);
/* The words for a model's shape, as kvmix_codec_name gives them: "24 layers x 2 KV heads x 64, 14
 * query heads"; unlike layers in groups. */
KVMIX_API size_t kvmix_layers_name(const kvmix_layer* layers, size_t count, char* text,
                                   size_t size);

/* A plan file's text, which needs no 0 byte at its end. folder: the place of the matrices of a plan
 * with the step +shape; null: such a plan is refused. */
KVMIX_API kvmix_code kvmix_plan_parse(const char* text, size_t bytes, const char* folder,
                                      kvmix_plan** out, kvmix_error* error);
KVMIX_API kvmix_code kvmix_plan_load(const char* path, kvmix_plan** out, kvmix_error* error);
/* Writes `path` whole, or leaves it untouched. */
KVMIX_API kvmix_code kvmix_plan_save(const kvmix_plan* plan, const char* path, kvmix_error* error);

/* A plan made by hand: f16 in every head, then other codecs. All is copied. kv_head KVMIX_ALL: all
 * heads of the layer. */
#define KVMIX_ALL SIZE_MAX
KVMIX_API kvmix_code kvmix_plan_create(const kvmix_layer* layers, size_t count, kvmix_plan** out,
                                       kvmix_error* error);
KVMIX_API kvmix_code kvmix_plan_set_codec(kvmix_plan* plan, size_t layer, size_t kv_head,
                                          kvmix_tensor tensor, const kvmix_codec* codec,
                                          kvmix_error* error);
/* The first tokens of every layer, at most KVMIX_MOST_EXACT_FIRST, are kept in f16 as well. */
KVMIX_API kvmix_code kvmix_plan_set_exact_first(kvmix_plan* plan, size_t tokens,
                                                kvmix_error* error);
/* Tokens of a stretch (kvmix/plan.h): 16, 32, 64, 128, 256, or 0. Codecs with the step own-centre
 * need one: set it before them. */
KVMIX_API kvmix_code kvmix_plan_set_exact_newest(kvmix_plan* plan, size_t tokens,
                                                 kvmix_error* error);
KVMIX_API void kvmix_plan_destroy(kvmix_plan* plan);

/* The parts of a plan. Pointers in a layer, codec or provenance last as long as the plan,
 * unless it is changed. */
KVMIX_API size_t kvmix_plan_layers(const kvmix_plan* plan);
KVMIX_API size_t kvmix_plan_exact_first(const kvmix_plan* plan);
KVMIX_API size_t kvmix_plan_exact_newest(const kvmix_plan* plan);
KVMIX_API kvmix_code kvmix_plan_layer(const kvmix_plan* plan, size_t layer, kvmix_layer* out,
                                      kvmix_error* error);
KVMIX_API kvmix_code kvmix_plan_codec(const kvmix_plan* plan, size_t layer, size_t kv_head,
                                      kvmix_tensor tensor, kvmix_codec* out, kvmix_error* error);
/* A hash of all that decides the meaning of stored bytes. */
KVMIX_API uint64_t kvmix_plan_fingerprint(const kvmix_plan* plan);

/* The size of a context over all layers and heads. context 0: one token that every window lets
 * through. f16 takes 2 bytes a number. */
typedef struct kvmix_plan_size {
  size_t struct_size;
  uint64_t k_bytes, v_bytes, k_numbers, v_numbers;
} kvmix_plan_size;
KVMIX_API kvmix_code kvmix_plan_measure(const kvmix_plan* plan, size_t context,
                                        kvmix_plan_size* out, kvmix_error* error);

/* The origin of a plan's numbers; null strings and zeros where unknown. */
typedef struct kvmix_fidelity {
  double worst_cosine, mean_cosine, worst_nmse, mean_nmse;
  size_t worst_layer, worst_query_head;
} kvmix_fidelity;
typedef struct kvmix_provenance {
  size_t struct_size;
  const char *model, *calibration, *holdout;
  size_t calibration_tokens, longest_prompt, holdout_tokens;
  kvmix_fidelity on_calibration, on_holdout;
} kvmix_provenance;
KVMIX_API kvmix_code kvmix_plan_provenance(const kvmix_plan* plan, kvmix_provenance* out,
                                           kvmix_error* error);
KVMIX_API kvmix_code kvmix_plan_set_provenance(kvmix_plan* plan, const kvmix_provenance* from,
                                               kvmix_error* error);

/* ---- pools: memory for many caches of one plan */

typedef struct kvmix_pool kvmix_pool;
typedef struct kvmix_pool_options {
  size_t struct_size;
  size_t bytes;             /* of pages in use, at most; 0: all that this process may have */
  size_t rollback;          /* tokens beyond its window that a layer keeps, for truncate */
  const char* target;       /* kvmix_target */
  const kvmix_pool* beside; /* a pool whose memory and bound this one shares; null: its own */
} kvmix_pool_options;

/* options: null for the defaults. The pool lives on until its last cache is destroyed. */
KVMIX_API kvmix_code kvmix_pool_create(const kvmix_plan* plan, const kvmix_pool_options* options,
                                       kvmix_pool** out, kvmix_error* error);
KVMIX_API void kvmix_pool_destroy(kvmix_pool* pool);
KVMIX_API const char* kvmix_pool_target(const kvmix_pool* pool);
KVMIX_API size_t kvmix_pool_bytes(const kvmix_pool* pool); /* of pages in use */
KVMIX_API size_t kvmix_pool_max_bytes(const kvmix_pool* pool);

/* ---- caches: one sequence each (kvmix/cache.h says more of every function) */

typedef struct kvmix_cache kvmix_cache;

/* Room for `capacity` tokens in every layer; memory is taken as tokens come. */
KVMIX_API kvmix_code kvmix_cache_create(const kvmix_pool* pool, size_t capacity, kvmix_cache** out,
                                        kvmix_error* error);
/* The same in a pool of its own. KVMIX_OUT_OF_MEMORY: this process could never hold so much. */
KVMIX_API kvmix_code kvmix_cache_create_alone(const kvmix_plan* plan, size_t capacity,
                                              const kvmix_pool_options* options, kvmix_cache** out,
                                              kvmix_error* error);
/* Another sequence that begins with the same tokens; pages are shared until one side writes them.
 */
KVMIX_API kvmix_code kvmix_cache_fork(const kvmix_cache* cache, kvmix_cache** out,
                                      kvmix_error* error);
KVMIX_API void kvmix_cache_destroy(kvmix_cache* cache);

KVMIX_API const char* kvmix_cache_target(const kvmix_cache* cache);
KVMIX_API size_t kvmix_cache_capacity(const kvmix_cache* cache);
KVMIX_API size_t kvmix_cache_tokens(const kvmix_cache* cache, size_t layer);
KVMIX_API size_t kvmix_cache_forgotten(const kvmix_cache* cache, size_t layer);
KVMIX_API size_t kvmix_cache_bytes(const kvmix_cache* cache);
KVMIX_API uint64_t kvmix_cache_saturated(const kvmix_cache* cache);

/* Rows of new tokens at the end of a layer: k [tokens, kv_heads, k_dim], v [tokens, kv_heads,
 * v_dim]. KVMIX_PAST_CAPACITY, KVMIX_POOL_FULL: nothing is appended. */
KVMIX_API kvmix_code kvmix_cache_append(kvmix_cache* cache, size_t layer, const kvmix_rows* k,
                                        const kvmix_rows* v, const kvmix_runner* runner,
                                        kvmix_error* error);
/* Row t into cells[t] ([count], below the capacity), for engines that place tokens themselves. */
KVMIX_API kvmix_code kvmix_cache_store(kvmix_cache* cache, size_t layer, const int64_t* cells,
                                       size_t count, const kvmix_rows* k, const kvmix_rows* v,
                                       kvmix_error* error);
/* Drops all but the first `tokens` tokens of every layer. */
KVMIX_API kvmix_code kvmix_cache_truncate(kvmix_cache* cache, size_t tokens, kvmix_error* error);
/* No query sees this layer's tokens before `first` again. */
KVMIX_API kvmix_code kvmix_cache_forget(kvmix_cache* cache, size_t layer, size_t first,
                                        kvmix_error* error);

/* Rotary position embedding: pair p of a key's channels turns by position * frequency[p]. */
typedef struct kvmix_rope {
  size_t struct_size;
  size_t dims;               /* the first channels of a head, which are turned; 0: all */
  double theta;              /* frequency[p] = theta^(-2 p / dims) */
  const double* frequencies; /* instead of theta's; or null */
  size_t frequencies_size;   /* dims / 2, or 0 */
  int32_t neighbours;        /* 1: pairs are channels 2p and 2p + 1; 0: p and p + dims / 2 */
} kvmix_rope;
/* Forgets tokens [keep, keep + drop) of every layer and moves later ones back. ropes: [count], one
 * for all layers or one for each. */
KVMIX_API kvmix_code kvmix_cache_shift(kvmix_cache* cache, size_t keep, size_t drop,
                                       const kvmix_rope* ropes, size_t count, kvmix_error* error);

/* The numbers that codes stand for: tokens [first, first + count) of K or V, to out [count,
 * kv_heads, dim]. */
KVMIX_API kvmix_code kvmix_cache_decode(const kvmix_cache* cache, size_t layer, kvmix_tensor tensor,
                                        size_t first, size_t count, const kvmix_out* out,
                                        kvmix_error* error);
/* Canonical rows, the same bytes on every CPU: codes [count][row_bytes], scales [count] where the
 * codec stores them. Import appends them to every KV head of a layer. */
KVMIX_API size_t kvmix_cache_row_bytes(const kvmix_cache* cache, size_t layer, size_t kv_head,
                                       kvmix_tensor tensor);
KVMIX_API kvmix_code kvmix_cache_export(const kvmix_cache* cache, size_t layer, size_t kv_head,
                                        kvmix_tensor tensor, size_t first, size_t count,
                                        void* codes, float* scales, kvmix_error* error);
KVMIX_API kvmix_code kvmix_cache_import(kvmix_cache* cache, size_t layer, size_t count,
                                        const void* const* k_codes, const float* const* k_scales,
                                        const void* const* v_codes, const float* const* v_scales,
                                        kvmix_error* error);

/* Sessions: all that a cache holds, to a file or a function and back, on any CPU. write and read
 * return 0 when they moved all `bytes`. */
KVMIX_API kvmix_code kvmix_cache_save(const kvmix_cache* cache, const char* path,
                                      kvmix_error* error);
KVMIX_API kvmix_code kvmix_cache_load(kvmix_cache* cache, const char* path, kvmix_error* error);
KVMIX_API kvmix_code kvmix_cache_write(const kvmix_cache* cache,
                                       int (*write)(void* self, const void* data, size_t bytes),
                                       void* self, kvmix_error* error);
KVMIX_API kvmix_code kvmix_cache_read(kvmix_cache* cache,
                                      int (*read)(void* self, void* data, size_t bytes), void* self,
                                      kvmix_error* error);

/* ---- attention (kvmix/attention.h says what it computes, and how exactly) */

/* A number for every query and cell, added to the score; -inf hides the cell. */
typedef struct kvmix_mask {
  const void* data; /* query i, cell c: element i * stride + c; null: no mask */
  kvmix_dtype dtype;
  size_t queries, cells;
  ptrdiff_t stride;
  const float* slopes; /* [query_heads] factors of the numbers (ALiBi); null: 1 */
} kvmix_mask;

KVMIX_API kvmix_code kvmix_cache_sight(const kvmix_cache* cache, size_t layer, kvmix_sight* out,
                                       kvmix_error* error);
/* Query i of n stands at the place of token tokens - n + i. q [queries, query_heads, k_dim], out
 * [queries, query_heads, v_dim]. sight: null for the layer's own. */
KVMIX_API kvmix_code kvmix_cache_attend(const kvmix_cache* cache, size_t layer, const kvmix_rows* q,
                                        const kvmix_out* out, const kvmix_sight* sight,
                                        const kvmix_runner* runner, kvmix_error* error);

typedef struct kvmix_attend_request {
  size_t struct_size;
  const kvmix_cache* cache;
  kvmix_rows q;
  kvmix_out out;
  float* log_sum_exp; /* [queries, query_heads], or null */
  kvmix_mask mask;
  /* [queries], with a mask: the cell of a query's own token, whose stretch it sees exactly; -1:
   * none. Null: query i of n stands at cell tokens - n + i. */
  const int64_t* cells;
} kvmix_attend_request;
/* Many sequences of one pool in one call. Shared pages are read once. */
KVMIX_API kvmix_code kvmix_attend(const kvmix_attend_request* requests, size_t count, size_t layer,
                                  const kvmix_sight* sight, const kvmix_runner* runner,
                                  kvmix_error* error);

typedef struct kvmix_append_request {
  size_t struct_size;
  kvmix_cache* cache;
  kvmix_rows k, v;
} kvmix_append_request;
/* Appends to one layer of many caches, each named once. */
KVMIX_API kvmix_code kvmix_append(const kvmix_append_request* requests, size_t count, size_t layer,
                                  const kvmix_runner* runner, kvmix_error* error);

/* Outputs of the same queries over disjoint tokens become the output over all of them: out [rows,
 * dim] and log_sum_exp [rows] are merged with the others. */
KVMIX_API kvmix_code kvmix_merge_outputs(float* out, float* log_sum_exp, const float* other_out,
                                         const float* other_log_sum_exp, size_t rows, size_t dim,
                                         kvmix_error* error);

/* ---- rows without a cache (kvmix/quantize.h) */

/* A codec made ready for one instruction set. Many threads may use it. */
typedef struct kvmix_row_codec kvmix_row_codec;
KVMIX_API kvmix_code kvmix_row_codec_create(const kvmix_codec* codec, size_t head_dim,
                                            const char* target, kvmix_row_codec** out,
                                            kvmix_error* error);
KVMIX_API void kvmix_row_codec_destroy(kvmix_row_codec* codec);
/* Rows of one head: codes [tokens][row_bytes], scales [tokens] where they are stored. `clamped`, if
 * not null, is how many values were beyond the format. */
KVMIX_API kvmix_code kvmix_quantize(const kvmix_row_codec* codec, const kvmix_rows* rows,
                                    void* codes, float* scales, uint64_t* clamped,
                                    kvmix_error* error);
KVMIX_API kvmix_code kvmix_dequantize(const kvmix_row_codec* codec, const void* codes,
                                      const float* scales, size_t tokens, const kvmix_out* out,
                                      kvmix_error* error);
/* Error sums of the numbers that codes stand for, against the rows. */
typedef struct kvmix_errors {
  uint64_t count;
  double sum_squared_error, max_error, max_abs;
} kvmix_errors;
KVMIX_API kvmix_code kvmix_quantize_errors(const kvmix_row_codec* codec, const kvmix_rows* rows,
                                           const void* codes, const float* scales,
                                           kvmix_errors* out, kvmix_error* error);
/* The scale that covers these rows of one head. The codec's own head_scale is not looked at. */
KVMIX_API kvmix_code kvmix_head_scale(const kvmix_codec* codec, const kvmix_rows* rows, float* out,
                                      kvmix_error* error);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KVMIX_KVMIX_H_ */
