/* Per-example weight gradients of a convolution.
 *
 * Each example's input is first copied, padded and channels last, into a buffer of the thread's own that stays in its
 * cache, and its output gradient likewise. Then, for each row of the kernel, patches (kw * c numbers next to each
 * other) times output gradients (p numbers next to each other) are added up over the output positions. The sums stay in
 * registers over all positions; nothing is unfolded.
 */
#include <stdlib.h>

#include "image.h"

#define WIDE (LANES / 2) /* output channels of a tile of several vectors */

/* One tile: NP output channels, NV vectors of patch elements, all positions. Writes `length` of the NV * LANES
 * elements of each row of `out`, whose rows are `pitch` apart, and returns the sum of their squares. */
#define TILE(NAME, NP, NV)                                                                                             \
    static double NAME(const float *x, const float *g, float *out, const Shape *s, long pitch, long length) {          \
        vec sum[NP][NV];                                                                                               \
        _Pragma("GCC unroll 16") for (int i = 0; i < NP; i++) {                                                        \
            _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++) sum[i][v] = (vec){0};                                 \
        }                                                                                                              \
        const long step = s->stride_columns * s->channels;                                                             \
        const long line = (s->width + 2 * s->padding_columns) * s->channels * s->stride_rows;                          \
        for (long r = 0; r < s->rows; r++) {                                                                           \
            const float *a = x + r * line, *b = g + r * s->columns * s->outputs;                                       \
            for (long c = 0; c < s->columns; c++, a += step, b += s->outputs) {                                        \
                vec e[NV];                                                                                             \
                _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++) e[v] = *(const vec *)(a + v * LANES);             \
                _Pragma("GCC unroll 16") for (int i = 0; i < NP; i++) {                                                \
                    _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++) sum[i][v] += b[i] * e[v];                     \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        if (length < NV * LANES) {                                                                                     \
            double total = 0;                                                                                          \
            for (int i = 0; i < NP; i++) {                                                                             \
                float line[NV * LANES];                                                                                \
                memcpy(line, sum[i], sizeof line);                                                                     \
                memcpy(out + i * pitch, line, 4 * length);                                                             \
                for (long j = 0; j < length; j++) total += (double)line[j] * line[j];                                  \
            }                                                                                                          \
            return total;                                                                                              \
        }                                                                                                              \
        vec squares = {0};                                                                                             \
        _Pragma("GCC unroll 16") for (int i = 0; i < NP; i++) {                                                        \
            _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++) {                                                     \
                *(vec *)(out + i * pitch + v * LANES) = sum[i][v];                                                     \
                squares += sum[i][v] * sum[i][v];                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        return sum_of(squares);                                                                                        \
    }

TILE(tile_1_1, 1, 1)
TILE(tile_1_3, 1, 3)
TILE(tile_w_1, 2 * WIDE, 1)
TILE(tile_w_2, WIDE, 2)
TILE(tile_w_3, WIDE, 3)

static double block(const float *x, const float *g, float *out, const Shape *s, long pitch, long span) {
    double total = 0;
    for (long d = 0; d < span;) {
        const long left = span - d, vectors = left > 2 * LANES ? 3 : left > LANES ? 2 : 1;
        const long length = left < vectors * LANES ? left : vectors * LANES;
        const long step = vectors == 1 ? 2 * WIDE : WIDE;
        long p = 0;
        for (; p + step <= s->outputs; p += step) {
            const float *a = x + d, *b = g + p;
            float *o = out + p * pitch + d;
            total += vectors == 3   ? tile_w_3(a, b, o, s, pitch, length)
                     : vectors == 2 ? tile_w_2(a, b, o, s, pitch, length)
                                    : tile_w_1(a, b, o, s, pitch, length);
        }
        for (; p < s->outputs; p++) {
            float *o = out + p * pitch + d;
            total += vectors == 1 ? tile_1_1(x + d, g + p, o, s, pitch, length)
                                  : tile_1_3(x + d, g + p, o, s, pitch, length);
        }
        d += length;
    }
    return total;
}

/* x [n, channels, height, width] and g [n, outputs, rows, columns], in any layout; out [n, outputs, kernel_rows,
 * kernel_columns, channels]; squares [n]: the squared norm of each example's gradient. Returns whether memory was had. */
int convolution_rows(const float *x, Strides x_by, const float *g, Strides g_by, float *out, double *squares, long n,
                     const Shape *s, int threads) {
    const long pitch = s->kernel_rows * s->kernel_columns * s->channels;
    const long line = (s->width + 2 * s->padding_columns) * s->channels;
    const long padded = (s->height + 2 * s->padding_rows) * line, positions = s->rows * s->columns;
    /* Kernel columns are next to each other in memory unless the kernel is dilated. */
    const long spans = s->dilation_columns == 1 ? 1 : s->kernel_columns, span = pitch / s->kernel_rows / spans;
    const int as_needed = !s->padding_rows && !s->padding_columns && x_by.channel == 1 &&
                          x_by.column == s->channels && x_by.row == line;
    int had = 1;
#pragma omp parallel num_threads(threads) reduction(&& : had)
    {
        float *image = calloc(padded + 3 * LANES, 4); /* a tile reads up to three vectors beyond its patch */
        float *gradient = malloc(4 * positions * s->outputs);
        had = image && gradient;
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < n; i++) {
            if (!had) continue;
            const float *from = x + i * x_by.example, *b = g + i * g_by.example;
            /* A tile's reading beyond its patch must end within the examples that follow. */
            const int copy = !as_needed || (n - 1 - i) * x_by.example < 3 * LANES;
            if (copy)
                channels_last(from, x_by, image, s->height, s->width, s->channels, s->padding_rows, s->padding_columns);
            if (g_by.channel != 1 || g_by.column != s->outputs || g_by.row != s->columns * s->outputs) {
                channels_last(b, g_by, gradient, s->rows, s->columns, s->outputs, 0, 0);
                b = gradient;
            }
            double total = 0;
            for (long ky = 0; ky < s->kernel_rows; ky++)
                for (long kx = 0; kx < spans; kx++) {
                    const float *a = (copy ? image : from) + ky * s->dilation_rows * line + kx * s->dilation_columns * s->channels;
                    total += block(a, b, out + i * s->outputs * pitch + (ky * spans + kx) * span, s, pitch, span);
                }
            squares[i] = total;
        }
        free(image);
        free(gradient);
    }
    return had;
}
