/* What is done with each vector of values; the loops around it are in planes.h and columns.h.
 *
 * Everything here is inlined with `reduction`, `map` and `bfloat` known, so that nothing is left to decide in a loop.
 */

INLINE vector load(const void *from, int64_t at, int bfloat) {
    return bfloat ? load_bfloat((const uint16_t *)from + at) : load_float((const float *)from + at);
}
INLINE vector load_first(const void *from, int64_t at, int bfloat, lanes kept) {
    return bfloat ? load_bfloat_first((const uint16_t *)from + at, kept)
                  : load_float_first((const float *)from + at, kept);
}
INLINE void store_first(void *to, int64_t at, int bfloat, vector a, lanes kept) {
    if (bfloat)
        store_bfloat_first((uint16_t *)to + at, a, kept);
    else
        store_float_first((float *)to + at, a, kept);
}
INLINE void store(void *to, int64_t at, int bfloat, vector a, int stream) {
    if (bfloat && stream)
        stream_bfloat((uint16_t *)to + at, a);
    else if (bfloat)
        store_bfloat((uint16_t *)to + at, a);
    else if (stream)
        stream_float((float *)to + at, a);
    else
        store_float((float *)to + at, a);
}

/* Have a value's cache line brought near; harmless beyond the end. */
INLINE void fetch(const void *from, int64_t at, int bfloat) {
    __builtin_prefetch((const char *)from + at * (bfloat ? 2 : 4), 0, 3);
}

/* Whether every row of the region begins where stream_*() may write. */
INLINE int streamable(const void *to, const struct region *region, int bfloat) {
    int64_t bytes = bfloat ? 2 : 4, unit = LANES * bytes;
    return ((intptr_t)to + region->start * bytes) % unit == 0 && region->stride * bytes % unit == 0;
}

struct factors {
    vector mean, scale, bias, slope, offset;
};

/* The same for all columns (a plane), or loaded for LANES of them; what is not used is not loaded. */
INLINE struct factors factors_of(const struct coefficients *c, int64_t column, int columns) {
    struct factors f;
    f.mean = columns ? load_float(c->mean + column) : broadcast(*c->mean);
    f.scale = columns ? load_float(c->scale + column) : broadcast(*c->scale);
    f.bias = columns ? load_float(c->bias + column) : broadcast(*c->bias);
    f.slope = columns ? load_float(c->slope + column) : broadcast(*c->slope);
    f.offset = columns ? load_float(c->offset + column) : broadcast(*c->offset);
    return f;
}

/* Forward and backward pass must agree to the bit where this is positive. */
INLINE vector normalised(vector x, const struct factors *f) {
    return multiply_add(x - f->mean, f->scale, f->bias);
}

/* Add what LANES values, or the first of them, give to both sums; fetch what stands `ahead` values further, if not 0. */
INLINE void accumulate(enum reduction what, int bfloat, const struct tensors *t, int64_t at, const struct factors *f,
                       int partial, lanes kept, int64_t ahead, vector *first, vector *second) {
    if (ahead) {
        fetch(t->x, at + ahead, bfloat);
        if (what >= GRADIENT) fetch(t->grad, at + ahead, bfloat);
    }
#define LOAD(tensor) (partial ? load_first(t->tensor, at, bfloat, kept) : load(t->tensor, at, bfloat))
    vector x = LOAD(x), d = x - f->mean;
    if (partial) d = keep(d, kept);
    if (what == MEAN || what == MOMENTS) {
        *first = *first + d;
        if (what == MOMENTS) *second = multiply_add(d, d, *second);
    } else if (what == DEVIATIONS) {
        *first = *first + absolute(d);
        *second = *second + signed_like(broadcast(1.0f), d);
    } else {
        vector g = LOAD(grad);
        if (what == GRADIENT_OF_RELU) g = where_positive(normalised(x, f), g);
        if (what == GRADIENT_OF_SUM) {
            g = where_positive(LOAD(out), g);
            if (partial)
                store_first(t->dresidual, at, bfloat, g, kept);
            else
                store(t->dresidual, at, bfloat, g, 0);
        }
        *first = *first + g;
        *second = multiply_add(g, d, *second);
    }
}

/* Write LANES values of y or dx, or the first of them. */
INLINE void produce(enum map what, int bfloat, const struct tensors *t, int64_t at, const struct factors *f,
                    int partial, lanes kept, int stream) {
    vector x = LOAD(x), y;
    if (what <= NORMALISE_ADD_RELU) {
        y = normalised(x, f);
        if (what == NORMALISE_ADD || what == NORMALISE_ADD_RELU) y = y + LOAD(residual);
        if (what == NORMALISE_RELU || what == NORMALISE_ADD_RELU) y = rectify(y);
    } else {
        vector g = LOAD(grad), d = x - f->mean;
        if (what >= RETURN_MEAN_RELU) g = where_positive(normalised(x, f), g);
        y = multiply_add(g, f->scale, f->offset);
        if (what == RETURN_L1 || what == RETURN_L1_RELU) y = y + signed_like(f->slope, d);
        if (what == RETURN_L2 || what == RETURN_L2_RELU) y = multiply_add(d, f->slope, y);
    }
    if (partial)
        store_first(t->y, at, bfloat, y, kept);
    else
        store(t->y, at, bfloat, y, stream);
#undef LOAD
}
