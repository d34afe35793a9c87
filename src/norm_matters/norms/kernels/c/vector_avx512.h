/* Sixteen floats at a time: AVX-512 with the F, BW, DQ and VL instructions. vector_generic.h says what each does. */
#include <immintrin.h>

enum { LANES = 16 };
typedef __m512 vector;
typedef __mmask16 lanes;

INLINE lanes first_lanes(int64_t count) { return (lanes)((1u << count) - 1); }
INLINE vector keep(vector a, lanes kept) { return _mm512_maskz_mov_ps(kept, a); }
INLINE vector broadcast(float a) { return _mm512_set1_ps(a); }
INLINE float total(vector a) { return _mm512_reduce_add_ps(a); }

INLINE vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vector absolute(vector a) { return _mm512_abs_ps(a); }
INLINE vector where_positive(vector a, vector b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), b);
}
INLINE vector rectify(vector a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }
INLINE vector signed_like(vector a, vector d) {
    vector changed = _mm512_xor_ps(a, _mm512_and_ps(d, _mm512_set1_ps(-0.0f)));
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NEQ_UQ), changed);
}

INLINE vector load_float(const float *from) { return _mm512_loadu_ps(from); }
INLINE vector load_float_first(const float *from, lanes kept) { return _mm512_maskz_loadu_ps(kept, from); }
INLINE void store_float(float *to, vector a) { _mm512_storeu_ps(to, a); }
INLINE void store_float_first(float *to, vector a, lanes kept) { _mm512_mask_storeu_ps(to, kept, a); }
INLINE void stream_float(float *to, vector a) { _mm512_stream_ps(to, a); }

INLINE vector widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
INLINE __m256i narrow(vector a) {
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
INLINE vector load_bfloat(const uint16_t *from) { return widen(_mm256_loadu_si256((const __m256i *)from)); }
INLINE vector load_bfloat_first(const uint16_t *from, lanes kept) {
    return widen(_mm256_maskz_loadu_epi16(kept, from));
}
INLINE void store_bfloat(uint16_t *to, vector a) { _mm256_storeu_si256((__m256i *)to, narrow(a)); }
INLINE void store_bfloat_first(uint16_t *to, vector a, lanes kept) { _mm256_mask_storeu_epi16(to, kept, narrow(a)); }
INLINE void stream_bfloat(uint16_t *to, vector a) { _mm256_stream_si256((__m256i *)to, narrow(a)); }
INLINE void finish_streams(void) { _mm_sfence(); }
