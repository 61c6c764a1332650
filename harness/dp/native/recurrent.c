/* The elementwise parts of an LSTM's backward pass through time: one pass over memory each. */
#include <stdint.h>
#include <string.h>

/* exp(x) for -87 <= x <= 88 to two rounding units: 2^n by its bits, the rest by a polynomial (Cephes). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shift = 12582912.0f, n = (x * 1.44269504f + shift) - shift;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* gates [T, N, 4, h]: what the gates' functions get, on return d c / d (i, f, g) and d h / d o before these functions;
 * cell [N, h]: c_0, on return c_T; slope, forget, shown [T, N, h]: d h / d c, f, and h on return. */
void lstm_local(float *gates, float *cell, float *slope, float *forget, float *shown, long steps, long rows, long h,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (steps * rows * h > 1 << 14)
    for (long n = 0; n < rows; n++) {
        for (long t = 0; t < steps; t++) {
            const long at = (t * rows + n) * h;
            float *restrict i = gates + 4 * at, *restrict f = i + h, *restrict g = f + h, *restrict o = g + h;
            float *restrict c = cell + n * h, *restrict s = slope + at, *restrict k = forget + at;
            float *restrict m = shown + at;
#pragma omp simd
            for (long j = 0; j < h; j++) {
                const float in = sigmoid(i[j]), keep = sigmoid(f[j]), new = 2 * sigmoid(2 * g[j]) - 1;
                const float out = sigmoid(o[j]), added = in * new, next = keep * c[j] + added;
                const float tanh = 2 * sigmoid(2 * next) - 1, h_t = out * tanh;
                i[j] = added - added * in;
                f[j] = (keep - keep * keep) * c[j];
                g[j] = in - added * new;
                o[j] = h_t - h_t * out;
                s[j] = out - h_t * tanh;
                k[j] = keep;
                m[j] = h_t;
                c[j] = next;
            }
        }
    }
}

/* One step back: dh [N, h], dc [N, h] at this step's cell, on return at the one before; gates [N, 4, h] as above, on
 * return the gradients. */
void lstm_step(float *gates, const float *dh, const float *slope, const float *forget, float *dc, long rows, long h,
               int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * h > 1 << 13)
    for (long n = 0; n < rows; n++) {
        float *restrict i = gates + 4 * n * h, *restrict f = i + h, *restrict g = f + h, *restrict o = g + h;
        float *restrict d = dc + n * h;
        const float *restrict e = dh + n * h, *restrict s = slope + n * h, *restrict k = forget + n * h;
#pragma omp simd
        for (long j = 0; j < h; j++) {
            const float to = d[j] + e[j] * s[j];
            i[j] *= to;
            f[j] *= to;
            g[j] *= to;
            o[j] *= e[j];
            d[j] = to * k[j];
        }
    }
}
