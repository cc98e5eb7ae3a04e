/* The step of FactoredAdam from a gradient of the parameter's shape, for float32 matrices (E, M, N) with row (E, M),
   col (E, N) and N a multiple of 8. It reads a gradient twice, the second time from a cache, and a weight once. A call
   is for first <= e < last, so that threads can share the matrices.
   Everything here is held against plain torch by tests/training/test_dense_step.py. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef int64_t i64;

#define LOAD(p) (*(const v8 *)(p))
#define STORE(p) (*(v8 *)(p))
#define AHEAD 512 /* floats between a use and its prefetch, which crosses pages as the hardware's does not */
#define TINY 1.17549435e-38f
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define EXPORT __attribute__((visibility("default"), target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT void dense_step(i64 first, i64 last, i64 M, i64 N, float *weights, const float *grad, float *row, float *col,
                       double beta2, double bias_correction, double lr, double eps, double weight_decay) {
    float *b = malloc(sizeof(float) * N), keep = 1 - lr * weight_decay, rest = 1 - beta2, decay = beta2;
    for (i64 e = first; e < last; e++) {
        float *R = row + e * M, *C = col + e * N;
        double total = 0;
        memset(b, 0, sizeof(float) * N); /* first the sums of the columns' squares, then 1 / (b + eps) */
        for (i64 i = 0; i < M; i++) {
            const float *g = grad + (e * M + i) * N;
            v8 sums = {0};
            for (i64 j = 0; j < N; j += 8) {
                v8 squares = LOAD(g + j) * LOAD(g + j);
                __builtin_prefetch(g + j + AHEAD);
                sums += squares;
                STORE(b + j) = LOAD(b + j) + squares;
            }
            float sum = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
            R[i] = decay * R[i] + rest * (sum / N);
            total += R[i];
        }
        float mean = total / M > TINY ? total / M : TINY;
        for (i64 j = 0; j < N; j++) {
            C[j] = decay * C[j] + rest * (b[j] / M);
            b[j] = 1 / (sqrtf(C[j] / (float)bias_correction) + (float)eps);
        }
        for (i64 i = 0; i < M; i++) {
            const float *g = grad + (e * M + i) * N;
            float *w = weights + (e * M + i) * N, scale = -lr / (sqrtf(R[i] / mean) + (float)eps);
            for (i64 j = 0; j < N; j += 8) {
                __builtin_prefetch(w + j + AHEAD);
                STORE(w + j) = keep * LOAD(w + j) + scale * LOAD(g + j) * LOAD(b + j);
            }
        }
    }
    free(b);
}
