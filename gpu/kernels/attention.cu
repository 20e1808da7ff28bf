// Claimed rows of attention against softmax(scale q K) V, and the radius of any honest kernel (kernels/attention_radius.py,
// numerics-local section 3, F), in float64. Pair p: a query row and the keys it sees, rows first[p] .. first[p] + count[p] - 1 of K
// (., d) and of V (., e), T; d and e at most 256; scratch has `most` places a pair.
//
// score_keys_*: a thread a key: its score, the least and the largest an honest kernel may have. weigh_keys: a block a pair:
// weights, how far they may be off, and totals (pairs, 2). sum_values_*: a block a pair and split of its keys, a thread a column:
// sums of weight v and weight |v|; join_values adds splits up to z and size. move_values_*: sums of off |v - z|. judge_attention_*.
//
// Our scores are within d 2^-52 of sum |q k| of the reference's. A score is rounded to the dtype after it was moved by more than
// that to the side that narrows the radius, so that no rounding can widen it. What is left is below 2^-20 of the radius, beside
// count 2^-50 of sum p |v| for the sums themselves.

#include "judge.cuh"

constexpr int THREADS = 128, WIDEST = 256;

__device__ inline double alone(double z) { return (double)(float)z; }

template <typename T>
__device__ inline void score(const T* q, const i64* q_at, const T* k, const i64* first, const i64* count, i64 most, int d, double scale, double product, double relative, double* exact, double* low, double* high) {
    __shared__ double query[WIDEST];
    const i64 p = blockIdx.y, j = (i64)blockIdx.x * THREADS + threadIdx.x;
    for (int i = threadIdx.x; i < d; i += THREADS) query[i] = (double)widen(q[q_at[p] * d + i]);
    __syncthreads();
    if (j >= count[p]) return;
    const T* key = k + (first[p] + j) * d;
    double sum = 0.0, size = 0.0;
#pragma unroll 4
    for (int i = 0; i < d; i++) {
        const double value = (double)widen(key[i]);
        sum = fma(query[i], value, sum);
        size = fma(fabs(query[i]), fabs(value), size);
    }
    const double at = scale * sum, error = product * fabs(scale) * size + relative * fabs(at);
    const double nudge = (double)(d + 4) * 0x1p-50 * fabs(scale) * size, least = at - error, largest = at + error;
    exact[p * most + j] = at;
    low[p * most + j] = fmin(least, fmin(alone(least + nudge), quantized<T>(least + nudge)));
    high[p * most + j] = fmax(largest, fmax(alone(largest - nudge), quantized<T>(largest - nudge)));
}

template <typename Join> __device__ inline double over_block(double value, double (&room)[THREADS / 32], Join join) {
    for (int by = 16; by; by /= 2) value = join(value, __shfl_xor_sync(~0u, value, by));
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    value = room[0];
    for (int warp = 1; warp < THREADS / 32; warp++) value = join(value, room[warp]);
    return value;
}

struct Add { __device__ double operator()(double a, double b) const { return a + b; } };
struct Most { __device__ double operator()(double a, double b) const { return a < b ? b : a; } };

// exact becomes the weights, high how far they may be off.
extern "C" __global__ void __launch_bounds__(128) weigh_keys(
    double* exact, const double* low, double* high, const i64* count, const i64 most, const double exponent,
    const double exponential, double* totals) {
    __shared__ double room[THREADS / 32];
    const i64 p = blockIdx.x, keys = count[p];
    double *weights = exact + p * most, *off = high + p * most;
    const double* leasts = low + p * most;
    double top = -__longlong_as_double(2047ll << 52), total = 0.0, total_least = 0.0;
    for (i64 j = threadIdx.x; j < keys; j += THREADS) top = Most()(top, weights[j]);
    top = over_block(top, room, Most());
    for (i64 j = threadIdx.x; j < keys; j += THREADS) {
        const double below = weights[j] - top, spread = exponent * below, weight = exp(below);
        const double least = exp(leasts[j] - top + spread) * (1.0 - exponential);
        const double largest = exp(off[j] - top - spread) * (1.0 + exponential);
        total += weight;
        total_least += least;
        weights[j] = weight;
        off[j] = fmax(largest - weight, weight - least);
    }
    total = over_block(total, room, Add());
    total_least = over_block(total_least, room, Add());
    if (!threadIdx.x) totals[2 * p] = total, totals[2 * p + 1] = total_least;
}

// parts (pairs, splits, 2, e)
template <typename T>
__device__ inline void sum_values(const T* v, const i64* first, const i64* count, i64 most, int e, const double* weights, double* parts) {
    const i64 p = blockIdx.y, splits = gridDim.x;
    const i64 begin = count[p] * blockIdx.x / splits, end = count[p] * (blockIdx.x + 1) / splits;
    for (int i = threadIdx.x; i < e; i += THREADS) {
        double sum = 0.0, size = 0.0;
#pragma unroll 4
        for (i64 j = begin; j < end; j++) {
            const double weight = weights[p * most + j], value = (double)widen(v[(first[p] + j) * e + i]);
            sum = fma(weight, value, sum);
            size = fma(weight, fabs(value), size);
        }
        parts[((p * splits + blockIdx.x) * 2) * e + i] = sum;
        parts[((p * splits + blockIdx.x) * 2 + 1) * e + i] = size;
    }
}

// z (pairs, 2, e): the row, and sum p |v|
extern "C" __global__ void __launch_bounds__(128) join_values(
    const double* parts, const int splits, const int e, const double* totals, double* z) {
    const i64 p = blockIdx.x;
    for (int i = threadIdx.x; i < 2 * e; i += THREADS) {
        double sum = 0.0;
        for (int split = 0; split < splits; split++) sum += parts[(p * splits + split) * 2 * e + i];
        z[p * 2 * e + i] = sum / totals[2 * p];
    }
}

// parts (pairs, splits, e)
template <typename T>
__device__ inline void move_values(const T* v, const i64* first, const i64* count, i64 most, int e, const double* off, const double* z, double* parts) {
    const i64 p = blockIdx.y, splits = gridDim.x;
    const i64 begin = count[p] * blockIdx.x / splits, end = count[p] * (blockIdx.x + 1) / splits;
    for (int i = threadIdx.x; i < e; i += THREADS) {
        const double own = z[p * 2 * e + i];
        double away = 0.0;
#pragma unroll 4
        for (i64 j = begin; j < end; j++)
            away = fma(off[p * most + j], fabs((double)widen(v[(first[p] + j) * e + i]) - own), away);
        parts[(p * splits + blockIdx.x) * e + i] = away;
    }
}

// y (rows, e), of which pair p claims row y_at[p]
template <typename T>
__device__ inline void judge_attention(const double* parts, int splits, int e, const double* totals, const double* z, const double* sums, const i64* count, const T* y, const i64* y_at, u64* mark) {
    const i64 p = blockIdx.x;
    Tally tally;
    for (int i = threadIdx.x; i < e; i += THREADS) {
        double away = 0.0;
        for (int split = 0; split < splits; split++) away += parts[(p * splits + split) * e + i];
        const double size = z[(p * 2 + 1) * e + i], slack = away / totals[2 * p + 1] + sums[p] * size;
        tally.entry(y[y_at[p] * e + i], z[p * 2 * e + i], slack, (double)count[p] * 0x1p-50 * size + 0x1p-20 * slack);
    }
    tally.report(mark);
}

#define KERNELS(T, SUFFIX)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) score_keys_##SUFFIX(                                             \
        const T* q, const i64* q_at, const T* k, const i64* first, const i64* count, const i64 most, const int d,      \
        const double scale, const double product, const double relative, double* exact, double* low, double* high) {   \
        score(q, q_at, k, first, count, most, d, scale, product, relative, exact, low, high);                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) sum_values_##SUFFIX(                                             \
        const T* v, const i64* first, const i64* count, const i64 most, const int e, const double* weights,            \
        double* parts) {                                                                                               \
        sum_values(v, first, count, most, e, weights, parts);                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) move_values_##SUFFIX(                                            \
        const T* v, const i64* first, const i64* count, const i64 most, const int e, const double* off,                \
        const double* z, double* parts) {                                                                              \
        move_values(v, first, count, most, e, off, z, parts);                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) judge_attention_##SUFFIX(                                        \
        const double* parts, const int splits, const int e, const double* totals, const double* z,                     \
        const double* sums, const i64* count, const T* y, const i64* y_at, u64* mark) {                                \
        judge_attention(parts, splits, e, totals, z, sums, count, y, y_at, mark);                                      \
    }

KERNELS(bf16, bf16)
KERNELS(f16, f16)
KERNELS(float, f32)
