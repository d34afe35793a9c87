#include <string.h>

#include "simd.h"

#define INLINE static inline __attribute__((always_inline))
#include "vector_generic.h"

#include "loops.h"

const struct simd simd_baseline = SIMD("baseline");
