/* SPDX-License-Identifier: Apache-2.0
 *
 * The vector unit: LANES float32 numbers, and the tile of ROWS x VECTORS registers that its register file has room for.
 */
#ifndef STEADYVQ_LANES_H
#define STEADYVQ_LANES_H

#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define ROWS 6
#define VECTORS 4
typedef __m512 vec;
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define ALL(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MIN(a, b) _mm512_min_ps(a, b)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define LOAD_FIRST(p, n) _mm512_maskz_loadu_ps((__mmask16)((1u << (n)) - 1), p)
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define ROWS 6
#define VECTORS 2
typedef __m256 vec;
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define ALL(x) _mm256_set1_ps(x)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MIN(a, b) _mm256_min_ps(a, b)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#define ROWS 6
#define VECTORS 4
typedef float32x4_t vec;
#define LOAD(p) vld1q_f32(p)
#define STORE(p, v) vst1q_f32(p, v)
#define ALL(x) vdupq_n_f32(x)
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define MIN(a, b) vminq_f32(a, b)
#define ADD(a, b) vaddq_f32(a, b)
#define SUB(a, b) vsubq_f32(a, b)
#define MUL(a, b) vmulq_f32(a, b)
#else
#error "this processor has no vector unit that is written for here"
#endif

#ifndef LOAD_FIRST
/* The first n < LANES numbers, and zeros. */
static inline vec LOAD_FIRST(const float *p, int64_t n) {
    float parts[LANES] = {0};
    for (int64_t i = 0; i < n; i++) parts[i] = p[i];
    return LOAD(parts);
}
#endif

/* The sum of all lanes. */
static inline float total_of(vec x) {
    float parts[LANES];
    STORE(parts, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[half + i];
    return parts[0];
}

#endif
