#if defined(__x86_64__)
#include <string.h>

#include "simd.h"

#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define INLINE static inline __attribute__((always_inline))
#include "vector_avx2.h"

#include "loops.h"

const struct simd simd_avx2 = SIMD("avx2");

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
