/* Squared norms from Gram matrices, in double precision: of sum_t g_t a_t^T without the product.
 *
 * Each thread holds the matrices of one example. Items (positions, or pixels) lie next to each other and features are
 * added up one after another, with the sums in registers; only what is on or above the diagonal is made.
 */
#include <math.h>
#include <stdlib.h>

#include "image.h"

#define TALL 6

/* out[p][d .. d + 2 * LANES) = sum over features of x[f][p] x[f][d ..], for `tall` rows p from p0. */
#define TILE(NAME, NP)                                                                                                 \
    static void NAME(const float *x, double *out, long p0, long d0, long pitch, long features, long width) {           \
        wide sum[NP][4];                                                                                               \
        _Pragma("GCC unroll 8") for (int i = 0; i < NP; i++) {                                                         \
            _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) sum[i][v] = (wide){0};                                 \
        }                                                                                                              \
        for (long f = 0; f < features; f++, x += pitch) {                                                              \
            wide e[4];                                                                                                 \
            _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) e[v] = doubles(x + d0 + v * (LANES / 2));              \
            _Pragma("GCC unroll 8") for (int i = 0; i < NP; i++) {                                                     \
                const double b = x[p0 + i];                                                                            \
                _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) sum[i][v] += b * e[v];                             \
            }                                                                                                          \
        }                                                                                                              \
        const long some = width - d0 < 2 * LANES ? width - d0 : 2 * LANES;                                             \
        for (int i = 0; i < NP; i++) memcpy(out + (p0 + i) * width + d0, sum[i], sizeof(double) * some);               \
    }

TILE(tile_tall, TALL)
TILE(tile_1, 1)

/* x [features, pitch], of which `width` items count and 2 * LANES may be read beyond; out [width, width]. */
static void gram(const float *x, double *out, long pitch, long features, long width) {
    for (long d = 0; d < width; d += 2 * LANES) {
        const long last = d + 2 * LANES < width ? d + 2 * LANES : width;
        long p = 0;
        for (; p + TALL <= last; p += TALL) tile_tall(x, out, p, d, pitch, features, width);
        for (; p < last; p++) tile_1(x, out, p, d, pitch, features, width);
    }
}

/* The features of an image one after another, each with all its pixels, into `to` [channels, pitch], which is zero where
 * the padding is. */
static void features_first(const float *from, Strides by, float *to, long pitch, long rows, long columns, long channels,
                           long pad_rows, long pad_columns) {
    const long line = columns + 2 * pad_columns;
    if (by.channel == 1 && rows == 1 && !pad_rows) { /* positions one after another: a transposition */
        const Strides swapped = {0, by.column, channels, 1};
        if (pitch == columns) {
            channels_last(from, swapped, to, 1, channels, columns, 0, 0);
            return;
        }
    }
    for (long c = 0; c < channels; c++)
        for (long r = 0; r < rows; r++) {
            const float *row = from + c * by.channel + r * by.row;
            float *at = to + c * pitch + (r + pad_rows) * line + pad_columns;
            if (by.column == 1)
                memcpy(at, row, 4 * columns);
            else
                for (long x = 0; x < columns; x++) at[x] = row[x * by.column];
        }
}

/* x [n, channels, height, width] and g [n, outputs, rows, columns] in any layout. squares [n]: squared norms of the
 * weight's per-example gradients; bound [n]: (sum_t |patch_t| |g_t|)^2. The patches' Gram matrix is the sum of the
 * pixels', shifted along its diagonal by every offset of the kernel, so it never exists. Returns whether memory was had. */
int convolution_gram(const float *x, Strides x_by, const float *g, Strides g_by, double *squares, double *bound, long n,
                     const Shape *s, int threads) {
    const long line = s->width + 2 * s->padding_columns, pixels = (s->height + 2 * s->padding_rows) * line;
    const long positions = s->rows * s->columns, offsets = s->kernel_rows * s->kernel_columns;
    int had = 1;
#pragma omp parallel num_threads(threads) reduction(&& : had)
    {
        float *image = calloc(pixels * s->channels + 2 * LANES, 4);
        float *gradient = calloc(positions * s->outputs + 2 * LANES, 4);
        double *of_x = malloc(sizeof(double) * pixels * pixels), *of_g = malloc(sizeof(double) * positions * positions);
        double *sum = malloc(sizeof(double) * s->columns);
        had = image && gradient && of_x && of_g && sum;
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < n; i++) {
            if (!had) continue;
            features_first(x + i * x_by.example, x_by, image, pixels, s->height, s->width, s->channels, s->padding_rows,
                           s->padding_columns);
            features_first(g + i * g_by.example, g_by, gradient, positions, s->rows, s->columns, s->outputs, 0, 0);
            gram(image, of_x, pixels, s->channels, pixels);
            gram(gradient, of_g, positions, s->outputs, positions);
            double total = 0, root = 0;
            for (long a = 0; a < positions; a++) {
                const long row_a = a / s->columns, column_a = a % s->columns;
                const long here = row_a * s->stride_rows * line + column_a * s->stride_columns;
                for (long r = row_a; r < s->rows; r++) {
                    const long first = r == row_a ? column_a : 0; /* on or above the diagonal */
                    const double *weights = of_g + a * positions + r * s->columns;
                    for (long c = first; c < s->columns; c++) sum[c] = 0;
                    for (long o = 0; o < offsets; o++) {
                        const long shift = o / s->kernel_columns * s->dilation_rows * line +
                                           o % s->kernel_columns * s->dilation_columns;
                        const double *row = of_x + (here + shift) * pixels + r * s->stride_rows * line + shift;
                        if (s->stride_columns == 1)
                            for (long c = first; c < s->columns; c++) sum[c] += row[c];
                        else
                            for (long c = first; c < s->columns; c++) sum[c] += row[c * s->stride_columns];
                    }
                    double part = 0;
                    for (long c = first; c < s->columns; c++) part += sum[c] * weights[c];
                    total += 2 * part;
                    if (r == row_a) { /* what is on the diagonal counts once */
                        const double own = sum[column_a] * weights[column_a];
                        total -= own;
                        root += sqrt(own > 0 ? own : 0);
                    }
                }
            }
            squares[i] = total;
            bound[i] = root * root;
        }
        free(image);
        free(gradient);
        free(of_x);
        free(of_g);
        free(sum);
    }
    return had;
}
