/* What cpu.py calls. Pointers are NULL where a tensor is not given. Functions return 0, or 1 without memory. */
#ifndef NORM_MATTERS_INTERFACE_H
#define NORM_MATTERS_INTERFACE_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { INTERFACE = 1 }; /* goes up with every change here; cpu.py compares */

enum statistic { STATISTIC_MEAN, STATISTIC_L1, STATISTIC_L2 };
enum flags { CHANNELS_LAST = 1, BFLOAT = 2, RELU = 4 };

EXPORT int nm_interface(void);

/* Take the functions GOMP_parallel, omp_get_thread_num and omp_get_num_threads of torch's OpenMP runtime. */
EXPORT void nm_use_openmp(void *parallel, void *thread_num, void *num_threads);

/* Use the named instruction set, or the best there is with NULL; returns what is used, NULL where the machine has not
 * got it. */
EXPORT const char *nm_use_simd(const char *name);
EXPORT const char *nm_current_simd(void);

/* (images, channels, pixels); stats is (5, channels): mean, sigma, slope sum and two rows that are set to 0. */
EXPORT int nm_forward(const void *x, const void *residual, void *y, const float *weight, const float *bias,
                      float *stats, int64_t images, int64_t channels, int64_t pixels, int flags, int statistic,
                      double constant, double eps, int threads);

/* The y of nm_forward, by its stats. */
EXPORT int nm_apply(const void *x, const void *residual, void *y, const float *weight, const float *bias,
                    const float *stats, int64_t images, int64_t channels, int64_t pixels, int flags, double eps,
                    int threads);

/* out and dresidual are given where ReLU stood behind norm + residual. */
EXPORT int nm_backward(const void *grad, const void *x, const void *out, void *dx, void *dresidual,
                       const float *weight, const float *bias, const float *stats, float *dweight, float *dbias,
                       int64_t images, int64_t channels, int64_t pixels, int flags, int statistic, double constant,
                       double eps, int threads);

#endif
