/* The geometry of a convolution, and images copied so that channels are next to each other. */
#ifndef EPSBENCH_IMAGE_H
#define EPSBENCH_IMAGE_H

#include "vector.h"

typedef struct {
    long height, width, channels; /* of the input */
    long rows, columns, outputs;  /* of the output */
    long kernel_rows, kernel_columns, stride_rows, stride_columns, padding_rows, padding_columns;
    long dilation_rows, dilation_columns;
} Shape;

/* How an image of a batch lies in memory: floats from one row, column and channel to the next. */
typedef struct {
    long example, channel, row, column;
} Strides;

#if LANES == 16
#define PICK(F)                                                                                                        \
    F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7), F(8), F(9), F(10), F(11), F(12), F(13), F(14), F(15)
#else
#define PICK(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7)
#endif

/* One stage of a transposition: exchange the off-diagonal blocks of side S. */
#define STAGE(S)                                                                                                       \
    for (int i = 0; i < LANES; i++)                                                                                    \
        if (!(i & S)) {                                                                                                \
            const vec a = v[i], b = v[i + S];                                                                          \
            v[i] = __builtin_shufflevector(a, b, PICK(UPPER_##S));                                                     \
            v[i + S] = __builtin_shufflevector(a, b, PICK(LOWER_##S));                                                 \
        }
#define UPPER(S, j) ((j) & S ? LANES + (j)-S : (j))
#define LOWER(S, j) ((j) & S ? LANES + (j) : (j) + S)
#define UPPER_1(j) UPPER(1, j)
#define UPPER_2(j) UPPER(2, j)
#define UPPER_4(j) UPPER(4, j)
#define UPPER_8(j) UPPER(8, j)
#define LOWER_1(j) LOWER(1, j)
#define LOWER_2(j) LOWER(2, j)
#define LOWER_4(j) LOWER(4, j)
#define LOWER_8(j) LOWER(8, j)

static inline void transpose(vec *v) {
#pragma GCC unroll 16
    STAGE(1)
#pragma GCC unroll 16
    STAGE(2)
#pragma GCC unroll 16
    STAGE(4)
#if LANES == 16
#pragma GCC unroll 16
    STAGE(8)
#endif
}

/* Copy one image into `to` [rows + 2 * pad_rows, columns + 2 * pad_columns, channels], whose border is zero already. */
static void channels_last(const float *from, Strides by, float *to, long rows, long columns, long channels,
                          long pad_rows, long pad_columns) {
    const long line = (columns + 2 * pad_columns) * channels;
    to += pad_rows * line + pad_columns * channels;
    if (by.channel == 1 && by.column == channels) {
        for (long r = 0; r < rows; r++) memcpy(to + r * line, from + r * by.row, 4 * columns * channels);
        return;
    }
    if (by.channel == 1) {
        for (long r = 0; r < rows; r++)
            for (long x = 0; x < columns; x++)
                memcpy(to + r * line + x * channels, from + r * by.row + x * by.column, 4 * channels);
        return;
    }
    long c = 0;
    if (by.column == 1 && by.row == columns) {
        const long positions = rows * columns;
        for (; c + LANES <= channels; c += LANES) {
            long t = 0;
            for (; t + LANES <= positions; t += LANES) {
                vec v[LANES];
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) v[i] = *(const vec *)(from + (c + i) * by.channel + t);
                transpose(v);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    *(vec *)(to + (t + i) / columns * line + (t + i) % columns * channels + c) = v[i];
            }
            for (; t < positions; t++)
                for (int i = 0; i < LANES; i++)
                    to[t / columns * line + t % columns * channels + c + i] = from[(c + i) * by.channel + t];
        }
    }
    for (; c < channels; c++)
        for (long r = 0; r < rows; r++)
            for (long x = 0; x < columns; x++)
                to[r * line + x * channels + c] = from[c * by.channel + r * by.row + x * by.column];
}

#endif
