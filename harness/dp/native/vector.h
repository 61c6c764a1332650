/* Vectors of floats as GCC and Clang know them, as wide as the machine's registers. */
#ifndef EPSBENCH_VECTOR_H
#define EPSBENCH_VECTOR_H

#include <stddef.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef double wide __attribute__((vector_size(4 * LANES)));

/* Half a vector of floats, as doubles. */
static inline wide doubles(const float *x) {
    half some;
    memcpy(&some, x, sizeof some);
    return __builtin_convertvector(some, wide);
}

/* The sum of a vector's elements, in double precision. */
static inline double sum_of(vec v) {
    half lower, upper;
    memcpy(&lower, &v, sizeof lower);
    memcpy(&upper, (char *)&v + sizeof lower, sizeof upper);
    const wide both = __builtin_convertvector(lower, wide) + __builtin_convertvector(upper, wide);
    double total = 0;
    for (int i = 0; i < LANES / 2; i++) total += both[i];
    return total;
}

#endif
