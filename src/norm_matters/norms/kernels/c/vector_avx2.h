/* Eight floats at a time: AVX2 and FMA. vector_generic.h says what each does. */
#include <immintrin.h>
#include <string.h>

enum { LANES = 8 };
typedef __m256 vector;
typedef struct {
    __m256i mask;
    int count;
} lanes;

INLINE lanes first_lanes(int64_t count) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (lanes){_mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), index), (int)count};
}
INLINE vector keep(vector a, lanes kept) { return _mm256_and_ps(a, _mm256_castsi256_ps(kept.mask)); }
INLINE vector broadcast(float a) { return _mm256_set1_ps(a); }
INLINE float total(vector a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

INLINE vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vector absolute(vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vector where_positive(vector a, vector b) {
    return _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ), b);
}
INLINE vector rectify(vector a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }
INLINE vector signed_like(vector a, vector d) {
    vector changed = _mm256_xor_ps(a, _mm256_and_ps(d, _mm256_set1_ps(-0.0f)));
    return _mm256_and_ps(_mm256_cmp_ps(d, _mm256_setzero_ps(), _CMP_NEQ_UQ), changed);
}

INLINE vector load_float(const float *from) { return _mm256_loadu_ps(from); }
INLINE vector load_float_first(const float *from, lanes kept) { return _mm256_maskload_ps(from, kept.mask); }
INLINE void store_float(float *to, vector a) { _mm256_storeu_ps(to, a); }
INLINE void store_float_first(float *to, vector a, lanes kept) { _mm256_maskstore_ps(to, kept.mask, a); }
INLINE void stream_float(float *to, vector a) { _mm256_stream_ps(to, a); }

INLINE vector widen(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
INLINE __m128i narrow(vector a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    rounded = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    return _mm256_castsi256_si128(rounded);
}
INLINE vector load_bfloat(const uint16_t *from) { return widen(_mm_loadu_si128((const __m128i *)from)); }
INLINE vector load_bfloat_first(const uint16_t *from, lanes kept) {
    uint16_t padded[8] = {0};
    memcpy(padded, from, (size_t)kept.count * sizeof *from);
    return load_bfloat(padded);
}
INLINE void store_bfloat(uint16_t *to, vector a) { _mm_storeu_si128((__m128i *)to, narrow(a)); }
INLINE void store_bfloat_first(uint16_t *to, vector a, lanes kept) {
    uint16_t padded[8];
    store_bfloat(padded, a);
    memcpy(to, padded, (size_t)kept.count * sizeof *to);
}
INLINE void stream_bfloat(uint16_t *to, vector a) { _mm_stream_si128((__m128i *)to, narrow(a)); }
INLINE void finish_streams(void) { _mm_sfence(); }
