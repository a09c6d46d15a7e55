/* SPDX-License-Identifier: Apache-2.0
 *
 * The softmax of a block of logits in two passes over it: the largest, then weights and all their sums. Loops without a sum
 * are plain C that a compiler turns into vectors; sums have their lanes written out, as their order is fixed.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"

#define CHUNK 2048 /* terms that are added up in float32 before they go to a float64 sum */

/* Logits this far below the largest have the weight 0: exp of less than -87 is denormal, and denormal numbers are slow. */
#define LOWEST (-60.0f)

/* exp(x) for LOWEST <= x <= 0, to two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
static inline float exponential(float x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits */
    float shifted = __builtin_fmaf(x, 1.44269504f, shift), n = shifted - shift;
    float r = __builtin_fmaf(n, -0.693359375f, x);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 1.0f / 5040;
    p = __builtin_fmaf(p, r, 1.0f / 720);
    p = __builtin_fmaf(p, r, 1.0f / 120);
    p = __builtin_fmaf(p, r, 1.0f / 24);
    p = __builtin_fmaf(p, r, 1.0f / 6);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p, r, 1.0f);
    p = __builtin_fmaf(p, r, 1.0f);
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (int32_t)((uint32_t)bits << 23) + 0x3f800000;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

static inline float weight_of(float x) {
    float inside = x > LOWEST ? x : LOWEST;
    float value = exponential(inside);
    return x > LOWEST ? value : 0.0f;
}

static float most_of(const float *x, int64_t count) {
    float least = INFINITY; /* of -x, as there is a MIN */
    vec low = ALL(INFINITY), zero = ALL(0.0f), minus = ALL(-1.0f);
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) low = MIN(low, FMA(LOAD(x + j), minus, zero));
    float parts[LANES];
    STORE(parts, low);
    for (int l = 0; l < LANES; l++) least = parts[l] < least ? parts[l] : least;
    for (; j < count; j++) least = -x[j] < least ? -x[j] : least;
    return -least;
}

static double sum_of(const float *x, int64_t count) {
    vec sum[2] = {ALL(0.0f), ALL(0.0f)};
    int64_t j = 0;
    for (; j + 2 * LANES <= count; j += 2 * LANES) sum[0] = ADD(sum[0], LOAD(x + j)), sum[1] = ADD(sum[1], LOAD(x + j + LANES));
    float parts[LANES];
    double total = 0.0;
    STORE(parts, ADD(sum[0], sum[1]));
    for (int l = 0; l < LANES; l++) total += parts[l];
    for (; j < count; j++) total += x[j];
    return total;
}

/* Row by row, logits (rows, codes) become weights exp(l - m), m the largest of the row; the weight of the winner is zero if
 * `losers`. Sums are of weights that are not yet divided by total, the sum of all:
 *   largest m, top the weight of the winner, rest that of all others, cost sum of w (l - m) over the weights that are kept.
 */
void softmax_rows(float *logits, int64_t rows, int64_t codes, const int64_t *winner, int32_t losers, float *largest,
                  float *top, float *rest, float *cost) {
    float moments[CHUNK];
    for (int64_t i = 0; i < rows; i++) {
        float *row = logits + i * codes, maximum = most_of(row, codes);
        /* The losers are added up by themselves: the winner may have nearly all of the weight. */
        float own = row[winner[i]] - maximum, mine = weight_of(own);
        row[winner[i]] = -INFINITY;
        double mass = 0.0, moment = 0.0;
        for (int64_t start = 0; start < codes; start += CHUNK) {
            int64_t count = codes - start < CHUNK ? codes - start : CHUNK;
            float *part = row + start;
            for (int64_t j = 0; j < count; j++) {
                float x = part[j] - maximum, inside = x > LOWEST ? x : LOWEST, w = weight_of(x);
                part[j] = w;
                moments[j] = w * inside;
            }
            mass += sum_of(part, count), moment += sum_of(moments, count);
        }
        if (!losers) {
            row[winner[i]] = mine;
            moment += mine > 0.0f ? (double)mine * own : 0.0;
        }
        largest[i] = maximum, top[i] = mine, rest[i] = (float)mass, cost[i] = (float)moment;
    }
}
