/* Batch normalisation, forward and backward: the steps, what stands between them, and who does what.
 *
 * A call is a list of steps over the tensors: one or two reductions, then a map. After each reduction the numbers of a
 * channel are brought together in double (`finish`), before each step they are spread for its loops (`prepare`).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "interface.h"
#include "layout.h"
#include "parallel.h"

struct step {
    int is_map;
    enum reduction reduction;
    enum map map;
};

struct call {
    struct tensors tensors;
    struct layout layout;
    struct scratch scratch;
    const struct simd *simd;
    const float *weight, *bias;
    float *stats, *dweight, *dbias;
    int statistic, bfloat, backward, stream;
    double constant, eps;
    struct step steps[3];
    int step_count, step; /* step: the one at hand, where all threads do the same one */
};

enum { STAT_MEAN, STAT_SIGMA, STAT_SLOPE_SUM, STATS = 5 };

static const struct simd *chosen;

static double value(const struct call *call, const void *tensor, int64_t image, int64_t channel, int64_t pixel) {
    const struct layout *l = &call->layout;
    const int64_t at = l->channels_last ? (image * l->pixels + pixel) * l->channels + channel
                                        : (image * l->channels + channel) * l->pixels + pixel;
    if (!call->bfloat) return (double)((const float *)tensor)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)tensor)[at] << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return (double)wide;
}

/* The plain formulas in double, for a channel whose sums in float overflowed or met a NaN or an infinity. */
static double careful(const struct call *call, int64_t channel, int statistic, double mean) {
    const struct layout *l = &call->layout;
    double sum = 0;
    for (int64_t image = 0; image < l->images; image++)
        for (int64_t pixel = 0; pixel < l->pixels; pixel++) {
            const double d = value(call, call->tensors.x, image, channel, pixel) - mean;
            sum += statistic == STATISTIC_L1 ? fabs(d) : statistic == STATISTIC_L2 ? d * d : d;
        }
    return sum / ((double)l->images * (double)l->pixels);
}

/* Bring the moments of the chunks together, in their order. */
static void join_moments(const struct call *call, int64_t tile, int64_t channel, double *mean, double *square) {
    const struct layout *l = &call->layout;
    double seen = 0;
    *mean = *square = 0;
    for (int chunk = 0; chunk < l->chunks + l->rest; chunk++) {
        const struct region region = make_region(l, tile, chunk);
        const double values = (double)region_values(&region), before = seen;
        const int64_t at = chunk * l->channels + channel;
        seen += values;
        const double delta = call->scratch.first[at] - *mean, share = values / seen;
        *mean += delta * share;
        *square += call->scratch.second[at] + delta * delta * before * share;
    }
}

static void join_sums(const struct call *call, int64_t channel, double *first, double *second) {
    const struct layout *l = &call->layout;
    *first = *second = 0;
    for (int chunk = 0; chunk < l->chunks + l->rest; chunk++) {
        *first += call->scratch.first[chunk * l->channels + channel];
        *second += call->scratch.second[chunk * l->channels + channel];
    }
}

static void finish_forward(struct call *call, enum reduction what, int64_t tile, int64_t channel) {
    const int64_t channels = call->layout.channels;
    const double n = (double)call->layout.images * (double)call->layout.pixels;
    float *mean = call->stats + channel, *sigma = mean + STAT_SIGMA * channels,
          *slope_sum = mean + STAT_SLOPE_SUM * channels;
    double first, second;
    if (what == DEVIATIONS) {
        join_sums(call, channel, &first, &second);
        if (!isfinite(first)) first = n * careful(call, channel, STATISTIC_L1, (double)*mean);
        *sigma = (float)(call->constant * first / n);
        *slope_sum = (float)second;
        return;
    }
    join_moments(call, tile, channel, &first, &second);
    if (!isfinite(first) || !isfinite(second)) {
        first = careful(call, channel, STATISTIC_MEAN, 0.0);
        second = what == MOMENTS ? n * careful(call, channel, STATISTIC_L2, first) : 0.0;
    }
    *mean = (float)first;
    *sigma = what == MOMENTS ? (float)sqrt(second / n) : 1.0f;
    *slope_sum = what == MOMENTS ? (float)(n * (first - (double)*mean)) : 0.0f;
    for (int row = STAT_SLOPE_SUM + 1; row < STATS; row++) mean[row * channels] = 0.0f;
}

static double inverse_sigma(const struct call *call, int64_t channel) {
    const double sigma = (double)call->stats[STAT_SIGMA * call->layout.channels + channel];
    return 1.0 / sqrt(sigma * sigma + call->eps);
}

/* What the loops multiply and add, the same in both passes: ReLU's mask hangs on it. */
static void prepare_channel(struct call *call, int64_t channel) {
    const struct coefficients *c = &call->scratch.channels;
    const double weight = call->weight ? (double)call->weight[channel] : 1.0;
    c->mean[channel] = call->stats[channel];
    c->scale[channel] = (float)(weight * inverse_sigma(call, channel));
    c->bias[channel] = call->bias ? call->bias[channel] : 0.0f;
}

static void finish_backward(struct call *call, int64_t channel) {
    const struct coefficients *c = &call->scratch.channels;
    const int64_t channels = call->layout.channels;
    const double n = (double)call->layout.images * (double)call->layout.pixels;
    const double weight = call->weight ? (double)call->weight[channel] : 1.0, r = inverse_sigma(call, channel);
    const double sigma = (double)call->stats[STAT_SIGMA * channels + channel];
    double g, gd, slope = 0;
    join_sums(call, channel, &g, &gd);
    call->dbias[channel] = (float)g;
    call->dweight[channel] = (float)(gd * r);
    /* sigma times its derivative: d / n for l2, constant sigma sign(d) / n for l1. */
    if (call->statistic == STATISTIC_L2) slope = -r * r * r * weight * gd / n;
    if (call->statistic == STATISTIC_L1) slope = -r * r * r * weight * gd * sigma * call->constant / n;
    c->slope[channel] = (float)slope;
    c->offset[channel] =
        (float)-((weight * r * g + slope * (double)call->stats[STAT_SLOPE_SUM * channels + channel]) / n);
}

static void finish(struct call *call, const struct step *step, int64_t tile) {
    const int64_t from = first_channel(&call->layout, tile), to = from + channel_count(&call->layout, tile);
    for (int64_t channel = from; channel < to && !step->is_map; channel++) {
        if (call->backward)
            finish_backward(call, channel);
        else
            finish_forward(call, step->reduction, tile, channel);
    }
}

static void spread(const float *channels, float *columns, const struct region *region) {
    for (int64_t repeat = 0; repeat < region->repeats; repeat++)
        for (int64_t channel = 0; channel < region->channels; channel++)
            for (int64_t pixel = 0; pixel < region->pixels; pixel++) *columns++ = channels[channel];
}

/* The columns' coefficients stand where the channels' do, or in a slot of their own. */
static struct coefficients coefficients_of(const struct call *call, int64_t tile, int64_t slot) {
    const struct coefficients *c = &call->scratch.channels;
    const int64_t from = first_channel(&call->layout, tile);
    if (call->layout.columns) return call->scratch.columns[slot];
    return (struct coefficients){c->mean + from, c->scale + from, c->bias + from, c->slope + from, c->offset + from};
}

static void prepare(struct call *call, int step, int64_t tile, int64_t slot) {
    const struct layout *l = &call->layout;
    const int64_t from = first_channel(l, tile), to = from + channel_count(l, tile);
    const struct region region = make_region(l, tile, 0);
    const struct coefficients *c = &call->scratch.channels, columns = coefficients_of(call, tile, slot);
    const int is_map = call->steps[step].is_map, first = step == 0;
    if (first && !is_map && !call->backward) return; /* the first reduction needs none */
    if (first || !call->backward) {
        for (int64_t channel = from; channel < to; channel++) prepare_channel(call, channel);
        if (l->columns) {
            spread(c->mean + from, columns.mean, &region);
            spread(c->scale + from, columns.scale, &region);
            spread(c->bias + from, columns.bias, &region);
        }
    }
    if (is_map && call->backward && l->columns) {
        spread(c->slope + from, columns.slope, &region);
        spread(c->offset + from, columns.offset, &region);
    }
}

static void work(struct call *call, int step, int64_t tile, int chunk, int64_t slot, int worker) {
    const struct step *what = &call->steps[step];
    const struct region region = make_region(&call->layout, tile, chunk);
    const struct coefficients c = coefficients_of(call, tile, slot);
    /* Every other step runs backwards, from what the step before has left in the caches. */
    const int reverse = step % 2;
    if (what->is_map) {
        struct tensors tensors = call->tensors;
        if (call->backward && tensors.dresidual) tensors.grad = tensors.dresidual;
        call->simd->map[what->map][call->bfloat](&tensors, &region, &c, reverse, call->stream);
    } else {
        const int64_t at = chunk * call->layout.channels + first_channel(&call->layout, tile);
        call->simd->reduce[what->reduction][call->bfloat](&call->tensors, &region, &c, reverse,
                                                          &call->scratch.sums[worker], call->scratch.first + at,
                                                          call->scratch.second + at);
    }
}

/* All steps of one tile. */
static void tile_task(void *context, int tile, int worker) {
    struct call *call = context;
    for (int step = 0; step < call->step_count; step++) {
        prepare(call, step, tile, worker);
        work(call, step, tile, 0, worker, worker);
        finish(call, &call->steps[step], tile);
    }
}

/* One step of one chunk of a tile. */
static void chunk_task(void *context, int index, int worker) {
    struct call *call = context;
    const int chunks = call->layout.chunks + call->layout.rest, tile = index / chunks;
    work(call, call->step, tile, index % chunks, tile, worker);
}

static int run(struct call *call) {
    const struct layout *l = &call->layout;
    const int64_t bytes = l->images * l->channels * l->pixels * (call->bfloat ? 2 : 4);
    const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    call->simd = chosen;
    call->stream = bytes > (cache > 0 ? cache : 32L << 20);
    if (!allocate(&call->scratch, l)) return 1;
    if (l->chunks + l->rest == 1) {
        run_tasks(l->threads, (int)l->tiles, tile_task, call);
    } else {
        for (call->step = 0; call->step < call->step_count; call->step++) {
            for (int64_t tile = 0; tile < l->tiles; tile++) prepare(call, call->step, tile, tile);
            run_tasks(l->threads, (int)l->tiles * (l->chunks + l->rest), chunk_task, call);
            for (int64_t tile = 0; tile < l->tiles; tile++) finish(call, &call->steps[call->step], tile);
        }
    }
    release(&call->scratch);
    return 0;
}

static void add_step(struct call *call, struct step step) { call->steps[call->step_count++] = step; }

EXPORT int nm_interface(void) { return INTERFACE; }

EXPORT const char *nm_use_simd(const char *name) {
    const struct simd *found = NULL;
    if (!name || !strcmp(name, simd_baseline.name)) found = &simd_baseline;
#if defined(__x86_64__)
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && (!name || !strcmp(name, simd_avx2.name))) found = &simd_avx2;
    if (avx512 && (!name || !strcmp(name, simd_avx512.name))) found = &simd_avx512;
#endif
    if (found) chosen = found;
    return found ? found->name : NULL;
}

EXPORT const char *nm_current_simd(void) { return chosen->name; }

EXPORT int nm_forward(const void *x, const void *residual, void *y, const float *weight, const float *bias,
                      float *stats, int64_t images, int64_t channels, int64_t pixels, int flags, int statistic,
                      double constant, double eps, int threads) {
    struct call call = {.tensors = {.x = x, .residual = residual, .y = y}, .weight = weight, .bias = bias,
                        .stats = stats, .statistic = statistic, .constant = constant, .eps = eps};
    call.bfloat = !!(flags & BFLOAT);
    call.layout = make_layout(images, channels, pixels, !!(flags & CHANNELS_LAST), threads);
    add_step(&call, (struct step){.reduction = statistic == STATISTIC_L2 ? MOMENTS : MEAN});
    if (statistic == STATISTIC_L1) add_step(&call, (struct step){.reduction = DEVIATIONS});
    add_step(&call, (struct step){.is_map = 1, .map = NORMALISE + 2 * (residual != NULL) + !!(flags & RELU)});
    return run(&call);
}

EXPORT int nm_apply(const void *x, const void *residual, void *y, const float *weight, const float *bias,
                    const float *stats, int64_t images, int64_t channels, int64_t pixels, int flags, double eps,
                    int threads) {
    struct call call = {.tensors = {.x = x, .residual = residual, .y = y}, .weight = weight, .bias = bias,
                        .stats = (float *)stats, .eps = eps};
    call.bfloat = !!(flags & BFLOAT);
    call.layout = make_layout(images, channels, pixels, !!(flags & CHANNELS_LAST), threads);
    add_step(&call, (struct step){.is_map = 1, .map = NORMALISE + 2 * (residual != NULL) + !!(flags & RELU)});
    return run(&call);
}

EXPORT int nm_backward(const void *grad, const void *x, const void *out, void *dx, void *dresidual,
                       const float *weight, const float *bias, const float *stats, float *dweight, float *dbias,
                       int64_t images, int64_t channels, int64_t pixels, int flags, int statistic, double constant,
                       double eps, int threads) {
    struct call call = {.tensors = {.x = x, .grad = grad, .out = out, .y = dx, .dresidual = dresidual},
                        .weight = weight, .bias = bias, .stats = (float *)stats, .dweight = dweight, .dbias = dbias,
                        .statistic = statistic, .backward = 1, .constant = constant, .eps = eps};
    const int remake = !out && (flags & RELU);
    call.bfloat = !!(flags & BFLOAT);
    call.layout = make_layout(images, channels, pixels, !!(flags & CHANNELS_LAST), threads);
    add_step(&call, (struct step){.reduction = out ? GRADIENT_OF_SUM : remake ? GRADIENT_OF_RELU : GRADIENT});
    const enum map map = statistic == STATISTIC_L2 ? RETURN_L2 : statistic == STATISTIC_L1 ? RETURN_L1 : RETURN_MEAN;
    add_step(&call, (struct step){.is_map = 1, .map = map + (remake ? RETURN_MEAN_RELU - RETURN_MEAN : 0)});
    return run(&call);
}
