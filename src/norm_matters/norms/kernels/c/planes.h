/* Loops over a plane: one channel, whose numbers are the same for all columns; sums stay in registers. */

enum { ACCUMULATORS = 4 };   /* sums that do not wait for each other */
enum { PLANE_BLOCK = 4096 }; /* values summed in float, around a shift of their own; the blocks' sums are double */

/* Both sums over the columns [from, to) of `rows` rows. */
INLINE void sum_block(enum reduction what, int bfloat, const struct tensors *t, int64_t at, int64_t rows,
                      int64_t stride, int64_t width, const struct factors *f, double *first, double *second) {
    vector a[ACCUMULATORS], b[ACCUMULATORS];
    const lanes tail = first_lanes(width % LANES);
    for (int k = 0; k < ACCUMULATORS; k++) a[k] = b[k] = broadcast(0.0f);
    for (int64_t row = 0; row < rows; row++, at += stride) {
        int64_t j = 0;
        for (; j + ACCUMULATORS * LANES <= width; j += ACCUMULATORS * LANES)
            for (int k = 0; k < ACCUMULATORS; k++)
                accumulate(what, bfloat, t, at + j + k * LANES, f, 0, tail, 0, &a[k], &b[k]);
        for (; j + LANES <= width; j += LANES) accumulate(what, bfloat, t, at + j, f, 0, tail, 0, &a[0], &b[0]);
        if (j < width) accumulate(what, bfloat, t, at + j, f, 1, tail, 0, &a[1], &b[1]);
    }
    *first = (double)total((a[0] + a[1]) + (a[2] + a[3]));
    *second = (double)total((b[0] + b[1]) + (b[2] + b[3]));
}

INLINE void reduce_plane(enum reduction what, int bfloat, const struct tensors *t, const struct region *region,
                         const struct coefficients *c, int reverse, double *first, double *second) {
    const int64_t width = region->width, rows_at_once = width >= PLANE_BLOCK ? 1 : PLANE_BLOCK / width;
    const int moments = what == MEAN || what == MOMENTS;
    const int64_t groups = (region->rows + rows_at_once - 1) / rows_at_once;
    struct factors f = factors_of(c, 0, 0);
    double seen = 0, sum_first = 0, sum_second = 0;
    for (int64_t step = 0; step < groups; step++) {
        const int64_t group = reverse ? groups - 1 - step : step, row = group * rows_at_once;
        const int64_t rows = row + rows_at_once <= region->rows ? rows_at_once : region->rows - row;
        for (int64_t from = 0; from < width; from += PLANE_BLOCK) {
            const int64_t count = width - from < PLANE_BLOCK ? width - from : PLANE_BLOCK;
            const int64_t at = region->start + row * region->stride + from;
            double block_first, block_second;
            float shift = 0;
            if (moments) {
                /* Sums around a value amid the block's own lose nothing where the mean is far from 0. */
                const int64_t sample = count < LANES ? 1 : LANES;
                shift = total(load_first(t->x, at, bfloat, first_lanes(sample))) / (float)sample;
                f.mean = broadcast(shift);
            }
            sum_block(what, bfloat, t, at, rows, region->stride, count, &f, &block_first, &block_second);
            if (moments) {
                const double values = (double)(rows * count), mean = (double)shift + block_first / values;
                const double delta = mean - sum_first;
                seen += values;
                sum_first += delta * (values / seen);
                sum_second += block_second - block_first * (block_first / values);
                sum_second += delta * delta * ((seen - values) * (values / seen));
            } else {
                sum_first += block_first;
                sum_second += block_second;
            }
        }
    }
    *first = sum_first;
    *second = sum_second;
}

INLINE void map_plane(enum map what, int bfloat, const struct tensors *t, const struct region *region,
                      const struct coefficients *c, int reverse, int stream) {
    const int64_t width = region->width;
    const lanes tail = first_lanes(width % LANES);
    const struct factors f = factors_of(c, 0, 0);
    for (int64_t step = 0; step < region->rows; step++) {
        const int64_t row = reverse ? region->rows - 1 - step : step, at = region->start + row * region->stride;
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES) produce(what, bfloat, t, at + j, &f, 0, tail, stream);
        if (j < width) produce(what, bfloat, t, at + j, &f, 1, tail, 0);
    }
}
