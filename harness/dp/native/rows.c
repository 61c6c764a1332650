/* Rows of per-example gradients: their squared norms, and their weighted sum. */
#include <stdlib.h>

#include "vector.h"

/* x [n, length], contiguous; squares [n]. In double precision throughout: squares of floats neither overflow nor vanish,
 * which matters where they are factors of a norm. */
void squared_norms(const float *x, double *squares, long n, long length, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * length > 1 << 15)
    for (long i = 0; i < n; i++) {
        const float *row = x + i * length;
        wide a = {0}, b = {0};
        long j = 0;
        for (; j + LANES <= length; j += LANES) {
            const wide p = doubles(row + j), q = doubles(row + j + LANES / 2);
            a += p * p;
            b += q * q;
        }
        double sum = 0;
        a += b;
        for (int l = 0; l < LANES / 2; l++) sum += a[l];
        for (; j < length; j++) sum += (double)row[j] * row[j];
        squares[i] = sum;
    }
}

/* out[p][c][k] = sum_i v[i] x[i][p][k][c]: a weighted sum of rows whose last two dimensions change places on the way
 * (none do where `kernel` is 1). Returns whether memory was had. */
int weighted_rows(const double *v, const float *x, double *out, long n, long outputs, long kernel, long channels,
                  int threads) {
    const long size = kernel * channels, whole = outputs * size;
    /* A piece of the row stays in the cache while all examples are added to it. */
    const long piece = kernel > 1 ? size : 1024, pieces = (whole + piece - 1) / piece;
    int had = 1;
#pragma omp parallel num_threads(threads) reduction(&& : had) if (n * whole > 1 << 15)
    {
        double *sum = malloc(8 * piece);
        had = sum != NULL;
#pragma omp for schedule(static)
        for (long q = 0; q < pieces; q++) {
            if (!had) continue;
            const long begin = q * piece, length = begin + piece < whole ? piece : whole - begin;
            memset(sum, 0, 8 * length);
            long i = 0;
            for (; i + 4 <= n; i += 4) {
                const float *a = x + i * whole + begin, *b = a + whole, *c = b + whole, *d = c + whole;
                for (long j = 0; j < length; j++)
                    sum[j] += v[i] * a[j] + v[i + 1] * b[j] + (v[i + 2] * c[j] + v[i + 3] * d[j]);
            }
            for (; i < n; i++)
                for (long j = 0; j < length; j++) sum[j] += v[i] * x[i * whole + begin + j];
            if (kernel == 1)
                memcpy(out + begin, sum, 8 * length);
            else
                for (long c = 0; c < channels; c++)
                    for (long k = 0; k < kernel; k++) out[begin + c * kernel + k] = sum[k * channels + c];
        }
        free(sum);
    }
    return had;
}
