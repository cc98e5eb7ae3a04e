/* Experts with few rows each, where matrix products cost more than the weights they read.

   Rows are float32 and sorted by expert; expert experts[i] has rows starts[i] to starts[i] + counts[i]. A call is for
   first <= i < last, so that threads can share the experts. D and H are multiples of 16. Shapes: up (E, H, D), down (E, D, H), rows and outputs (R, D), hidden (R, H). Everything here is
   held against plain torch by tests/models/test_native_experts.py. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int64_t i64;

#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) (*(const v16 *)(p))
#define STORE(p) (*(v16 *)(p))
#define MAX_BLOCK 8
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define EXPORT __attribute__((visibility("default"), target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EXPORT __attribute__((visibility("default")))
#endif

INLINE float sum16(const v16 *a) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = (*a)[i] + (*a)[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

/* y (M, N) = x (M, K) W', W (N, K), for a block of M rows that the compiler knows. */
INLINE void times_transposed_block(int M, const float *x, const float *W, float *y, i64 N, i64 K) {
    for (i64 n = 0; n < N; n += 2) {
        v16 first[MAX_BLOCK] = {0}, second[MAX_BLOCK] = {0};
        const float *w = W + n * K;
        for (i64 k = 0; k < K; k += 16) {
            v16 w0 = LOAD(w + k), w1 = LOAD(w + K + k);
            __builtin_prefetch(w + 4 * K + k);
            __builtin_prefetch(w + 5 * K + k);
            for (int m = 0; m < M; m++) {
                v16 xv = LOAD(x + m * K + k);
                first[m] += w0 * xv;
                second[m] += w1 * xv;
            }
        }
        for (int m = 0; m < M; m++) {
            y[m * N + n] = sum16(&first[m]);
            y[m * N + n + 1] = sum16(&second[m]);
        }
    }
}

/* y (M, K) = g (M, N) W, W (N, K). */
INLINE void times_block(int M, const float *g, const float *W, float *y, i64 N, i64 K) {
    memset(y, 0, sizeof(float) * M * K);
    for (i64 n = 0; n < N; n += 4) {
        const float *w = W + n * K;
        for (i64 k = 0; k < K; k += 16) {
            v16 w0 = LOAD(w + k), w1 = LOAD(w + K + k), w2 = LOAD(w + 2 * K + k), w3 = LOAD(w + 3 * K + k);
            for (int j = 8; j < 12; j++) __builtin_prefetch(w + j * K + k);
            for (int m = 0; m < M; m++) {
                const float *a = g + m * N + n;
                STORE(y + m * K + k) = LOAD(y + m * K + k) + a[0] * w0 + a[1] * w1 + a[2] * w2 + a[3] * w3;
            }
        }
    }
}

#define BY_BLOCKS(block, M, a, W, y, in, out, N, K)                                                                   \
    for (i64 m = 0; m < (M); m += MAX_BLOCK) {                                                                        \
        const float *from = (a) + m * (in);                                                                           \
        float *to = (y) + m * (out);                                                                                  \
        switch ((M) - m) {                                                                                            \
        case 1: block(1, from, W, to, N, K); break;                                                                   \
        case 2: block(2, from, W, to, N, K); break;                                                                   \
        case 3: block(3, from, W, to, N, K); break;                                                                   \
        case 4: block(4, from, W, to, N, K); break;                                                                   \
        case 5: block(5, from, W, to, N, K); break;                                                                   \
        case 6: block(6, from, W, to, N, K); break;                                                                   \
        case 7: block(7, from, W, to, N, K); break;                                                                   \
        default: block(8, from, W, to, N, K);                                                                         \
        }                                                                                                             \
    }

INLINE void times_transposed(i64 M, const float *x, const float *W, float *y, i64 N, i64 K) {
    BY_BLOCKS(times_transposed_block, M, x, W, y, K, N, N, K)
}

INLINE void times(i64 M, const float *g, const float *W, float *y, i64 N, i64 K) {
    BY_BLOCKS(times_block, M, g, W, y, N, K, N, K)
}

/* hidden = relu(x up'), output = hidden down'. */
EXPORT void experts_forward(i64 first, i64 last, const i64 *experts, const i64 *starts, const i64 *counts, i64 D, i64 H,
                            const float *up, const float *down, const float *x, float *hidden, float *output) {
    for (i64 i = first; i < last; i++) {
        float *h = hidden + starts[i] * H;
        times_transposed(counts[i], x + starts[i] * D, up + experts[i] * H * D, h, H, D);
        for (i64 j = 0; j < counts[i] * H; j++) h[j] = h[j] > 0 ? h[j] : 0;
        times_transposed(counts[i], h, down + experts[i] * H * D, output + starts[i] * D, D, H);
    }
}

/* From the gradients at the unweighted outputs: weighs them in place by `weights` (R,), and writes the gradients at
   the hidden units, at `weights` and at x. */
EXPORT void experts_backward(i64 first, i64 last, const i64 *experts, const i64 *starts, const i64 *counts, i64 D, i64 H,
                             const float *up, const float *down, const float *hidden, const float *weights,
                             float *grad, float *grad_hidden, float *grad_weights, float *grad_x) {
    for (i64 i = first; i < last; i++) {
        times(counts[i], grad + starts[i] * D, down + experts[i] * H * D, grad_hidden + starts[i] * H, D, H);
        for (i64 r = starts[i]; r < starts[i] + counts[i]; r++) {
            v16 dot = {0};
            const float *h = hidden + r * H;
            float *gh = grad_hidden + r * H, w = weights[r];
            for (i64 j = 0; j < H; j += 16) dot += LOAD(gh + j) * LOAD(h + j);
            grad_weights[r] = sum16(&dot);
            for (i64 j = 0; j < H; j++) gh[j] = h[j] > 0 ? gh[j] * w : 0;
            for (i64 j = 0; j < D; j += 16) STORE(grad + r * D + j) = LOAD(grad + r * D + j) * w;
        }
        times(counts[i], grad_hidden + starts[i] * H, up + experts[i] * H * D, grad_x + starts[i] * D, H, D);
    }
}

INLINE double dot(const float *a, const float *b, i64 n) {
    v16 s = {0};
    for (i64 i = 0; i < n; i += 16) s += LOAD(a + i) * LOAD(b + i);
    return sum16(&s);
}

/* The sum of |left' right|^2 over experts, left (R, M), right (R, N): sum((left left') * (right right')). */
EXPORT double rows_squared_norm(i64 first, i64 last, const i64 *starts, const i64 *counts, i64 M, i64 N, const float *left,
                                const float *right) {
    double total = 0;
    for (i64 i = first; i < last; i++)
        for (i64 r = starts[i]; r < starts[i] + counts[i]; r++)
            for (i64 q = starts[i]; q <= r; q++)
                total += (q == r ? 1 : 2) * dot(left + r * M, left + q * M, M) * dot(right + r * N, right + q * N, N);
    return total;
}

/* Four rows and 16 columns of left' right, from row i and column j. */
INLINE void gradient_tile(i64 count, const float *left, const float *right, i64 M, i64 N, i64 i, i64 j, v16 *g) {
    g[0] = g[1] = g[2] = g[3] = (v16){0};
    for (i64 r = 0; r < count; r++) {
        v16 b = LOAD(right + r * N + j);
        const float *a = left + r * M + i;
        for (int q = 0; q < 4; q++) g[q] += a[q] * b;
    }
}

/* The step of FactoredAdam for matrices (E, M, N), row (E, M) and col (E, N); decay and keep (num,) are what is left of
   an expert's moments and weights. No gradient is stored: it is computed twice. */
EXPORT void rows_step(i64 first, i64 last, const i64 *experts, const i64 *starts, const i64 *counts, i64 M, i64 N, float *weights,
                      const float *left, const float *right, float *row, float *col, const float *decay,
                      const float *keep, double beta2, double bias_correction, double lr_, double eps_) {
    float *a = malloc(sizeof(float) * (M + 2 * N)), *b = a + M, *squares = b + N, lr = lr_, eps = eps_;
    float rest = 1 - beta2, correction = bias_correction;
    for (i64 e = first; e < last; e++) {
        const float *l = left + starts[e] * M, *r = right + starts[e] * N;
        float *W = weights + experts[e] * M * N, *R = row + experts[e] * M, *C = col + experts[e] * N;
        v16 g[4];
        double mean = 0;
        memset(squares, 0, sizeof(float) * N);
        for (i64 i = 0; i < M; i += 4) {
            v16 sums[4] = {0};
            for (i64 j = 0; j < N; j += 16) {
                gradient_tile(counts[e], l, r, M, N, i, j, g);
                for (int q = 0; q < 4; q++) sums[q] += g[q] * g[q];
                STORE(squares + j) = LOAD(squares + j) + ((g[0] * g[0] + g[1] * g[1]) + (g[2] * g[2] + g[3] * g[3]));
            }
            for (int q = 0; q < 4; q++) {
                R[i + q] = decay[e] * R[i + q] + rest * (sum16(&sums[q]) / N);
                mean += R[i + q];
            }
        }
        mean = mean / M > 1.17549435e-38 ? mean / M : 1.17549435e-38;
        for (i64 i = 0; i < M; i++) a[i] = sqrtf(R[i] / (float)mean);
        for (i64 j = 0; j < N; j++) {
            C[j] = decay[e] * C[j] + rest * (squares[j] / M);
            b[j] = sqrtf(C[j] / correction);
        }
        for (i64 i = 0; i < M; i += 4)
            for (i64 j = 0; j < N; j += 16) {
                gradient_tile(counts[e], l, r, M, N, i, j, g);
                for (int q = 0; q < 4; q++) {
                    float *w = W + (i + q) * N + j;
                    STORE(w) = keep[e] * LOAD(w) - lr * g[q] / (a[i + q] * LOAD(b + j) + eps);
                }
            }
    }
    free(a);
}
