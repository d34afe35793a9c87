#include "layout.h"

#include <stdlib.h>

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum { VALUES_PER_THREAD = 16384 }; /* fewer are not worth waking one up */

/* As many channels as make COLUMNS_AT_ONCE pieces of cache lines, with rows of whole vectors where that is possible. */
static int64_t channels_together(int64_t channels, int64_t pixels) {
    int64_t together = divide_up(8 * COLUMNS_AT_ONCE, pixels);
    while (together * pixels % SPARE) together++;
    return smaller(together, channels);
}

/* As few rows as make whole vectors and at least COLUMNS_AT_ONCE columns. */
static int64_t rows_together(int64_t channels) {
    int64_t together = 1;
    while (together * channels % SPARE) together *= 2;
    return together * divide_up(COLUMNS_AT_ONCE, together * channels);
}

struct layout make_layout(int64_t images, int64_t channels, int64_t pixels, int channels_last, int threads) {
    struct layout l = {.images = images, .channels = channels, .pixels = pixels};
    l.threads = (int)smaller(threads, 1 + images * channels * pixels / VALUES_PER_THREAD);
    if (l.threads < 1) l.threads = 1;
    l.channels_last = l.columns = channels_last || pixels == 1 || channels == 1;
    l.tiles = l.chunks = 1;
    if (l.channels_last) {
        const int64_t rows = images * pixels;
        l.repeats = smaller(rows_together(channels), rows);
        l.tile_channels = channels;
        l.width = l.repeats * channels;
        l.chunks = (int)smaller(l.threads, rows / l.repeats);
        l.rest = rows % l.repeats != 0;
        return l;
    }
    l.columns = pixels < PLANE_PIXELS;
    l.repeats = 1;
    l.tile_channels = l.columns ? channels_together(channels, pixels) : 1;
    l.tiles = divide_up(channels, l.tile_channels);
    l.width = l.tile_channels * pixels;
    /* With fewer than three quarters of the threads at work the images are shared as well. */
    if (4 * l.tiles < 3 * divide_up(l.tiles, l.threads) * l.threads) l.chunks = (int)smaller(l.threads, images);
    return l;
}

int64_t first_channel(const struct layout *l, int64_t tile) { return tile * l->tile_channels; }

int64_t channel_count(const struct layout *l, int64_t tile) {
    return smaller(l->tile_channels, l->channels - first_channel(l, tile));
}

struct region make_region(const struct layout *l, int64_t tile, int chunk) {
    struct region r = {.columns = l->columns, .channels = channel_count(l, tile), .repeats = l->repeats};
    r.pixels = l->channels_last ? 1 : l->pixels;
    const int64_t all = l->channels_last ? l->images * l->pixels / l->repeats : l->images;
    const int64_t from = all * chunk / l->chunks, to = all * (chunk + 1) / l->chunks;
    r.rows = to - from;
    r.stride = l->channels_last ? l->width : l->channels * l->pixels;
    r.start = from * r.stride + first_channel(l, tile) * l->pixels * !l->channels_last;
    if (chunk == l->chunks) { /* the rest */
        r.rows = 1;
        r.start = all * r.stride;
        r.repeats = l->images * l->pixels % l->repeats;
    }
    r.width = r.channels * r.pixels * r.repeats;
    return r;
}

int64_t region_values(const struct region *r) { return r->rows * r->pixels * r->repeats; }

static float *take_floats(char **at, int64_t count) {
    float *taken = (float *)*at;
    *at += divide_up((count + SPARE) * (int64_t)sizeof(float), 64) * 64;
    return taken;
}

static double *take_doubles(char **at, int64_t count) { return (double *)take_floats(at, 2 * count + SPARE); }

static void take_coefficients(struct coefficients *c, char **at, int64_t count) {
    c->mean = take_floats(at, count);
    c->scale = take_floats(at, count);
    c->bias = take_floats(at, count);
    c->slope = take_floats(at, count);
    c->offset = take_floats(at, count);
}

/* Lay everything out from `at` on (not touched: the first time only to learn the size); returns the end. */
static char *lay_out(struct scratch *s, const struct layout *l, char *at, int64_t slots) {
    const int64_t chunks = l->chunks + l->rest;
    char *next = at;
    s->first = take_doubles(&next, chunks * l->channels);
    s->second = take_doubles(&next, chunks * l->channels);
    take_coefficients(&s->channels, &next, l->channels);
    s->columns = (struct coefficients *)take_floats(&next, slots * (int64_t)(sizeof *s->columns / sizeof(float)));
    s->sums = (struct sums *)take_floats(&next, l->threads * (int64_t)(sizeof *s->sums / sizeof(float)));
    for (int64_t slot = 0; l->columns && slot < slots; slot++) {
        struct coefficients c;
        take_coefficients(&c, &next, l->width);
        if (at) s->columns[slot] = c;
    }
    for (int worker = 0; l->columns && worker < l->threads; worker++) {
        struct sums sums = {take_floats(&next, l->width), take_floats(&next, l->width), take_doubles(&next, l->width),
                            take_doubles(&next, l->width)};
        if (at) s->sums[worker] = sums;
    }
    return next;
}

int allocate(struct scratch *s, const struct layout *l) {
    const int64_t slots = l->chunks == 1 ? l->threads : l->tiles;
    const size_t bytes = (size_t)(lay_out(s, l, NULL, slots) - (char *)NULL);
    char *block = aligned_alloc(64, bytes);
    if (block) lay_out(s, l, block, slots);
    return block != NULL;
}

void release(struct scratch *s) { free(s->first); }
