/* The transform of box_muller.py for float32 in one loop, by the same formulas except for two functions: the logarithm of
 * a float64 between 2^-53 and 1, and the sine of an angle between -pi/2 and pi/2. A library takes several times as long
 * for them. Here they have the relative precision of float32, also near their zeros.
 *
 * This file is compiled on the machine that runs it and compared there with box_muller.py before use: see c_loop.py. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define AT_ONCE 1024
#define STEP 7.314590396335798e-10f /* pi / 2^32 */
#define ONE 0x3F800000u             /* the bits of 1; below, those of sqrt(1/2) */
#define ROOT_HALF 0x3F3504F3u

static inline double double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Return j, rounded once. Both halves become mantissas, with exponents 2^84 and 2^52, because not every processor has
 * vector instructions that convert 64-bit integers. */
static inline double from_integer(int64_t j) {
    double high = double_of(((uint64_t)j >> 32) ^ 0x4530000080000000u);
    double low = double_of(((uint64_t)j & 0xFFFFFFFFu) | 0x4330000000000000u);
    return (high - (0x1p84 + 0x1p63 + 0x1p52)) + low;
}

/* Return log u. u = 2^e (1 + f), with 1 + f between sqrt(1/2) and sqrt(2). f is exact in float64 and then rounded relative
 * to itself, so no precision is lost where u is close to 1. log(1 + f) = f - f^2/2 + f^3 P(f): Moshier, "Methods and
 * Programs for Mathematical Functions" (1989), Cephes' logf. The relative error is 1e-8. */
static inline float logarithm(double u) {
    int32_t e = (int32_t)(bits_of((float)u) - ROOT_HALF) >> 23;
    float power = float_of(ONE - ((uint32_t)e << 23)); /* 2^-e */
    float f = (float)(u * (double)power - 1.0);
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    float square = f * f;
    return (float)e * 0.693147180559945f + (f + square * (f * p - 0.5f));
}

/* Return sin a as a + a^3 Q(a^2), for |a| up to pi/2: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964),
 * 4.3.97. The relative error is 2e-9. */
static inline float sine(float a) {
    float square = a * a;
    float q = -2.39e-8f;
    q = q * square + 2.7526e-6f;
    q = q * square - 1.984090e-4f;
    q = q * square + 8.3333315e-3f;
    q = q * square - 1.666666664e-1f;
    return a + a * (square * q);
}

/* Add scale * N(0, 1) to each of `size` values and divide by `divisor`; if `keep` is 0, replace them instead. j and k hold
 * (size + 1) / 2 integers each. The first half of the values gets the sines of the pairs, the rest their cosines. */
static inline __attribute__((always_inline)) void gaussians(const int64_t *restrict j, const int32_t *restrict k,
                                                            int64_t size, float scale, float divisor,
                                                            float *restrict sines, int keep) {
    int64_t pairs = (size + 1) / 2, cosine_count = size - pairs;
    float *restrict cosines = sines + pairs;
    for (int64_t first = 0; first < pairs; first += AT_ONCE) {
        int64_t last = first + AT_ONCE < pairs ? first + AT_ONCE : pairs;
        int64_t last_cosine = last < cosine_count ? last : cosine_count;
        float radius[AT_ONCE];
        for (int64_t i = first; i < last; i++) {
            double u = from_integer(j[i]) * 0x1p-64 + (0.5 + 0x1p-53);
            radius[i - first] = scale * sqrtf(-2.0f * logarithm(u));
        }
        for (int64_t i = first; i < last; i++) {
            float value = radius[i - first] * sine((float)k[i] * STEP + STEP / 2);
            sines[i] = keep ? (sines[i] + value) / divisor : value;
        }
        for (int64_t i = first; i < last_cosine; i++) {
            int32_t complement = ((int32_t)((uint32_t)k[i] << 31) >> 31) ^ k[i] ^ 0x7FFFFFFF;
            float value = radius[i - first] * sine((float)complement * STEP + STEP / 2);
            cosines[i] = keep ? (cosines[i] + value) / divisor : value;
        }
    }
}

/* Add and divide; a divisor of 0 replaces the values, in two thirds of the time. */
void clipgrad_add_gaussians(const int64_t *restrict j, const int32_t *restrict k, int64_t size, float scale,
                            float divisor, float *restrict sines) {
    if (divisor == 0.0f)
        gaussians(j, k, size, scale, 1.0f, sines, 0);
    else
        gaussians(j, k, size, scale, divisor, sines, 1);
}
