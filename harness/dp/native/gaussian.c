/* Integers of a Gaussian from a stream cipher: ChaCha in counter mode, boxes of equal mass, and what they leave over.
 *
 * harness/dp/gaussian.py says what is drawn and why it is exact, and has the same in PyTorch; both give the same bits on
 * every machine. Floating point is used to compare, with a margin, and to place integers on a grid: single operations in
 * one order, each rounded once, hence no contraction of a product and a sum.
 */
#define FLAGS -ffp-contract=off

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "vector.h"

#define ROUNDS 20
#define BLOCKS 16 /* of the cipher in a tile, whatever the width of a vector */
#define TILE (16 * BLOCKS)

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define TURN(x, by) x = x << by | x >> (32 - by)

/* By whole bytes a shuffle is one instruction where there is none that turns. */
#if !defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 12)
typedef uint8_t bytes __attribute__((vector_size(4 * LANES), may_alias));
#define FOUR(i, a, b, c, d) 4 * i + a, 4 * i + b, 4 * i + c, 4 * i + d
#define MOVED(x, ...)                                                                                                  \
    x = (words)__builtin_shufflevector(                                                                                \
        (bytes)x, (bytes)x, FOUR(0, __VA_ARGS__), FOUR(1, __VA_ARGS__), FOUR(2, __VA_ARGS__), FOUR(3, __VA_ARGS__),    \
        FOUR(4, __VA_ARGS__), FOUR(5, __VA_ARGS__), FOUR(6, __VA_ARGS__), FOUR(7, __VA_ARGS__))
#define TURN16(x) MOVED(x, 2, 3, 0, 1)
#define TURN8(x) MOVED(x, 3, 0, 1, 2)
#else
#define TURN16(x) TURN(x, 16)
#define TURN8(x) TURN(x, 8)
#endif
#define QUARTER(a, b, c, d)                                                                                            \
    x[a] += x[b], x[d] ^= x[a], TURN16(x[d]);                                                                        \
    x[c] += x[d], x[b] ^= x[c], TURN(x[b], 12);                                                                        \
    x[a] += x[b], x[d] ^= x[a], TURN8(x[d]);                                                                         \
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

/* --- boxes, and what they leave over: see harness/dp/gaussian.py --- */

#define CELL 7
#define FINE 38
#define INSIDE (FINE - CELL)
#define CELLS (16 << CELL)
#define LEFT 0xffff /* a box that no cell owns */
#define NUMBERS (10 * BLOCKS)
#define MASKS 3 /* of 64 bits, for the numbers of a tile */
#define REJECTED INT64_MIN

struct tables {
    const uint16_t *boxes;
    const int64_t *thresholds;
    const int32_t *aliases;
    const double *heights;
    double margin;
    int64_t (*decide)(const uint32_t *words);
};

/* Where numbers go: as integers, or added to values on a grid. */
struct sink {
    int64_t *integers;
    const double *value;
    double inverse, step;
    int shift;
    float *narrow; /* one of the two */
    double *out;
};

#define EDGE 0x1p50

/* The value on the grid. */
static inline double rounded(double value, double inverse) {
    double k = rint(value * inverse);
    k = k > EDGE ? EDGE : k;
    k = k < -EDGE ? -EDGE : k;
    return k == k ? k : 0; /* what is no number stays inside */
}

static inline void put(const struct sink *to, long i, int64_t number) {
    if (to->integers)
        to->integers[i] = number;
    else {
        const double noise = (double)(number >> to->shift) + 0.5;
        const double sum = (rounded(to->value[i], to->inverse) + noise) * to->step;
        if (to->narrow)
            to->narrow[i] = (float)sum;
        else
            to->out[i] = sum;
    }
}

static inline double as_double(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint64_t as_bits(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The numbers of one tile that fall into boxes; sets the bits of those that do not. */
static inline void boxed(const uint32_t *key, uint64_t counter, const struct tables *t, const struct sink *to, long start,
                         long length, uint64_t *left) {
    uint32_t cell[NUMBERS], place[NUMBERS];
    for (int b = 0; b < BLOCKS; b += LANES) {
        words x[16];
        cipher(x, key, counter + b);
#pragma GCC unroll 5
        for (int j = 0; j < 5; j++) {
            *(words *)(cell + j * BLOCKS + b) = x[j] & 0xffff, *(words *)(cell + (j + 5) * BLOCKS + b) = x[j] >> 16;
            *(words *)(place + j * BLOCKS + b) = x[j + 5], *(words *)(place + (j + 5) * BLOCKS + b) = x[j + 10];
        }
    }
    for (int i = 0; i < NUMBERS; i++) cell[i] = t->boxes[cell[i]];
    uint8_t over[NUMBERS];
    for (int i = 0; i < NUMBERS; i++) over[i] = (cell[i] == LEFT) & (i < length);
    memset(left, 0, MASKS * sizeof *left);
    for (int i = 0; i < NUMBERS; i += 8) {
        uint64_t eight;
        memcpy(&eight, over + i, sizeof eight);
        if (eight)
            for (int j = i; j < i + 8; j++) left[j / 64] |= (uint64_t)over[j] << j % 64;
    }
    if (to->integers) {
        for (long i = 0; i < length; i++) {
            const uint64_t size = (uint64_t)cell[i] << INSIDE | place[i] >> 1;
            to->integers[start + i] = size ^ -(uint64_t)(place[i] & 1);
        }
        return;
    }
    const double *value = to->value + start;
    double sum[NUMBERS];
    const double inverse = to->inverse, step = to->step;
    const int shift = to->shift;
    for (long i = 0; i < length; i++) {
        const uint64_t size = ((uint64_t)cell[i] << INSIDE | place[i] >> 1) >> shift;
        /* An integer below 2^52 as a double, and its sign. */
        const double half = as_double(size | 0x4330000000000000u) - 0x1p52 + 0.5;
        const double noise = as_double(as_bits(half) ^ (uint64_t)place[i] << 63);
        sum[i] = (rounded(value[i], inverse) + noise) * step;
    }
    if (to->narrow)
        for (long i = 0; i < length; i++) to->narrow[start + i] = (float)sum[i];
    else
        memcpy(to->out + start, sum, length * sizeof *sum);
}

/* One try at what the boxes leave over, from one block of the cipher: a number, or REJECTED. */
static inline int64_t tried(const uint32_t *w, const struct tables *t) {
    const int64_t part = (int64_t)w[0] << 20 | w[1] >> 12, bar = (int64_t)w[4] << 20 | w[5] >> 12;
    const int32_t drawn = w[1] & (2 * CELLS - 1);
    if (part == t->thresholds[drawn]) return t->decide(w);
    const int32_t piece = part < t->thresholds[drawn] ? drawn : t->aliases[drawn], cell = piece % CELLS;
    const int64_t inside = w[3] >> 1;
    if (piece >= CELLS) {
        const double near = ((double)((1ll << INSIDE) - inside) - 0.5) * 0x1p-38;
        const double x = near * ((double)(cell + 1) * 0x1p-6 - near) * 0.5;
        double e = 1.0 / 3628800;
        e = e * x + 1.0 / 362880;
        e = e * x + 1.0 / 40320;
        e = e * x + 1.0 / 5040;
        e = e * x + 1.0 / 720;
        e = e * x + 1.0 / 120;
        e = e * x + 1.0 / 24;
        e = e * x + 1.0 / 6;
        e = e * x + 0.5;
        e = (e * x + 1.0) * x;
        const double gap = (double)bar * 0x1p-52 * t->heights[cell] - e;
        if (fabs(gap) <= t->margin * t->heights[cell]) return t->decide(w);
        if (gap > 0) return REJECTED;
    }
    return ((int64_t)cell << INSIDE | inside) ^ -(int64_t)(w[3] & 1);
}

/* The numbers that are left, in rounds: a block for each, in order, and another round for those that were rejected. */
static uint64_t finished(const uint32_t *key, uint64_t counter, const struct tables *t, const struct sink *to, long *left,
                         long count) {
    while (count) {
        long kept = 0;
        for (long first = 0; first < count; first += LANES) {
            words x[16];
            cipher(x, key, counter + first);
            for (long i = first; i < first + LANES && i < count; i++) {
                uint32_t w[16];
                for (int j = 0; j < 16; j++) w[j] = x[j][i - first];
                const int64_t number = tried(w, t);
                if (number == REJECTED)
                    left[kept++] = left[i];
                else
                    put(to, left[i], number);
            }
        }
        counter += (count + BLOCKS - 1) / BLOCKS * BLOCKS;
        count = kept;
    }
    return counter;
}

/* `length` numbers, to `integers` or, where that is NULL, to `narrow` or `out` on the grid with `value`. Returns the next counter,
 * or 0 where there is no memory. */
uint64_t gaussian(const uint32_t *key, uint64_t counter, const struct tables *t, int64_t *integers, const double *value,
                  double inverse, double step, int shift, float *narrow, double *out, long length, int threads) {
    const struct sink to = {integers, value, inverse, step, shift, narrow, out};
    const long tiles = (length + NUMBERS - 1) / NUMBERS;
    uint64_t *masks = malloc((tiles + 1) * MASKS * sizeof *masks);
    if (!masks) return 0;
#pragma omp parallel for num_threads(threads) if (tiles > 16)
    for (long tile = 0; tile < tiles; tile++) {
        const long start = tile * NUMBERS, here = length - start < NUMBERS ? length - start : NUMBERS;
        boxed(key, counter + tile * BLOCKS, t, &to, start, here, masks + MASKS * tile);
    }
    long count = 0;
    for (long i = 0; i < MASKS * tiles; i++) count += __builtin_popcountll(masks[i]);
    long *left = malloc((count + 1) * sizeof *left);
    if (!left) return free(masks), 0;
    count = 0;
    for (long tile = 0; tile < tiles; tile++)
        for (int i = 0; i < MASKS; i++)
            for (uint64_t mask = masks[MASKS * tile + i]; mask; mask &= mask - 1)
                left[count++] = tile * NUMBERS + 64 * i + __builtin_ctzll(mask);
    const uint64_t next = finished(key, counter + tiles * BLOCKS, t, &to, left, count);
    free(masks), free(left);
    return next;
}
