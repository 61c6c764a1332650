/* Normal numbers from a stream cipher: ChaCha in counter mode, then Box and Muller's transform.
 *
 * harness/dp/random.py has the same in numpy, and both give the same bits on every machine: single operations in one
 * order, each rounded once, hence no contraction of a product and a sum. What that order is stands there; this file
 * repeats it without comment.
 */
#define FLAGS -ffp-contract=off

#include <math.h>
#include <stdint.h>

#include "vector.h"

#define ROUNDS 20
#define BLOCKS 16 /* of the cipher in a tile, whatever the width of a vector */
#define TILE (16 * BLOCKS)

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define TURN(x, by) x = x << by | x >> (32 - by)
#define QUARTER(a, b, c, d)                                                                                            \
    x[a] += x[b], x[d] ^= x[a], TURN(x[d], 16);                                                                        \
    x[c] += x[d], x[b] ^= x[c], TURN(x[b], 12);                                                                        \
    x[a] += x[b], x[d] ^= x[a], TURN(x[d], 8);                                                                         \
    x[c] += x[d], x[b] ^= x[c], TURN(x[b], 7)

/* LANES blocks, one in each lane: x[j] is their word j. The low half of the counter does not overflow within a tile. */
static inline void cipher(words *x, const uint32_t *key, uint64_t counter) {
    const uint32_t start[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    words lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    lane += (uint32_t)counter;
    const uint32_t high = counter >> 32;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] = (words){0} + start[i];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) x[4 + i] = (words){0} + key[i];
    x[12] = lane, x[13] = (words){0} + high, x[14] = x[15] = (words){0};
    for (int i = 0; i < ROUNDS; i += 2) {
        QUARTER(0, 4, 8, 12);
        QUARTER(1, 5, 9, 13);
        QUARTER(2, 6, 10, 14);
        QUARTER(3, 7, 11, 15);
        QUARTER(0, 5, 10, 15);
        QUARTER(1, 6, 11, 12);
        QUARTER(2, 7, 8, 13);
        QUARTER(3, 4, 9, 14);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] += start[i];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) x[4 + i] += key[i];
    x[12] += lane, x[13] += high;
}

static inline vec choose(ints where, vec yes, vec no) {
    return (vec)(((ints)yes & where) | ((ints)no & ~where));
}

/* Two independent normal numbers in each lane, from a word for the radius and one for the angle. */
static inline void transform(words radius, words angle, vec *first, vec *second) {
    const ints high = radius > 0xb504f333u;
    const vec x = __builtin_convertvector(radius ^ (words)high, vec) + 0.5f;
    const words bits = (words)x - 0x3f3504f3u;
    const vec e = __builtin_convertvector((((ints)bits >> 23) - 32) & ~high, vec);
    const vec f = choose(high, x * -0x1p-32f, (vec)((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f);
    const vec s = f / (f + 2.0f), z = s * s, h = f * f * 0.5f;
    const vec r = z * (z * (z * 0.29580277f + 0.39988774f) + 0.66666687f);
    const vec log = e * 0.693359375f + (f + (s * (h + r) + e * -2.1219444e-4f - h));
    vec length = log * -2.0f;
    for (int i = 0; i < LANES; i++) length[i] = sqrtf(length[i]);

    const vec t = __builtin_convertvector((ints)(angle | 3u) - 1, vec) * 0x1p-32f, q = t * t;
    const vec sine = t * (q * (q * (q * -0.004602149f + 0.07968022f) + -0.6459635f) + 1.5707964f);
    const vec cosine = q * (q * (q * (q * 0.0009067399f + -0.020861529f) + 0.2536694f) + -1.2337005f) + 1.0f;
    const vec a = length * (vec)((words)cosine ^ ((angle & 2u) << 30)), b = length * sine;
    const ints swap = -(ints)(angle & 1u);
    *first = choose(swap, b, a), *second = choose(swap, a, b);
}

/* The cipher's words [tiles, word of the block, block of the tile]. */
void cipher_words(const uint32_t *key, uint64_t counter, uint32_t *out, long tiles, int threads) {
#pragma omp parallel for num_threads(threads) if (tiles > 16)
    for (long tile = 0; tile < tiles; tile++)
        for (int b = 0; b < BLOCKS; b += LANES) {
            words x[16];
            cipher(x, key, counter + tile * BLOCKS + b);
            for (int j = 0; j < 16; j++) *(words *)(out + tile * TILE + j * BLOCKS + b) = x[j];
        }
}

/* out = scale * z, plus value unless that is NULL. */
void add_normals(const uint32_t *key, uint64_t counter, const float *value, float scale, float *out, long length,
                 int threads) {
    const long tiles = (length + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) if (tiles > 16)
    for (long tile = 0; tile < tiles; tile++) {
        float z[TILE];
        for (int b = 0; b < BLOCKS; b += LANES) {
            words x[16];
            cipher(x, key, counter + tile * BLOCKS + b);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                transform(x[j], x[j + 8], (vec *)(z + j * BLOCKS + b), (vec *)(z + (j + 8) * BLOCKS + b));
        }
        const long start = tile * TILE, here = length - start < TILE ? length - start : TILE;
        if (value)
            for (long i = 0; i < here; i++) out[start + i] = value[start + i] + scale * z[i];
        else
            for (long i = 0; i < here; i++) out[start + i] = scale * z[i];
    }
}
