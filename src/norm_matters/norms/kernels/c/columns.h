/* Loops over columns: each column has numbers of its own. Several rows are taken at once, so that a column's numbers
 * and sums are loaded once for them all. */

enum { COLUMN_BLOCK = 128 }; /* rows summed in float, around a shift of their own; the blocks' sums are double */
enum { ROWS_TO_SUM = 4, ROWS_TO_MAP = 2 };

/* Add `rows` rows (a constant) from `at` on to the float sums. */
INLINE void sum_rows(enum reduction what, int bfloat, const struct tensors *t, int64_t at, int rows, int64_t shift_at,
                     const struct region *region, const struct coefficients *c, const struct sums *sums) {
    const int64_t width = region->width, stride = region->stride;
    const int moments = what == MEAN || what == MOMENTS;
    /* The processor does not foresee the walk through several rows at once by itself. */
    const int64_t ahead = rows * stride;
    const lanes tail = first_lanes(width % LANES);
    for (int64_t j = 0; j < width; j += LANES) {
        vector a = load_float(sums->first + j), b = load_float(sums->second + j);
        struct factors f = factors_of(c, j, 1);
        if (j + LANES <= width) {
            if (moments) f.mean = load(t->x, shift_at + j, bfloat);
            for (int k = 0; k < rows; k++) accumulate(what, bfloat, t, at + k * stride + j, &f, 0, tail, ahead, &a, &b);
        } else {
            if (moments) f.mean = load_first(t->x, shift_at + j, bfloat, tail);
            for (int k = 0; k < rows; k++) accumulate(what, bfloat, t, at + k * stride + j, &f, 1, tail, 0, &a, &b);
        }
        store_float(sums->first + j, a);
        if (what != MEAN) store_float(sums->second + j, b);
    }
}

/* Take the float sums of a block of rows over into the double ones, and clear them. */
INLINE void close_block(int moments, int bfloat, const struct tensors *t, int64_t shift_at, int64_t rows, double *seen,
                        int64_t width, const struct sums *sums) {
    float *restrict first = sums->first, *restrict second = sums->second;
    double *restrict mean = sums->mean, *restrict square = sums->square;
    if (moments) {
        const double inverse = 1.0 / (double)rows, before = *seen;
        *seen += (double)rows;
        const double share = (double)rows / *seen, spread = before * share;
        for (int64_t j = 0; j < width; j += LANES) {
            float shift[LANES];
            store_float(shift, width - j < LANES ? load_first(t->x, shift_at + j, bfloat, first_lanes(width - j))
                                                 : load(t->x, shift_at + j, bfloat));
            for (int k = 0; k < LANES; k++) {
                const double sum = (double)first[j + k];
                const double delta = (double)shift[k] + sum * inverse - mean[j + k];
                mean[j + k] += delta * share;
                square[j + k] += ((double)second[j + k] - sum * sum * inverse) + delta * delta * spread;
                first[j + k] = second[j + k] = 0.0f;
            }
        }
    } else {
        for (int64_t j = 0; j < width; j++) {
            mean[j] += (double)first[j];
            square[j] += (double)second[j];
            first[j] = second[j] = 0.0f;
        }
    }
}

/* The sum of values[k stride], in an order that lets the additions overlap. */
INLINE double sum_strided(const double *values, int64_t count, int64_t stride) {
    double sums[8] = {0};
    int64_t k = 0;
    for (; k + 8 <= count; k += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += values[(k + lane) * stride];
    for (; k < count; k++) sums[0] += values[k * stride];
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

/* Bring the columns of each channel together: they are all of `rows` values. */
INLINE void join_columns(int moments, double rows, const struct region *region, const struct sums *sums, double *first,
                         double *second) {
    const int64_t count = region->repeats * region->pixels, stride = region->pixels == 1 ? region->channels : 1;
    for (int64_t channel = 0; channel < region->channels; channel++) {
        const double *mean = sums->mean + channel * region->pixels;
        double *square = sums->square + channel * region->pixels;
        first[channel] = sum_strided(mean, count, stride);
        if (moments) {
            first[channel] /= (double)count;
            for (int64_t k = 0; k < count; k++) {
                const double delta = mean[k * stride] - first[channel];
                square[k * stride] += delta * delta * rows;
            }
        }
        second[channel] = sum_strided(square, count, stride);
    }
}

INLINE void reduce_columns(enum reduction what, int bfloat, const struct tensors *t, const struct region *region,
                           const struct coefficients *c, int reverse, const struct sums *sums, double *first,
                           double *second) {
    const int64_t blocks = (region->rows + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    const int moments = what == MEAN || what == MOMENTS;
    double seen = 0;
    for (int64_t j = 0; j < region->width + SPARE; j++) {
        sums->first[j] = sums->second[j] = 0.0f;
        sums->mean[j] = sums->square[j] = 0.0;
    }
    for (int64_t step = 0; step < blocks; step++) {
        const int64_t block = reverse ? blocks - 1 - step : step, from = block * COLUMN_BLOCK;
        const int64_t to = from + COLUMN_BLOCK < region->rows ? from + COLUMN_BLOCK : region->rows;
        const int64_t shift_at = region->start + from * region->stride;
        int64_t row = from;
        for (; row + ROWS_TO_SUM <= to; row += ROWS_TO_SUM)
            sum_rows(what, bfloat, t, region->start + row * region->stride, ROWS_TO_SUM, shift_at, region, c, sums);
        for (; row < to; row++)
            sum_rows(what, bfloat, t, region->start + row * region->stride, 1, shift_at, region, c, sums);
        close_block(moments, bfloat, t, shift_at, to - from, &seen, region->width, sums);
    }
    join_columns(moments, (double)region->rows, region, sums, first, second);
}

/* Write `rows` rows (a constant) from `at` on. */
INLINE void map_rows(enum map what, int bfloat, const struct tensors *t, int64_t at, int rows,
                     const struct region *region, const struct coefficients *c, int stream) {
    const int64_t width = region->width, stride = region->stride;
    const lanes tail = first_lanes(width % LANES);
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        const struct factors f = factors_of(c, j, 1);
        for (int k = 0; k < rows; k++) produce(what, bfloat, t, at + k * stride + j, &f, 0, tail, stream);
    }
    if (j < width) {
        const struct factors f = factors_of(c, j, 1);
        for (int k = 0; k < rows; k++) produce(what, bfloat, t, at + k * stride + j, &f, 1, tail, 0);
    }
}

INLINE void map_columns(enum map what, int bfloat, const struct tensors *t, const struct region *region,
                        const struct coefficients *c, int reverse, int stream) {
    const int64_t blocks = (region->rows + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    for (int64_t step = 0; step < blocks; step++) {
        const int64_t block = reverse ? blocks - 1 - step : step, from = block * COLUMN_BLOCK;
        const int64_t to = from + COLUMN_BLOCK < region->rows ? from + COLUMN_BLOCK : region->rows;
        int64_t row = from;
        for (; row + ROWS_TO_MAP <= to; row += ROWS_TO_MAP)
            map_rows(what, bfloat, t, region->start + row * region->stride, ROWS_TO_MAP, region, c, stream);
        for (; row < to; row++)
            map_rows(what, bfloat, t, region->start + row * region->stride, 1, region, c, stream);
    }
}
