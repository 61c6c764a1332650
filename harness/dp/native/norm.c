/* Per-example gradients of the scale and shift of normalisation layers, without the normalised input.
 *
 * Two passes over the input: for the means, and for the moments about them. Float sums are kept short and added up in
 * double precision.
 */
#include <math.h>
#include <stdlib.h>

#include "vector.h"

#define BLOCK 256 /* elements, or positions, that a float may add up */

static double total(const float *x, long count) {
    double sum = 0;
    for (long begin = 0; begin < count; begin += BLOCK) {
        const long end = begin + BLOCK < count ? begin + BLOCK : count;
        vec part = {0};
        long i = begin;
        for (; i + LANES <= end; i += LANES) part += *(const vec *)(x + i);
        sum += sum_of(part);
        for (; i < end; i++) sum += x[i];
    }
    return sum;
}

typedef struct {
    double square, product, gradient; /* sums of (x - mean)^2, (x - mean) g and g */
} Moments;

static Moments moments(const float *x, const float *g, float mean, long count) {
    Moments m = {0, 0, 0};
    for (long begin = 0; begin < count; begin += BLOCK) {
        const long end = begin + BLOCK < count ? begin + BLOCK : count;
        vec square = {0}, product = {0}, gradient = {0};
        long i = begin;
        for (; i + LANES <= end; i += LANES) {
            const vec d = *(const vec *)(x + i) - mean, b = *(const vec *)(g + i);
            square += d * d;
            product += d * b;
            gradient += b;
        }
        m.square += sum_of(square);
        m.product += sum_of(product);
        m.gradient += sum_of(gradient);
        for (; i < end; i++) {
            const double d = x[i] - mean;
            m.square += d * d;
            m.product += d * g[i];
            m.gradient += g[i];
        }
    }
    return m;
}

/* Statistics over a group of channels. x and g [n, groups * channels, positions]; weight and bias [n, groups *
 * channels]. */
void group_norm_rows(const float *x, const float *g, float *weight, float *bias, long n, long groups, long channels,
                     long positions, double eps, int threads) {
    const long size = channels * positions;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n * groups; i++) {
        const double mean = total(x + i * size, size) / size;
        double square = 0;
        for (long c = i * channels; c < (i + 1) * channels; c++) {
            const Moments m = moments(x + c * positions, g + c * positions, mean, positions);
            square += m.square;
            weight[c] = m.product;
            bias[c] = m.gradient;
        }
        const float scale = 1 / sqrt(square / size + eps);
        for (long c = i * channels; c < (i + 1) * channels; c++) weight[c] *= scale;
    }
}

/* The same where channels are next to each other: x and g [n, positions, groups * channels]. */
int group_norm_rows_last(const float *x, const float *g, float *weight, float *bias, long n, long groups,
                         long channels, long positions, double eps, int threads) {
    const long all = groups * channels;
    int had = 1;
#pragma omp parallel num_threads(threads) reduction(&& : had)
    {
        double *const memory = malloc((3 * sizeof(double) + 4 * sizeof(float)) * all);
        double(*const sums)[all] = (double(*)[all])memory;
        float *const mean = (float *)(memory + 3 * all);
        float(*const parts)[all] = (float(*)[all])(mean + all);
        had = memory != NULL;
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            if (!had) continue;
            const float *a = x + i * positions * all, *b = g + i * positions * all;
            for (int pass = 0; pass < 2; pass++) {
                memset(sums, 0, 3 * all * sizeof(double));
                for (long begin = 0; begin < positions; begin += BLOCK) {
                    const long end = begin + BLOCK < positions ? begin + BLOCK : positions;
                    memset(parts, 0, 3 * all * sizeof(float));
                    for (long t = begin; t < end; t++) {
                        const float *p = a + t * all, *q = b + t * all;
                        if (pass == 0)
                            for (long c = 0; c < all; c++) parts[0][c] += p[c];
                        else
                            for (long c = 0; c < all; c++) {
                                const float d = p[c] - mean[c];
                                parts[0][c] += d * d;
                                parts[1][c] += d * q[c];
                                parts[2][c] += q[c];
                            }
                    }
                    for (int j = 0; j < 3; j++)
                        for (long c = 0; c < all; c++) sums[j][c] += parts[j][c];
                }
                for (long k = 0; k < all; k += channels) {
                    double sum = 0;
                    for (long c = k; c < k + channels; c++) sum += sums[0][c];
                    sum /= channels * positions;
                    const float scale = 1 / sqrt(sum + eps);
                    for (long c = k; c < k + channels; c++)
                        if (pass == 0)
                            mean[c] = sum;
                        else {
                            weight[i * all + c] = sums[1][c] * scale;
                            bias[i * all + c] = sums[2][c];
                        }
                }
            }
        }
        free(memory);
    }
    return had;
}

/* Statistics over the features of each position: x and g [n, positions, features]; weight and bias [n, features].
 * `centred` is false for a norm by the root mean square alone. */
int layer_norm_rows(const float *x, const float *g, float *weight, float *bias, long n, long positions, long features,
                    double eps, int centred, int threads) {
    int had = 1;
#pragma omp parallel num_threads(threads) reduction(&& : had)
    {
        double *const memory = malloc(2 * (sizeof(double) + sizeof(float)) * features);
        double(*const sums)[features] = (double(*)[features])memory;
        float(*const parts)[features] = (float(*)[features])(memory + 2 * features);
        had = memory != NULL;
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            if (!had) continue;
            memset(sums, 0, 2 * features * sizeof(double));
            for (long begin = 0; begin < positions; begin += BLOCK) {
                const long end = begin + BLOCK < positions ? begin + BLOCK : positions;
                memset(parts, 0, 2 * features * sizeof(float));
                for (long t = i * positions + begin; t < i * positions + end; t++) {
                    const float *a = x + t * features, *b = g + t * features;
                    const float mean = centred ? total(a, features) / features : 0;
                    const float scale = 1 / sqrt(moments(a, b, mean, features).square / features + eps);
                    for (long c = 0; c < features; c++) {
                        parts[0][c] += (a[c] - mean) * scale * b[c];
                        parts[1][c] += b[c];
                    }
                }
                for (int j = 0; j < 2; j++)
                    for (long c = 0; c < features; c++) sums[j][c] += parts[j][c];
            }
            for (long c = 0; c < features; c++) {
                weight[i * features + c] = sums[0][c];
                bias[i * features + c] = sums[1][c];
            }
        }
        free(memory);
    }
    return had;
}

