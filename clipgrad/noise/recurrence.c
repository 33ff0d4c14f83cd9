/* Noise of some steps from independent values and the noise of the steps before: row k becomes fresh row k, from which the
 * sum of tail[i - 1] times row k - i is taken away, for one row after the other. Compiled on the machine that runs it and compared with PyTorch's operations before use:
 * see recurrence.py. */
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define WIDE 16 /* values of one vector */
#else
#define WIDE 8
#endif
#define SUMS 8 /* vectors that stay in registers; with fewer, each addition waits for the one before */
#define TILE (WIDE * SUMS)

typedef float vector __attribute__((vector_size(4 * WIDE)));

static inline vector load(const float *from) {
    vector value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void tile(float *column, int64_t stride, int64_t rows, int64_t at, int64_t reach, const float *tail,
                        const float *fresh) {
    float *target = column + at * stride;
    vector sums[SUMS];
#pragma GCC unroll 8
    for (int j = 0; j < SUMS; j++) sums[j] = load(fresh + j * WIDE);
    for (int64_t i = 0; i < reach; i++) {
        at = at ? at - 1 : rows - 1;
        const float *earlier = column + at * stride;
        float weight = tail[i];
#pragma GCC unroll 8
        for (int j = 0; j < SUMS; j++) sums[j] -= weight * load(earlier + j * WIDE);
    }
#pragma GCC unroll 8
    for (int j = 0; j < SUMS; j++) memcpy(target + j * WIDE, &sums[j], sizeof sums[j]);
}

/* `fresh` holds `ahead` rows of independent values; if it is NULL, the rows of the ring hold them already. */
void clipgrad_correlate(float *ring, int64_t stride, int64_t rows, int64_t first, int64_t ahead, int64_t known,
                        int64_t lags, const float *tail, int64_t width, const float *fresh, int64_t fresh_stride) {
    int64_t start = 0;
    for (; start + TILE <= width; start += TILE)
        for (int64_t k = 0; k < ahead; k++) {
            int64_t at = (first + k) % rows, reach = k + known < lags ? k + known : lags;
            const float *given = fresh ? fresh + k * fresh_stride : ring + at * stride;
            tile(ring + start, stride, rows, at, reach, tail, given + start);
        }
    for (; start < width; start++)
        for (int64_t k = 0; k < ahead; k++) {
            int64_t at = (first + k) % rows, reach = k + known < lags ? k + known : lags, from = at;
            float sum = (fresh ? fresh + k * fresh_stride : ring + at * stride)[start];
            for (int64_t i = 0; i < reach; i++) {
                from = from ? from - 1 : rows - 1;
                sum -= tail[i] * ring[from * stride + start];
            }
            ring[at * stride + start] = sum;
        }
}

/* target = (target + noise) / divisor, rounded after each of the two. */
void clipgrad_add_and_divide(float *target, const float *noise, int64_t size, float divisor) {
    for (int64_t j = 0; j < size; j++) target[j] = (target[j] + noise[j]) / divisor;
}
