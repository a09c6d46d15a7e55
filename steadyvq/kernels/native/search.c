/* SPDX-License-Identifier: Apache-2.0
 *
 * Exact nearest codes on a CPU, without an N x K array: steadyvq/kernels/native/__init__.py says what is computed and why it is
 * exact; rounding.py has the bound. Plain C11 and the intrinsics of one layer below; no floating-point option that
 * changes results may be used to compile this.
 *
 * Codes lie in groups of 16: group g of float32 is [d][16] with entry -2 E, of bfloat16 [d / 2][16][2]. A bundle is 16 lanes
 * apart: one lane of BUNDLE neighbouring groups, so that its minimum needs no sum across a register.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lanes.h"

#define GROUP 16

#define PER_GROUP (GROUP / LANES)                                    /* vectors per group */
#define STEP (VECTORS / PER_GROUP > 0 ? VECTORS / PER_GROUP : 1)     /* groups per panel */

int rows_per_tile(void) { return ROWS; }
int groups_per_panel(void) { return STEP; }

int has_bfloat16(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

/* ---- packing ------------------------------------------------------------------------------------------------------ */

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Groups [first, last) of float32: entries -2 E and norms |E|^2, E = scale e - centre; infinite norms behind the last code. */
void pack_float32(const float *codes, int64_t count, int64_t d, float scale, const float *centre, int64_t first, int64_t last,
                  float *packed, float *norms) {
    for (int64_t g = first; g < last; g++) {
        float *out = packed + g * d * GROUP, *norm = norms + g * GROUP;
        memset(norm, 0, GROUP * sizeof(float));
        for (int64_t lane = 0; lane < GROUP; lane++) {
            int64_t j = g * GROUP + lane;
            if (j >= count) {
                for (int64_t k = 0; k < d; k++) out[k * GROUP + lane] = 0.0f;
                continue;
            }
            for (int64_t k = 0; k < d; k++) out[k * GROUP + lane] = -2.0f * (codes[j * d + k] * scale - centre[k]);
        }
        for (int64_t k = 0; k < d; k++)
            for (int64_t lane = 0; lane < GROUP; lane++) norm[lane] += 0.25f * out[k * GROUP + lane] * out[k * GROUP + lane];
        for (int64_t lane = 0; lane < GROUP; lane++)
            if (g * GROUP + lane >= count) norm[lane] = INFINITY;
    }
}

/* The same in bfloat16, rounded to nearest, d padded to an even number; errors: (padded codes) |E - E~|^2. */
void pack_bfloat16(const float *codes, int64_t count, int64_t d, float scale, const float *centre, int64_t first, int64_t last,
                   uint16_t *packed, float *norms, float *errors) {
    int64_t width = (d + 1) / 2 * 2;
    for (int64_t g = first; g < last; g++) {
        uint16_t *out = packed + g * width * GROUP;
        memset(out, 0, width * GROUP * sizeof(uint16_t));
        for (int64_t lane = 0; lane < GROUP; lane++) {
            int64_t j = g * GROUP + lane;
            float norm = 0.0f, error = 0.0f;
            for (int64_t k = 0; j < count && k < d; k++) {
                float e = codes[j * d + k] * scale - centre[k];
                uint16_t rounded = to_bfloat16(-2.0f * e);
                float rest = e + 0.5f * from_bfloat16(rounded);
                out[k / 2 * 2 * GROUP + lane * 2 + k % 2] = rounded;
                norm += e * e;
                error += rest * rest;
            }
            norms[g * GROUP + lane] = j < count ? norm : INFINITY;
            errors[g * GROUP + lane] = error;
        }
    }
}

/* Tiles [first, last) of latents scale z - centre: as they are, and transposed as float32 (d, ROWS) or bfloat16 (d / 2, ROWS, 2);
 * squares of their lengths and, in bfloat16, of the lengths of what rounding lost. Rows behind the last are zero. */
void pack_latents(const float *z, int64_t rows, int64_t d, float scale, const float *centre, int64_t first, int64_t last,
                  int32_t bfloat16, float *latents, void *tiles, float *squares, float *errors) {
    int64_t width = bfloat16 ? (d + 1) / 2 * 2 : d;
    for (int64_t i = first * ROWS; i < last * ROWS; i++) {
        float *out = latents + i * d, square = 0.0f, error = 0.0f;
        float *single = (float *)tiles + i / ROWS * width * ROWS + i % ROWS;
        uint16_t *half = (uint16_t *)tiles + i / ROWS * width * ROWS + i % ROWS * 2;
        for (int64_t k = 0; k < d; k++) out[k] = i < rows ? z[i * d + k] * scale - centre[k] : 0.0f;
        for (int64_t k = 0; k < d; k++) square += out[k] * out[k];
        if (bfloat16) {
            for (int64_t k = 0; k < width; k++) {
                uint16_t rounded = k < d ? to_bfloat16(out[k]) : 0;
                float rest = k < d ? out[k] - from_bfloat16(rounded) : 0.0f;
                half[k / 2 * 2 * ROWS + k % 2] = rounded;
                error += rest * rest;
            }
            errors[i] = error;
        } else
            for (int64_t k = 0; k < d; k++) single[k * ROWS] = out[k];
        squares[i] = square;
    }
}

/* ---- minima of bundles -------------------------------------------------------------------------------------------- */

/* low[r][lane] (rows `stride` apart) = min over the codes of `groups` groups in that lane of norm + z . (-2 E). */
static void tile_float32(const float *z, int64_t d, const float *packed, const float *norms, int64_t groups, float *low,
                         int64_t stride) {
    for (int64_t p = 0; p < groups; p += STEP) {
        vec sum[ROWS][VECTORS];
        const float *code = packed + p * d * GROUP, *latent = z;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sum[r][v] = LOAD(norms + p * GROUP + v * LANES);
        for (int64_t k = 0; k < d; k++, code += GROUP, latent += ROWS) {
            vec column[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) column[v] = LOAD(code + v / PER_GROUP * d * GROUP + v % PER_GROUP * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                vec x = ALL(latent[r]);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) sum[r][v] = FMA(x, column[v], sum[r][v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                float *place = low + r * stride + v % PER_GROUP * LANES;
                STORE(place, p == 0 && v < PER_GROUP ? sum[r][v] : MIN(LOAD(place), sum[r][v]));
            }
    }
}

#if defined(__AVX512BF16__)
static void tile_bfloat16(const uint16_t *z, int64_t pairs, const uint16_t *packed, const float *norms, int64_t groups,
                          float *low, int64_t stride) {
    for (int64_t p = 0; p < groups; p += STEP) {
        __m512 sum[ROWS][VECTORS];
        const uint16_t *code = packed + p * pairs * 2 * GROUP, *latent = z;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sum[r][v] = LOAD(norms + p * GROUP + v * LANES);
        for (int64_t k = 0; k < pairs; k++, code += 2 * GROUP, latent += 2 * ROWS) {
            __m512bh column[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) column[v] = (__m512bh)_mm512_loadu_si512(code + v * pairs * 2 * GROUP);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                int32_t pair;
                memcpy(&pair, latent + 2 * r, 4);
                __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, column[v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            __m512 least = MIN(MIN(sum[r][0], sum[r][1]), MIN(sum[r][2], sum[r][3]));
            STORE(low + r * stride, p == 0 ? least : MIN(LOAD(low + r * stride), least));
        }
    }
}
#endif

/* ---- exact scores ------------------------------------------------------------------------------------------------- */

/* steadyvq.kernels.reference.squared_distance and negative_product of one pair, with the same bits. */
static double exact_score(const float *z, const float *e, int64_t d, int dot, double *terms) {
    if (dot)
        for (int64_t k = 0; k < d; k++) terms[k] = (double)z[k] * (double)e[k];
    else
        for (int64_t k = 0; k < d; k++) {
            double difference = (double)z[k] - (double)e[k];
            terms[k] = difference * difference;
        }
    for (int64_t left = d; left > 1;) {
        int64_t half = (left + 1) / 2;
        for (int64_t k = 0; k < left - half; k++) terms[k] += terms[half + k];
        left = half;
    }
    return dot ? -terms[0] : terms[0];
}

/* Z . E with E = scale e - centre. */
static inline float product(const float *latent, const float *code, const float *centre, float scale, int64_t d) {
    vec sum = ALL(0.0f), factor = ALL(scale);
    int64_t k = 0;
    for (; k + LANES <= d; k += LANES) sum = FMA(LOAD(latent + k), SUB(MUL(LOAD(code + k), factor), LOAD(centre + k)), sum);
    if (k < d) {
        vec rest = SUB(MUL(LOAD_FIRST(code + k, d - k), factor), LOAD_FIRST(centre + k, d - k));
        sum = FMA(LOAD_FIRST(latent + k, d - k), rest, sum);
    }
    return total_of(sum);
}

typedef struct {
    int64_t rows, d, codes, groups, bundle; /* groups: all of them, a multiple of bundle; bundle: groups per bundle */
    const float *z, *table;                 /* as given, (rows, d) and (codes, d) */
    const float *latents;                   /* (rows, d) scaled and centred */
    const void *tiles;                      /* the same in tiles of ROWS, transposed, float32 or bfloat16 */
    const void *packed;                     /* codes in groups */
    const float *norms, *centre;            /* (groups * GROUP) and (d) */
    const float *screen, *slack;            /* (rows) see search */
    float scale;
    int32_t bfloat16, dot;
} Problem;

typedef struct {
    float *minima;    /* (rows of a block, bundles) */
    float *values;    /* of candidates */
    int64_t *members; /* candidates */
    double *terms;    /* (d) */
    int64_t found;    /* number of candidates */
    float lowest;     /* smallest float32 score of this latent so far */
} Scratch;

static void block_minima(const Problem *p, int64_t top, int64_t end, float *minima) {
    int64_t supers = p->groups / p->bundle, stride = supers * GROUP, tiles = (end - top + ROWS - 1) / ROWS;
    int64_t width = p->bfloat16 ? (p->d + 1) / 2 * 2 : p->d;
    for (int64_t s = 0; s < supers; s++) {
        int64_t group = s * p->bundle;
        const float *norms = p->norms + group * GROUP;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t offset = (top + t * ROWS) * width;
            float *low = minima + t * ROWS * stride + s * GROUP;
#if defined(__AVX512BF16__)
            if (p->bfloat16) {
                tile_bfloat16((const uint16_t *)p->tiles + offset, width / 2,
                              (const uint16_t *)p->packed + group * width * GROUP, norms, p->bundle, low, stride);
                continue;
            }
#endif
            tile_float32((const float *)p->tiles + offset, width, (const float *)p->packed + group * width * GROUP, norms,
                         p->bundle, low, stride);
        }
    }
}

/* Scores the members of a bundle in float32 and notes those that may be nearest; returns how many there were. */
static int64_t look(const Problem *p, int64_t i, int64_t bundle, Scratch *s) {
    int64_t first = bundle / GROUP * p->bundle * GROUP + bundle % GROUP, seen = 0;
    for (int64_t j = first; j < p->codes && seen < p->bundle; j += GROUP, seen++) {
        float value = p->norms[j] - 2.0f * product(p->latents + i * p->d, p->table + j * p->d, p->centre, p->scale, p->d);
        if (value < s->lowest) s->lowest = value;
        if (value <= s->lowest + p->slack[i]) {
            s->members[s->found] = j;
            s->values[s->found++] = value;
        }
    }
    return seen;
}

/* Nearest codes of rows [first, last), `first` a multiple of ROWS, in blocks of `block` rows, a multiple of ROWS too.
 *
 * The nearest code lies in a bundle whose minimum is at most `screen` above any float32 score, and its float32 score is at
 * most `slack` above any other. looked: pairs scored in float32 and in float64 are added up here. Returns -1 without memory.
 */
int search(const Problem *p, int64_t first, int64_t last, int64_t block, int64_t *indices, double *score, int64_t *looked) {
    int64_t bundles = p->groups / p->bundle * GROUP, most = p->groups * GROUP;
    Scratch s = {malloc(sizeof(float) * block * bundles), malloc(sizeof(float) * most), malloc(sizeof(int64_t) * most),
                 malloc(sizeof(double) * p->d), 0, 0};
    int failed = !s.minima || !s.values || !s.members || !s.terms;
    for (int64_t top = first; !failed && top < last; top += block) {
        int64_t end = top + block < last ? top + block : last;
        block_minima(p, top, end, s.minima);
        for (int64_t i = top; i < end; i++) {
            const float *low = s.minima + (i - top) * bundles;
            float lanes[GROUP];
            for (int l = 0; l < GROUP; l++) lanes[l] = INFINITY;
            for (int64_t b = 0; b < bundles; b += GROUP)
                for (int l = 0; l < GROUP; l++) lanes[l] = low[b + l] < lanes[l] ? low[b + l] : lanes[l];
            float least = INFINITY;
            for (int l = 0; l < GROUP; l++) least = lanes[l] < least ? lanes[l] : least;
            int64_t best_bundle = 0;
            while (low[best_bundle] > least) best_bundle++;
            s.found = 0, s.lowest = INFINITY;
            looked[0] += look(p, i, best_bundle, &s);
            for (int64_t b = 0; b < bundles; b += GROUP) {
                float limit = s.lowest + p->screen[i];
                int any = 0;
                for (int l = 0; l < GROUP; l++) any |= low[b + l] <= limit;
                for (int l = 0; any && l < GROUP; l++)
                    if (low[b + l] <= limit && b + l != best_bundle) looked[0] += look(p, i, b + l, &s);
            }
            indices[i] = p->codes, score[i] = INFINITY;
            for (int64_t c = 0; c < s.found; c++) {
                int64_t j = s.members[c];
                if (s.values[c] > s.lowest + p->slack[i]) continue;
                double exact = exact_score(p->z + i * p->d, p->table + j * p->d, p->d, p->dot, s.terms);
                looked[1]++;
                if (exact < score[i] || (exact == score[i] && j < indices[i])) score[i] = exact, indices[i] = j;
            }
        }
    }
    free(s.minima), free(s.values), free(s.members), free(s.terms);
    return failed ? -1 : 0;
}
