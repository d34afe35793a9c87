/* Four floats at a time, by the vector extensions of GCC and Clang alone: SSE2 on x86-64, NEON on aarch64.
 *
 * Each vector_*.h gives the same names. `lanes` says which lanes of the last, partial vector of a row count: the first
 * ones. The loads put 0 into the others and the stores leave memory there alone. +, - and * are the language's own.
 */
#include <string.h>

enum { LANES = 4 };
typedef float vector __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(8)));
typedef int lanes;

INLINE lanes first_lanes(int64_t count) { return (lanes)count; }

/* a, with 0 in the lanes that do not count. */
INLINE vector keep(vector a, lanes kept) {
    words index = {0, 1, 2, 3}, limit = (words){0} + (uint32_t)kept;
    return (vector)((words)a & (words)(index < limit));
}
INLINE vector broadcast(float a) { return (vector){a, a, a, a}; }

/* The sum over the lanes. */
INLINE float total(vector a) { return (a[0] + a[2]) + (a[1] + a[3]); }

/* a b + c; rounded once where the machine can, and alike wherever it stands. */
INLINE vector multiply_add(vector a, vector b, vector c) { return a * b + c; }
INLINE vector absolute(vector a) { return (vector)((words)a & 0x7fffffffu); }

/* b where a > 0, else 0. */
INLINE vector where_positive(vector a, vector b) { return (vector)((words)(a > 0.0f) & (words)b); }

/* max(a, 0); NaN stays. */
INLINE vector rectify(vector a) { return (vector)(~(words)(a < 0.0f) & (words)a); }

/* a sign(d), with sign(0) = 0. */
INLINE vector signed_like(vector a, vector d) {
    words changed = (words)a ^ ((words)d & 0x80000000u);
    return (vector)((words)(d != 0.0f) & changed);
}

INLINE vector load_float(const float *from) {
    vector a;
    memcpy(&a, from, sizeof a);
    return a;
}
INLINE vector load_float_first(const float *from, lanes kept) {
    vector a = {0};
    memcpy(&a, from, (size_t)kept * sizeof *from);
    return a;
}
INLINE void store_float(float *to, vector a) { memcpy(to, &a, sizeof a); }
INLINE void store_float_first(float *to, vector a, lanes kept) { memcpy(to, &a, (size_t)kept * sizeof *to); }

/* Store past the caches where the machine can; `to` is aligned to the size of what is stored. */
INLINE void stream_float(float *to, vector a) { store_float(to, a); }

/* A bfloat16 is the upper half of a float. Rounded to nearest, ties to even; NaN becomes the quiet NaN. */
INLINE vector widen(halves a) { return (vector)(__builtin_convertvector(a, words) << 16); }
INLINE halves narrow(vector a) {
    words bits = (words)a, rounded = bits + 0x7fffu + ((bits >> 16) & 1u), nan = (words)(a != a);
    return __builtin_convertvector((((nan & 0x7fc00000u) | (~nan & rounded)) >> 16), halves);
}
INLINE vector load_bfloat(const uint16_t *from) {
    halves a;
    memcpy(&a, from, sizeof a);
    return widen(a);
}
INLINE vector load_bfloat_first(const uint16_t *from, lanes kept) {
    halves a = {0};
    memcpy(&a, from, (size_t)kept * sizeof *from);
    return widen(a);
}
INLINE void store_bfloat(uint16_t *to, vector a) {
    halves rounded = narrow(a);
    memcpy(to, &rounded, sizeof rounded);
}
INLINE void store_bfloat_first(uint16_t *to, vector a, lanes kept) {
    halves rounded = narrow(a);
    memcpy(to, &rounded, (size_t)kept * sizeof *to);
}
INLINE void stream_bfloat(uint16_t *to, vector a) { store_bfloat(to, a); }
INLINE void finish_streams(void) {}
