// Rows of ggml's types, to and from numbers.
#ifndef KVMIX_ENGINES_LLAMA_CPP_ROWS_H_
#define KVMIX_ENGINES_LLAMA_CPP_ROWS_H_

#include <cstdint>
#include <cstring>

#include "ggml.h"

namespace kvmix::llama {

// A type that rows can be read from and written to.
inline bool IsRowType(ggml_type type) {
  return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 ||
         type == GGML_TYPE_Q8_0;
}

inline void CopyFloats(const void* from, float* to, std::int64_t n) {
  std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
}

// The function that reads a row of a type.
inline ggml_to_float_t ToFloats(ggml_type type) {
  return type == GGML_TYPE_F32 ? CopyFloats : ggml_get_type_traits(type)->to_float;
}

// As the engine itself writes a row.
inline void FromFloats(ggml_type type, const float* row, void* to, std::int64_t n) {
  if (type == GGML_TYPE_F32) {
    CopyFloats(row, static_cast<float*>(to), n);
  } else if (type == GGML_TYPE_F16) {
    ggml_fp32_to_fp16_row(row, static_cast<ggml_fp16_t*>(to), n);
  } else {
    ggml_get_type_traits(type)->from_float_ref(row, to, n);
  }
}

}  // namespace kvmix::llama

#endif  // KVMIX_ENGINES_LLAMA_CPP_ROWS_H_
