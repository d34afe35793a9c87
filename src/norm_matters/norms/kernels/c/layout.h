/* How a tensor is cut into regions for the threads, and the memory that takes. */
#ifndef NORM_MATTERS_LAYOUT_H
#define NORM_MATTERS_LAYOUT_H

#include "simd.h"

/* A tile is a range of channels. Where there are tiles enough for all threads, a thread does all of a tile while that is
 * in its cache (chunks is 1); else each tile is cut along the images into chunks, which meet after every step. In
 * channels_last there is one tile. `rest` chunks more (0 or 1) take the rows that are left when several are joined. */
struct layout {
    int64_t images, channels, pixels;
    int columns, channels_last, threads, chunks, rest;
    int64_t tiles, tile_channels, repeats, width; /* of a region's row */
};

struct layout make_layout(int64_t images, int64_t channels, int64_t pixels, int channels_last, int threads);

int64_t first_channel(const struct layout *, int64_t tile);
int64_t channel_count(const struct layout *, int64_t tile);
struct region make_region(const struct layout *, int64_t tile, int chunk);

/* How many values of each of its channels a region has. */
int64_t region_values(const struct region *);

/* Memory of one call, in one block. */
struct scratch {
    double *first, *second;       /* by chunk and channel */
    struct coefficients channels; /* by channel */
    struct coefficients *columns; /* by slot: one for each tile that is worked on at once */
    struct sums *sums;            /* by worker */
};

/* Returns 0 without memory. */
int allocate(struct scratch *, const struct layout *);
void release(struct scratch *);

#endif
