/* What the driver (kernels.c) and the loops (simd_*.c: one source, compiled for several instruction sets) share. */
#ifndef NORM_MATTERS_SIMD_H
#define NORM_MATTERS_SIMD_H

#include <stdint.h>

/* Sums over the values of a channel, two at a time. d = x - mean, S the sum, g the gradient where ReLU passed it on. */
enum reduction {
    MEAN,             /* the mean; 0 */
    MOMENTS,          /* the mean; S of the squared deviations from it */
    DEVIATIONS,       /* S |d|; S sign(d) */
    GRADIENT,         /* S g; S g d, as the next two */
    GRADIENT_OF_RELU, /* ReLU's mask is made again from x */
    GRADIENT_OF_SUM,  /* ReLU stood behind norm + residual: its mask is out > 0, and g is written to dresidual */
    REDUCTIONS
};

/* One value for each value. */
enum map {
    NORMALISE, /* y = (x - mean) scale + bias, then + residual, ReLU */
    NORMALISE_RELU,
    NORMALISE_ADD,
    NORMALISE_ADD_RELU,
    RETURN_MEAN, /* dx = g scale + offset, then + slope sign(d) (l1), + slope d (l2) */
    RETURN_L1,
    RETURN_L2,
    RETURN_MEAN_RELU, /* the same with ReLU's mask made again from x */
    RETURN_L1_RELU,
    RETURN_L2_RELU,
    MAPS
};

/* All of one shape, dtype (float or bfloat16) and layout. */
struct tensors {
    const void *x, *residual, *grad, *out;
    void *y, *dresidual; /* y: what a map writes, dx in the backward pass */
};

/* Numbers for each channel, or for each column of a region. */
struct coefficients {
    float *mean, *scale, *bias, *slope, *offset;
};

/* A part of the tensors: rows of `width` values that lie together, `stride` values from one row to the next.
 *
 * Plane: one channel; a row is the pixels of one image.
 * Columns: several channels; column j of every row belongs to channel (j / pixels) % channels. width = repeats
 * channels pixels. In channels_last pixels is 1 and several of the tensor's rows are taken for one where they are
 * short; else repeats is 1.
 */
struct region {
    int64_t start, rows, stride, width, channels, pixels, repeats;
    int columns;
};

/* Room for the sums of one region, width + SPARE values each; used for columns only. */
struct sums {
    float *first, *second;
    double *mean, *square;
};

enum { SPARE = 16 };                /* loads at the end of a row may reach so much too far */
enum { PLANE_PIXELS = 256 };        /* channels with fewer pixels an image are taken as columns */
enum { COLUMNS_AT_ONCE = 128 };     /* and channels_last rows are joined to have at least so many */

/* reverse: from the last row to the first, which finds what an earlier loop left in the caches. */
typedef void reducer(const struct tensors *, const struct region *, const struct coefficients *, int reverse,
                     const struct sums *, double *first, double *second); /* for each channel of the region */
typedef void mapper(const struct tensors *, const struct region *, const struct coefficients *, int reverse,
                    int stream);

/* The loops for one instruction set, by operation and dtype (float, bfloat16). */
struct simd {
    const char *name;
    reducer *reduce[REDUCTIONS][2];
    mapper *map[MAPS][2];
};

extern const struct simd simd_baseline;
#if defined(__x86_64__)
extern const struct simd simd_avx2, simd_avx512;
#endif

#endif
