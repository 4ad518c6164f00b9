// Enums and limits that every part of kvmix shares: C callers, C++ callers and the kernels. Plain
// C11. Files hold some of the numbers, so a number keeps its meaning and is never given again.
#ifndef KVMIX_TYPES_H_
#define KVMIX_TYPES_H_

#include <stddef.h>
#include <stdint.h>

// The most channels of a row: i32 sums of 16-bit by 8-bit products stay exact up to here.
#define KVMIX_MAX_HEAD_DIM 512
// The most layers of a model, and the most heads of a layer.
#define KVMIX_MAX_COUNT 65536
// The most first tokens that a plan can keep as f16.
#define KVMIX_MOST_EXACT_FIRST 64

// C++ must be told that an enum may hold any int, as C's may.
#ifdef __cplusplus
#define KVMIX_ANY_INT : int
#else
#define KVMIX_ANY_INT
#endif

typedef enum kvmix_dtype KVMIX_ANY_INT {  // numbers as they come in and go out
  KVMIX_F16 = 0,
  KVMIX_BF16 = 1,
  KVMIX_F32 = 2,
} kvmix_dtype;

typedef enum kvmix_tensor KVMIX_ANY_INT { KVMIX_K = 0, KVMIX_V = 1 } kvmix_tensor;

typedef enum kvmix_storage KVMIX_ANY_INT {
  KVMIX_STORAGE_F16 = 0,
  KVMIX_STORAGE_I8 = 1,
  KVMIX_STORAGE_I6 = 2,  // it and those below: a scale per token; head_dim is a multiple of 4
  KVMIX_STORAGE_I4 = 3,  // head_dim is a multiple of 2
  KVMIX_STORAGE_I3 = 4,  // head_dim is a multiple of 8
} kvmix_storage;

typedef enum kvmix_scale KVMIX_ANY_INT {
  KVMIX_SCALE_NONE = 0,  // f16 has no scale
  // One per KV head, fixed by the plan ("global" in the study); values beyond it saturate.
  KVMIX_SCALE_HEAD = 1,
  KVMIX_SCALE_TOKEN = 2,       // one per token and KV head, f32, stored beside the codes
  KVMIX_SCALE_TOKEN_BF16 = 3,  // the same as bf16, i8's rounded up, i4's to nearest
} kvmix_scale;

// Steps that numbers take before they are stored (kvmix/codec.h); a codec's are added up.
typedef enum kvmix_step KVMIX_ANY_INT {
  KVMIX_STEP_CENTRE = 1,
  KVMIX_STEP_FOLD = 2,
  KVMIX_STEP_HADAMARD = 4,
  KVMIX_STEP_SHAPE = 8,
  KVMIX_STEP_OWN_CENTRE = 16,  // of K, in a plan that keeps the newest tokens exact
} kvmix_step;

// The place of a layer's tiles when a call of attention begins. It changes the speed, never the
// result.
typedef enum kvmix_residence KVMIX_ANY_INT {
  // One query: memory, for a model's other layers pass through the caches between two steps. More
  // queries: by the layer's bytes against L2.
  KVMIX_RESIDENCE_AUTO = 0,
  KVMIX_RESIDENCE_L2 = 1,      // this core's L2 cache
  KVMIX_RESIDENCE_MEMORY = 2,  // memory, or a cache that is shared
} kvmix_residence;

// The outcome of a call.
typedef enum kvmix_code KVMIX_ANY_INT {
  KVMIX_OK = 0,
  KVMIX_INVALID_ARGUMENT = 1,  // a parameter outside its documented range
  KVMIX_NOT_FOUND = 2,         // no such file, tensor, layer
  KVMIX_IO = 3,                // reading or writing failed
  KVMIX_CORRUPT = 4,           // a file that breaks its own format
  KVMIX_NEWER_VERSION = 5,     // a file of a newer major version
  KVMIX_MISMATCH = 6,          // two things that should agree do not (models, shapes)
  KVMIX_NON_FINITE = 7,        // NaN or Inf in the data
  KVMIX_OUT_OF_MEMORY = 8,     // more memory asked for than this process may have
  KVMIX_POOL_FULL = 9,         // evict another cache, and try again
  KVMIX_PAST_CAPACITY = 10,    // the cache was made for fewer tokens
  KVMIX_INFEASIBLE = 11,       // no plan holds the constraints
  KVMIX_CANCELLED = 12,        // the caller asked to stop
  KVMIX_INTERNAL = 13,         // a bug of kvmix
} kvmix_code;

// What codes are multiplied with, q (K) or the softmax weights (V), in fixed point of 16 or 8 bits.
typedef enum kvmix_operands KVMIX_ANY_INT {
  KVMIX_OPERANDS_USUAL = 0,  // 16 bits for i8, 8 for those below; f16 is multiplied with f32
  KVMIX_OPERANDS_8 = 1,      // i8 alone
  KVMIX_OPERANDS_16 = 2,     // those below i8 alone
} kvmix_operands;

// Bytes of a number: 2 or 4. 0 if there is no such dtype.
static inline size_t kvmix_dtype_bytes(kvmix_dtype dtype) {
  switch (dtype) {
    case KVMIX_F16:
    case KVMIX_BF16:
      return 2;
    case KVMIX_F32:
      return 4;
  }
  return 0;
}

// Bits of a code, or of f16's number: 16, 8, 6, 4 or 3. 0 if there is no such storage.
static inline size_t kvmix_storage_bits(kvmix_storage storage) {
  switch (storage) {
    case KVMIX_STORAGE_F16:
      return 16;
    case KVMIX_STORAGE_I8:
      return 8;
    case KVMIX_STORAGE_I6:
      return 6;
    case KVMIX_STORAGE_I4:
      return 4;
    case KVMIX_STORAGE_I3:
      return 3;
  }
  return 0;
}

#ifdef __cplusplus
namespace kvmix {

using Dtype = kvmix_dtype;
using Tensor = kvmix_tensor;
using Storage = kvmix_storage;
using Scale = kvmix_scale;
using Residence = kvmix_residence;
using Operands = kvmix_operands;

}  // namespace kvmix
#endif

#endif  // KVMIX_TYPES_H_
