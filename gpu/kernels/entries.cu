// T3: single entries of a product again in float64, with all that bounds an honest engine's error (kernels/entries.py).
//
// Entry e is y[i, j], flat[e] = i n + j, of x[x_at[i]] (k) and w (k, n) by element strides; bias (bias_rows, n) with
// 0, 1 or m rows. A warp an entry, lanes along k: over the bias and then the terms in order z the sum, A^2 the
// sum of squares, S the sum of magnitudes, P the largest magnitude of a prefix sum. The tolerance is half an ulp +
// (c + g min(1, 2 P / S)) max(A, P) + r max(|z|, A) + t; the reference's is 2^-50 S wider. A sum errs by at most
// k 2^-53 S, here and there, so (k + 2) 2^-51 S is taken off. Only what is left is added to the mark: entries of a fold
// are counted already.

#include "judge.cuh"
#include "warp.cuh"

template <typename T>
__device__ inline void spot(const T* x, const i64* x_at, i64 k, const T* w, i64 stride_k, i64 stride_n, i64 n,
                            const T* y, const double* bias, i64 bias_rows, const i64* flat, i64 count,
                            const double (&units)[4], u64* mark) {
    const i64 e = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (e >= count) return;  // whole warps
    const i64 i = flat[e] / n, j = flat[e] % n;
    const T *left = x + x_at[i] * k, *right = w + j * stride_n;
    const double start = bias_rows ? bias[(bias_rows > 1 ? i * n : 0) + j] : 0.0;
    double carried = start, prefix = fabs(start), squares = 0.0, size = 0.0;
    for (i64 first = 0; first < k; first += 32) {
        const i64 l = first + lane;
        const double term = l < k ? (double)widen(left[l]) * (double)widen(right[l * stride_k]) : 0.0;
        double sum = term;
        for (int by = 1; by < 32; by *= 2) {
            const double before = __shfl_up_sync(~0u, sum, by);
            if (lane >= by) sum += before;
        }
        const double reached = fabs(carried + sum);
        prefix = reached <= prefix ? prefix : reached;
        squares = fma(term, term, squares);
        size += fabs(term);
        carried += __shfl_sync(~0u, sum, 31);
    }
    squares = over_warp(squares, Add()) + start * start;
    size = over_warp(size, Add()) + fabs(start);
    for (int by = 16; by; by /= 2) {
        const double other = __shfl_xor_sync(~0u, prefix, by);
        prefix = other <= prefix ? prefix : other;
    }
    if (lane) return;
    const double a = sqrt(squares), reach = fmax(prefix, fabs(carried));
    const double coherence = size > 0.0 ? fmin(1.0, 2.0 * reach / size) : 0.0;
    const double accumulated = (units[0] + units[1] * coherence) * fmax(a, reach);
    const double slack = accumulated + units[2] * fmax(fabs(carried), a) + units[3];
    Tally tally;
    tally.entry(y[flat[e]], carried, slack - Format<T>::flush, (double)(k + 2) * 0x1p-51 * size);
    if (tally.left) atomicAdd(mark + 2, (u64)1);
    else atomicMax(mark, (u64)__double_as_longlong(tally.worst));
}

#define KERNEL(T, SUFFIX)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) spot_check_##SUFFIX(                                             \
        const T* x, const i64* x_at, const i64 k, const T* w, const i64 w_first, const i64 stride_k,                   \
        const i64 stride_n, const i64 n, const T* y, const double* bias, const i64 bias_rows, const i64* flat,         \
        const i64 count, const double c, const double g, const double r, const double t, u64* mark) {                  \
        const double units[4] = {c, g, r, t};                                                                          \
        spot<T>(x, x_at, k, w + w_first, stride_k, stride_n, n, y, bias, bias_rows, flat, count, units, mark);         \
    }

KERNEL(bf16, bf16)
KERNEL(f16, f16)
KERNEL(float, f32)
