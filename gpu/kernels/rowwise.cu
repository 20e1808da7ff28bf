// Claimed rows against the row-wise op of an input's rows, as gpu/ops/normalisation.py has it, in float64.
//
// Block i: row at[i] of x (rows at hand, width) and row i of y (m, width), both T; a mark as in judge.cuh.
// soften_*: softmax. log_soften_*: its logarithm. normalise_*: (x - mean) / sqrt(var + epsilon), or x / sqrt(mean x^2 +
// epsilon) if `root`, times scale (width) and plus bias (width) where `scaled` and `biased` say so, with the roundings to
// T that kernels make in between. Our sums err by at most width 2^-52 of what the radius counts in 2^-24 and in alpha,
// which is at least width^(1/2): with at most 2^17 elements a row, by less than 2^-14 of the radius. The variance is another matter
// where it vanishes beside the mean's square, or beside its own error: there rows are left, and what is subtracted is rounded up.

#include "judge.cuh"
#include "warp.cuh"

constexpr int THREADS = 128;
constexpr double U = 0x1p-24;

// Of every thread's value, for all of them.
template <typename Join> __device__ inline double over_block(double value, double (&room)[THREADS / 32], Join join) {
    value = over_warp(value, join);
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    value = room[0];
    for (int warp = 1; warp < THREADS / 32; warp++) value = join(value, room[warp]);
    return value;
}

__device__ inline double alpha(i64 terms) { return fmin((double)terms + 2.0, 16.0 + 2.0 * sqrt((double)terms)); }

// A radius before the last rounding, and the claim against it.
template <typename T> __device__ inline void compare(Tally& tally, T claimed, double z, double error) {
    const double slack = (error == error && is_finite(error) ? error : 0.0) + (sizeof(T) == 2 ? U * fabs(z) : 0.0);
    tally.entry(claimed, z, slack, 0x1p-14 * slack + 0x1p-48 * fabs(z));
}

template <typename T> __device__ inline void soften(const T* x, const i64* at, i64 width, const T* y, bool logarithm, u64* mark) {
    __shared__ double room[THREADS / 32];
    const T *row = x + at[blockIdx.x] * width, *claimed = y + (i64)blockIdx.x * width;
    double most = -__longlong_as_double(2047ll << 52), total = 0.0;
    for (i64 j = threadIdx.x; j < width; j += THREADS) most = Most()(most, (double)widen(row[j]));
    most = over_block(most, room, Most());
    for (i64 j = threadIdx.x; j < width; j += THREADS) total += exp((double)widen(row[j]) - most);
    total = over_block(total, room, Add());
    Tally tally;
    const double terms = alpha(width) + 16.0, log_total = log(total);
    for (i64 j = threadIdx.x; j < width; j += THREADS) {
        const double distance = (double)widen(row[j]) - most;
        if (logarithm) {
            const double size = (is_finite(distance) ? fabs(distance) : 0.0) + fabs(log_total);
            compare(tally, claimed[j], distance - log_total, U * (terms + 4.0 * size));
        } else {
            const double z = exp(distance) / total;
            compare(tally, claimed[j], z, z * U * ((z > 0.0 ? 2.0 * fabs(distance) : 0.0) + terms));
        }
    }
    tally.report(mark);
}

struct Moments { double mean, inverse, mean_error, drift; };

template <typename T> __device__ inline Moments moments(const T* row, i64 width, double epsilon, bool root) {
    __shared__ double room[THREADS / 32];
    double sum = 0.0, sizes = 0.0, squares = 0.0, spread = 0.0;
    for (i64 j = threadIdx.x; j < width; j += THREADS) {
        const double value = (double)widen(row[j]);
        sum += value;
        sizes += fabs(value);
        squares = fma(value, value, squares);
    }
    const double count = (double)width, mean = over_block(sum, room, Add()) / count;
    sizes = over_block(sizes, room, Add()) / count;
    squares = over_block(squares, room, Add()) / count;
    if (root) return {0.0, 1.0 / sqrt(squares + epsilon), 0.0, 0.0};
    for (i64 j = threadIdx.x; j < width; j += THREADS) {
        const double off = (double)widen(row[j]) - mean;
        spread = fma(off, off, spread);
    }
    const double total = over_block(spread, room, Add()) / count + epsilon;
    const double error = 3.0 * (alpha(width) + 4.0) * U * squares, ours = count * 0x1p-50 * (total + error);
    const double least = fmax(fmax(total - error + ours, epsilon), 2.2250738585072014e-308);
    const double drift = fmax(sqrt(total / least) - 1.0, 1.0 - sqrt(total / (total + error)));
    const double lost = count * 0x1p-43;  // 2^9 times what the mean loses of the root of `squares`
    const double inverse = lost * lost * squares < total ? 1.0 / sqrt(total) : __longlong_as_double(2047ll << 52);
    return {mean, inverse, (alpha(width) + 2.0) * U * sizes, drift + 4.0 * U};
}

template <typename T>
__device__ inline void normalise(const T* x, const i64* at, i64 width, const T* y, const T* scale, int scaled, const T* bias, int biased, double epsilon, int root, u64* mark) {
    const T *row = x + at[blockIdx.x] * width, *claimed = y + (i64)blockIdx.x * width;
    const Moments of = moments(row, width, epsilon, root);
    const double unit = 1.0 / (double)(1ll << Format<T>::p), tiny = half_ulp<T>(0.0);
    const double relative = U * (alpha(width) / 2.0 + 8.0);
    Tally tally;
    for (i64 j = threadIdx.x; j < width; j += THREADS) {
        const double value = (double)widen(row[j]);
        double z = (value - of.mean) * of.inverse, error = fabs(z) * relative;
        if (!root) {
            const double shift = of.mean_error + 4.0 * U * (fabs(value) + fabs(of.mean));
            error = of.inverse * shift * (1.0 + of.drift) + fabs(z) * (of.drift + 4.0 * U);
        }
        if (scaled) {
            const double by = (double)widen(scale[j]);
            error = fabs(by) * (error + fmax(unit * fabs(z), tiny)) + unit * fabs(z * by);
            z *= by;
        }
        if (biased) {
            const double added = (double)widen(bias[j]);
            error += unit * (fabs(z) + fabs(added));
            z += added;
        }
        compare(tally, claimed[j], z, error);
    }
    tally.report(mark);
}

#define KERNELS(T, SUFFIX)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) soften_##SUFFIX(                                                 \
        const T* x, const i64* at, const i64 width, const T* y, u64* mark) {                                           \
        soften(x, at, width, y, false, mark);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) log_soften_##SUFFIX(                                             \
        const T* x, const i64* at, const i64 width, const T* y, u64* mark) {                                           \
        soften(x, at, width, y, true, mark);                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) normalise_##SUFFIX(                                              \
        const T* x, const i64* at, const i64 width, const T* y, const T* scale, const int scaled, const T* bias,       \
        const int biased, const double epsilon, const int root, u64* mark) {                                           \
        normalise(x, at, width, y, scale, scaled, bias, biased, epsilon, root, mark);                                  \
    }

KERNELS(bf16, bf16)
KERNELS(f16, f16)
KERNELS(float, f32)
