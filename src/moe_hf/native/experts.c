/* Experts with few rows each, where matrix products cost more than the weights they read.

   Rows are float32 and sorted by expert; expert experts[i] has rows starts[i] to starts[i] + counts[i]. A call is for
   first <= i < last, so that threads can share the experts. D and H are multiples of 16. Shapes: up (E, H, D), down
   (E, D, H), rows (R, D), hidden (R, H). tests/models/test_native_experts.py holds it all against plain torch. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef double d4 __attribute__((vector_size(32), aligned(8)));

#define INLINE static inline __attribute__((always_inline))
#define SOME_EXPERTS i64 first, i64 last, const i64 *experts, const i64 *starts, const i64 *counts
#define LOAD(p) (*(const v8 *)(p))
#define STORE(p) (*(v8 *)(p))
#define WIDE(p) (*(const d4 *)(p))
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define EXPORT __attribute__((visibility("default"), target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EXPORT __attribute__((visibility("default")))
#endif
/* Blocks of up to 4 rows, whose number the compiler knows: their sums stay in registers. */
#define BY_BLOCKS(rows, block, ...)                                                                                    \
    for (i64 m = 0; m < (rows); m += 4) switch ((rows) - m) {                                                          \
            case 1: block(1, __VA_ARGS__); break;                                                                      \
            case 2: block(2, __VA_ARGS__); break;                                                                      \
            case 3: block(3, __VA_ARGS__); break;                                                                      \
            default: block(4, __VA_ARGS__);                                                                            \
        }

/* The sums of eight vectors. */
INLINE v8 sums8(const v8 *a) {
    v8 b[4], c[2];
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(b[2 * i], b[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

/* Two columns of y (M, N) = x (M, K) W', W (N, K); w is the first of their two rows of W. */
INLINE void dots(int M, const float *x, const float *w, float *y, i64 N, i64 K) {
    v8 sums[8] = {0};
    for (i64 k = 0; k < K; k += 8) {
        v8 w0 = LOAD(w + k), w1 = LOAD(w + K + k);
        for (int m = 0; m < M; m++) {
            sums[2 * m] += w0 * LOAD(x + m * K + k);
            sums[2 * m + 1] += w1 * LOAD(x + m * K + k);
        }
    }
    sums[0] = sums8(sums);
    for (int m = 0; m < M; m++) y[m * N] = sums[0][2 * m], y[m * N + 1] = sums[0][2 * m + 1];
}

INLINE void times_transposed(i64 M, const float *x, const float *W, float *y, i64 N, i64 K) {
    for (i64 n = 0; n < N; n += 2) BY_BLOCKS(M, dots, x + m * K, W + n * K, y + m * N + n, N, K)
}

/* 16 columns of y (M, K) += g (M, N) W, W (N, K), for 8 of the N. */
INLINE void add_rows(int M, const float *g, const float *w, float *y, i64 N, i64 K) {
    v8 sums[8];
    for (int m = 0; m < 2 * M; m++) sums[m] = LOAD(y + m / 2 * K + m % 2 * 8);
    for (int n = 0; n < 8; n++) {
        v8 w0 = LOAD(w + n * K), w1 = LOAD(w + n * K + 8);
        __builtin_prefetch(w + (n + 8) * K);
        for (int m = 0; m < M; m++) sums[2 * m] += g[m * N + n] * w0, sums[2 * m + 1] += g[m * N + n] * w1;
    }
    for (int m = 0; m < 2 * M; m++) STORE(y + m / 2 * K + m % 2 * 8) = sums[m];
}

INLINE void times(i64 M, const float *g, const float *W, float *y, i64 N, i64 K) {
    memset(y, 0, sizeof(float) * M * K);
    for (i64 n = 0; n < N; n += 8)
        for (i64 k = 0; k < K; k += 16) BY_BLOCKS(M, add_rows, g + m * N + n, W + n * K + k, y + m * K + k, N, K)
}

/* hidden = relu(x up'), output = hidden down'. */
EXPORT void experts_forward(SOME_EXPERTS, i64 D, i64 H, const float *up, const float *down, const float *x,
                            float *hidden, float *output) {
    for (i64 i = first; i < last; i++) {
        float *h = hidden + starts[i] * H;
        times_transposed(counts[i], x + starts[i] * D, up + experts[i] * H * D, h, H, D);
        for (i64 j = 0; j < counts[i] * H; j++) h[j] = h[j] > 0 ? h[j] : 0;
        times_transposed(counts[i], h, down + experts[i] * H * D, output + starts[i] * D, D, H);
    }
}

/* From the gradients at the unweighted outputs: weighs them in place by `weights` (R,), and writes the gradients at
   the hidden units, at `weights` and at x. */
EXPORT void experts_backward(SOME_EXPERTS, i64 D, i64 H, const float *up, const float *down, const float *hidden,
                             const float *weights, float *grad, float *grad_hidden, float *grad_weights,
                             float *grad_x) {
    for (i64 i = first; i < last; i++) {
        times(counts[i], grad + starts[i] * D, down + experts[i] * H * D, grad_hidden + starts[i] * H, D, H);
        for (i64 r = starts[i]; r < starts[i] + counts[i]; r++) {
            v8 dot[8] = {0};
            float *gh = grad_hidden + r * H, w = weights[r];
            for (i64 j = 0; j < H; j += 8) dot[0] += LOAD(gh + j) * LOAD(hidden + r * H + j);
            grad_weights[r] = sums8(dot)[0];
            for (i64 j = 0; j < H; j++) gh[j] = hidden[r * H + j] > 0 ? gh[j] * w : 0;
            for (i64 j = 0; j < D; j++) grad[r * D + j] *= w;
        }
        times(counts[i], grad_hidden + starts[i] * H, up + experts[i] * H * D, grad_x + starts[i] * D, H, D);
    }
}

/* wide (R, n) = a (R, n) in doubles, since what cancels in a gradient must cancel in its squares; K (R, R) = a a'. */
INLINE void gram(i64 R, const float *a, i64 n, double *wide, double *K) {
    for (i64 i = 0; i < R * n; i++) wide[i] = a[i];
    for (i64 r = 0; r < R; r++)
        for (i64 q = 0; q <= r; q += 4) {
            d4 sums[4] = {0};
            for (i64 i = 0; i < n; i += 4)
                for (i64 j = 0; j < 4; j++)
                    sums[j] += WIDE(wide + r * n + i) * WIDE(wide + (q + j < r ? q + j : r) * n + i);
            for (int j = 0; j < 4 && q + j <= r; j++)
                K[r * R + q + j] = K[(q + j) * R + r] = (sums[j][0] + sums[j][1]) + (sums[j][2] + sums[j][3]);
        }
}

/* The sum of |left' right|^2 over experts, left (R, M), right (R, N): sum((left left') * (right right')). */
EXPORT double rows_squared_norm(SOME_EXPERTS, i64 rows, i64 M, i64 N, const float *left, const float *right) {
    double total = 0, *K = malloc(sizeof(double) * rows * (2 * rows + M + N)), *L = K + rows * rows;
    for (i64 i = first; i < last; i++) {
        gram(counts[i], left + starts[i] * M, M, L + rows * rows, K);
        gram(counts[i], right + starts[i] * N, N, L + rows * rows, L);
        for (i64 r = 0; r < counts[i] * counts[i]; r++) total += K[r] * L[r];
    }
    free(K);
    return total;
}

/* moment (n,) = decay moment + rest times the sums of the gradient's squares over its other side, whose Gram matrix is
   K (R, R); a (R, n) is this side. Returns the sum of the moments. */
INLINE double add_squares(i64 R, const double *a, i64 n, const double *K, float *moment, double decay, double rest) {
    double sum = 0;
    for (i64 i = 0; i < n; i += 16) {
        d4 squares[4] = {0};
        for (i64 r = 0; r < R; r++) {
            d4 others[4] = {0};
            for (i64 q = 0; q <= r; q++)
                for (int j = 0; j < 4; j++) others[j] += (q < r ? 2 : 1) * K[r * R + q] * WIDE(a + q * n + i + 4 * j);
            for (int j = 0; j < 4; j++) squares[j] += others[j] * WIDE(a + r * n + i + 4 * j);
        }
        for (int j = 0; j < 16; j++) {
            moment[i + j] = decay * moment[i + j] + rest * fmax(squares[j / 4][j % 4], 0);
            sum += moment[i + j];
        }
    }
    return sum;
}

/* scaled (R, n) = a (R, n) lr / (sqrt(moment / scale) + eps). */
INLINE void scale_rows(i64 R, const float *a, i64 n, const float *moment, float scale, float eps, float lr,
                       float *scaled) {
    for (i64 i = 0; i < n; i++) scaled[i] = lr / (sqrtf(moment[i] / scale) + eps);
    for (i64 r = R - 1; r >= 0; r--)
        for (i64 i = 0; i < n; i++) scaled[r * n + i] = scaled[i] * a[r * n + i];
}

/* Four rows and 16 columns of W (M, N) = keep W - left' right. */
INLINE void subtract_tile(i64 R, const float *left, const float *right, float *W, i64 M, i64 N, float keep) {
    v8 sums[8] = {0}; /* of the update first: W is rounded once */
    for (int q = 0; q < 4; q++) __builtin_prefetch(W + (q + 4) * N, 1);
    for (i64 r = 0; r < R; r++) {
        v8 b0 = LOAD(right + r * N), b1 = LOAD(right + r * N + 8);
        for (int q = 0; q < 4; q++) sums[2 * q] += left[r * M + q] * b0, sums[2 * q + 1] += left[r * M + q] * b1;
    }
    for (int q = 0; q < 8; q++) STORE(W + q / 2 * N + q % 2 * 8) = keep * LOAD(W + q / 2 * N + q % 2 * 8) - sums[q];
}

/* The step of FactoredAdam for matrices (E, M, N), row (E, M) and col (E, N); decay and keep (num,) are what is left of
   an expert's moments and weights. The gradient left' right is never formed. */
EXPORT void rows_step(SOME_EXPERTS, i64 rows, i64 M, i64 N, float *weights, const float *left, const float *right,
                      float *row, float *col, const float *decay, const float *keep, double beta2, double correction,
                      double lr, double eps) {
    double *K = malloc(rows * (sizeof(double) * (2 * rows + M + N) + sizeof(float) * (M + N))), *L = K + rows * rows;
    double *wide_left = L + rows * rows, *wide_right = wide_left + rows * M;
    float *a = (float *)(wide_right + rows * N), *b = a + rows * M;
    for (i64 i = first; i < last; i++) {
        const float *l = left + starts[i] * M, *r = right + starts[i] * N;
        float *W = weights + experts[i] * M * N, *R = row + experts[i] * M, *C = col + experts[i] * N;
        gram(counts[i], l, M, wide_left, K);
        gram(counts[i], r, N, wide_right, L);
        double mean = add_squares(counts[i], wide_left, M, L, R, decay[i], (1 - beta2) / N) / M;
        add_squares(counts[i], wide_right, N, K, C, decay[i], (1 - beta2) / M);
        scale_rows(counts[i], l, M, R, mean > 1.17549435e-38 ? mean : 1.17549435e-38, eps, lr, a);
        scale_rows(counts[i], r, N, C, correction, eps, 1, b);
        for (i64 m = 0; m < M; m += 4)
            for (i64 n = 0; n < N; n += 16) subtract_tile(counts[i], a + m, b + n, W + m * N + n, M, N, keep[i]);
    }
    free(K);
}
