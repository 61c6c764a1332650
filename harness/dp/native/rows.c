/* Squared norms of rows: floats add up in short runs, doubles across them. */
#include "vector.h"

#define RUN (32 * LANES)

/* x [n, length], contiguous; squares [n]. */
void squared_norms(const float *x, double *squares, long n, long length, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n * length > 1 << 15)
    for (long i = 0; i < n; i++) {
        const float *row = x + i * length;
        double sum = 0;
        for (long begin = 0; begin < length; begin += RUN) {
            const long end = begin + RUN < length ? begin + RUN : length;
            vec a = {0}, b = {0};
            long j = begin;
            for (; j + 2 * LANES <= end; j += 2 * LANES) {
                const vec p = *(const vec *)(row + j), q = *(const vec *)(row + j + LANES);
                a += p * p;
                b += q * q;
            }
            sum += sum_of(a) + sum_of(b);
            for (; j < end; j++) sum += (double)row[j] * row[j];
        }
        squares[i] = sum;
    }
}

/* out[p][c][k] = sum_i v[i] x[i][p][k][c]: a weighted sum of rows whose last two dimensions change places on the way
 * (none do where `kernel` is 1). */
void weighted_rows(const float *v, const float *x, float *out, long n, long outputs, long kernel, long channels,
                   int threads) {
    const long size = kernel * channels, whole = outputs * size;
    /* A piece of the row stays in the cache while all examples are added to it. */
    const long piece = kernel > 1 ? size : 1024, pieces = (whole + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(static) if (n * whole > 1 << 15)
    for (long q = 0; q < pieces; q++) {
        const long begin = q * piece, length = begin + piece < whole ? piece : whole - begin;
        float sum[length];
        memset(sum, 0, sizeof sum);
        long i = 0;
        for (; i + 4 <= n; i += 4) {
            const float *a = x + i * whole + begin, *b = a + whole, *c = b + whole, *d = c + whole;
            for (long j = 0; j < length; j++)
                sum[j] += v[i] * a[j] + v[i + 1] * b[j] + (v[i + 2] * c[j] + v[i + 3] * d[j]);
        }
        for (; i < n; i++)
            for (long j = 0; j < length; j++) sum[j] += v[i] * x[i * whole + begin + j];
        if (kernel == 1)
            memcpy(out + begin, sum, sizeof sum);
        else
            for (long c = 0; c < channels; c++)
                for (long k = 0; k < kernel; k++) out[begin + c * kernel + k] = sum[k * channels + c];
    }
}
