/* The loops for one instruction set. A simd_*.c file defines INLINE, includes its vector_*.h, then this. */

#include "values.h"
#include "planes.h"
#include "columns.h"

INLINE void reduce_as(enum reduction what, int bfloat, const struct tensors *t, const struct region *region,
                      const struct coefficients *c, int reverse, const struct sums *sums, double *first,
                      double *second) {
    if (region->columns)
        reduce_columns(what, bfloat, t, region, c, reverse, sums, first, second);
    else
        reduce_plane(what, bfloat, t, region, c, reverse, first, second);
}

INLINE void map_as(enum map what, int bfloat, const struct tensors *t, const struct region *region,
                   const struct coefficients *c, int reverse, int stream) {
    if (stream && streamable(t->y, region, bfloat)) {
        if (region->columns)
            map_columns(what, bfloat, t, region, c, reverse, 1);
        else
            map_plane(what, bfloat, t, region, c, reverse, 1);
        finish_streams();
    } else if (region->columns) {
        map_columns(what, bfloat, t, region, c, reverse, 0);
    } else {
        map_plane(what, bfloat, t, region, c, reverse, 0);
    }
}

/* A function of its own for every operation and dtype. */
#define FOR_EACH_REDUCTION(DO) DO(MEAN) DO(MOMENTS) DO(DEVIATIONS) DO(GRADIENT) DO(GRADIENT_OF_RELU) DO(GRADIENT_OF_SUM)
#define FOR_EACH_MAP(DO)                                                                                               \
    DO(NORMALISE) DO(NORMALISE_RELU) DO(NORMALISE_ADD) DO(NORMALISE_ADD_RELU) DO(RETURN_MEAN) DO(RETURN_L1)            \
    DO(RETURN_L2) DO(RETURN_MEAN_RELU) DO(RETURN_L1_RELU) DO(RETURN_L2_RELU)

#define DEFINE_REDUCTION(what, bfloat, name)                                                                           \
    static void name(const struct tensors *t, const struct region *region, const struct coefficients *c, int reverse,  \
                     const struct sums *sums, double *first, double *second) {                                         \
        reduce_as(what, bfloat, t, region, c, reverse, sums, first, second);                                           \
    }
#define DEFINE_MAP(what, bfloat, name)                                                                                 \
    static void name(const struct tensors *t, const struct region *region, const struct coefficients *c, int reverse,  \
                     int stream) {                                                                                     \
        map_as(what, bfloat, t, region, c, reverse, stream);                                                           \
    }
#define DEFINE_REDUCTIONS(what) DEFINE_REDUCTION(what, 0, what##_FLOAT) DEFINE_REDUCTION(what, 1, what##_BFLOAT)
#define DEFINE_MAPS(what) DEFINE_MAP(what, 0, what##_FLOAT) DEFINE_MAP(what, 1, what##_BFLOAT)
FOR_EACH_REDUCTION(DEFINE_REDUCTIONS)
FOR_EACH_MAP(DEFINE_MAPS)

#define PAIR(what) [what] = {what##_FLOAT, what##_BFLOAT},
#define SIMD(name) {name, {FOR_EACH_REDUCTION(PAIR)}, {FOR_EACH_MAP(PAIR)}}
