// Few rows of a product again in float64, and each claimed entry judged (gpu/freivalds.py, recompute).
//
// multiply_*: for rows x[x_at[rows_from + i]], i < m <= 24, of x (., k) and w (k, n) by element strides, over one of
// `splits` parts of k: the sums z (splits, m, n) float64 and the sums of squared terms, times 2^40, a (splits, m, n)
// float32. Grid (columns / 128, splits); a thread has two columns and 12 rows; tiles of w and x are shared, so that w
// is read once for all rows.
// judge_products_*: adds parts and bias (bias_rows 0, 1 or m, n) up in order, a thread an entry of y (m, n). It may err
// by half an ulp + c max(A, |z|) + r max(|z|, A) + t, A^2 being the sum of squared terms, the bias among them.
//
// Products are exact in float64. No partial sum exceeds sqrt(k + 1) A, so this z and the reference's, of at most k
// roundings each, differ by k sqrt(k + 1) 2^-52 A at most; k^1.5 2^-51 A is allowed for it. float32 finds A within
// (terms of a part + 8) 2^-24 of it, and A^2 no better than 2^-189 a term, where squares are subnormal: A is between
// `sure` and `most`.

#include "judge.cuh"

constexpr int LINES = 128, DEPTH = 16, OWN = 12, MOST = 24;
constexpr float SCALE = 0x1p20f;  // of a term before it is squared: zeros are then told from what float32 cannot square


// tile[d][threadIdx.x] = line[d stride], zero from `count` on (which may be negative).
template <typename T>
__device__ inline void load_line(float (&tile)[DEPTH][LINES], const T* line, i64 stride, i64 count) {
    constexpr int WIDTH = 16 / sizeof(T);
    if (stride == 1 && count >= DEPTH && !((u64)line & 15)) {
#pragma unroll
        for (int d = 0; d < DEPTH; d += WIDTH) {
            const Piece<T> piece = *(const Piece<T>*)(line + d);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) tile[d + e][threadIdx.x] = widen(piece.at[e]);
        }
    } else {
#pragma unroll 8
        for (int d = 0; d < DEPTH; d++) tile[d][threadIdx.x] = d < count ? widen(line[d * stride]) : 0.0f;
    }
}

template <typename T>
__device__ inline void multiply(const T* x, const i64* x_at, i64 rows_from, int m, i64 k, const T* w, i64 stride_k,
                                i64 stride_n, i64 n, double* z, float* a) {
    __shared__ float tile[DEPTH][LINES];
    __shared__ __align__(16) double rows[DEPTH][MOST];
    __shared__ __align__(16) float scaled[DEPTH][MOST];
    const i64 splits = gridDim.y, begin = k * blockIdx.y / splits, end = k * (blockIdx.y + 1) / splits;
    const i64 start = (i64)blockIdx.x * LINES, own = start + threadIdx.x;
    const int column = threadIdx.x % 64, group = threadIdx.x / 64 * OWN;
    double sums[2][OWN] = {};
    float squares[2][OWN] = {};
    for (i64 first = begin; first < end; first += DEPTH) {
        load_line(tile, w + first * stride_k + own * stride_n, stride_k, own < n ? end - first : 0);
        for (int i = threadIdx.x; i < DEPTH * MOST; i += blockDim.x) {
            const int d = i % DEPTH, row = i / DEPTH;
            const float value = row < m && first + d < end ? widen(x[x_at[rows_from + row] * k + first + d]) : 0.0f;
            rows[d][row] = (double)value;
            scaled[d][row] = value * SCALE;
        }
        __syncthreads();
        if (group < m) {
#pragma unroll 2
            for (int d = 0; d < DEPTH; d++) {
                const float left = tile[d][column], right = tile[d][column + 64];
                const double left_wide = (double)left, right_wide = (double)right;
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    const double value = rows[d][group + i];
                    const float one = scaled[d][group + i] * left, other = scaled[d][group + i] * right;
                    sums[0][i] = fma(value, left_wide, sums[0][i]);
                    sums[1][i] = fma(value, right_wide, sums[1][i]);
                    squares[0][i] = fmaf(one, one, squares[0][i]);
                    squares[1][i] = fmaf(other, other, squares[1][i]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const i64 j = start + column + 64 * half;
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (group + i < m && j < n) {
                const i64 at = ((i64)blockIdx.y * m + group + i) * n + j;
                z[at] = sums[half][i];
                a[at] = squares[half][i];
            }
    }
}

struct Room { double c, r, t; };

template <typename T>
__device__ inline void judge(const double* z, const float* a, int splits, int m, i64 k, i64 n, const double* bias,
                             i64 bias_rows, const T* y, Room room, u64* mark) {
    const i64 stride = (i64)gridDim.x * blockDim.x;
    const double blurred = (double)((k + splits - 1) / splits + 8) * 0x1p-24, lost = (double)k * 0x1p-189;
    const double doubt = (double)k * sqrt((double)k) * 0x1p-51;
    Tally tally;
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < m * n; at += stride) {
        const double added = bias_rows ? bias[(bias_rows > 1 ? at / n * n : 0) + at % n] : 0.0;
        double sum = added, squares = 0.0;
        for (int split = 0; split < splits; split++) {
            sum += z[(i64)split * m * n + at];
            squares += (double)a[(i64)split * m * n + at] * 0x1p-40;
        }
        const double size = sqrt(squares + added * added);
        const double sure = sqrt(fmax(squares - lost, 0.0) + added * added) * (1.0 - blurred);
        const double most = sqrt(squares + lost + added * added) * (1.0 + blurred);
        const double slack = (room.c + room.r) * fmax(size, fabs(sum)) + room.t - Format<T>::flush;
        tally.entry(y[at], sum, slack, doubt * most + (room.c + room.r) * (size - sure));
    }
    tally.report(mark);
}

#define KERNELS(T, SUFFIX)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) multiply_##SUFFIX(                                               \
        const T* x, const i64* x_at, const i64 rows_from, const int m, const i64 k, const T* w, const i64 w_first,     \
        const i64 stride_k, const i64 stride_n, const i64 n, double* z, float* a) {                                    \
        multiply<T>(x, x_at, rows_from, m, k, w + w_first, stride_k, stride_n, n, z, a);                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) judge_products_##SUFFIX(                                         \
        const double* z, const float* a, const int splits, const int m, const i64 k, const i64 n, const double* bias,  \
        const i64 bias_rows, const T* y, const double c, const double r, const double t, u64* mark) {                  \
        judge<T>(z, a, splits, m, k, n, bias, bias_rows, y, Room{c, r, t}, mark);                                      \
    }

KERNELS(bf16, bf16)
KERNELS(f16, f16)
KERNELS(float, f32)
