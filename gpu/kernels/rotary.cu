// Claimed rows against the pairs of an input's rows turned by an angle, as gpu/ops/rotary.py has it, in float64.
//
// Row i of y (m, width) against row at[i] of x (rows at hand, width), T, both of `heads` heads side by side; cosines and sines
// of its pairs are rows cos_at[i], sin_at[i] of cos and sin (., half). Of each head 2 half elements are turned: pairs are
// neighbours if `interleaved`, else of the two halves; the rest must be the same bits. Half an ulp and `unit` (|c a| + |s b|).

#include "judge.cuh"

template <typename T>
__device__ inline void turn(const T* x, const i64* at, u32 m, u32 width, u32 heads, const T* cos, const i64* cos_at, const T* sin, const i64* sin_at, u32 half, int interleaved, double unit, const T* y, u64* mark) {
    const u32 own = width / heads;
    Tally tally;
    for (u32 e = blockIdx.x * blockDim.x + threadIdx.x; e < m * width; e += gridDim.x * blockDim.x) {
        const u32 i = e / width, j = e - i * width, head = j / own * own, place = j - head;
        const T* row = x + at[i] * width + head;
        const double claimed = (double)widen(y[e]), given = (double)widen(row[place]);
        if (place >= 2 * half) {
            tally.equal(is_finite(claimed) && claimed == given);
            continue;
        }
        const u32 pair = interleaved ? place / 2 : place % half;
        const bool imaginary = interleaved ? place & 1 : place >= half;
        const double c = (double)widen(cos[cos_at[i] * half + pair]), s = (double)widen(sin[sin_at[i] * half + pair]);
        const double first = (double)widen(row[interleaved ? 2 * pair : pair]);
        const double second = (double)widen(row[interleaved ? 2 * pair + 1 : pair + half]);
        const double left = imaginary ? s * first : c * first, right = imaginary ? c * second : s * second;
        const double slack = unit * (fabs(left) + fabs(right));
        tally.entry(y[e], imaginary ? left + right : left - right, slack, 0x1p-24 * slack);
    }
    tally.report(mark);
}

#define KERNEL(T, SUFFIX)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) turn_pairs_##SUFFIX(                                             \
        const T* x, const i64* at, const u32 m, const u32 width, const u32 heads, const T* cos, const i64* cos_at,     \
        const T* sin, const i64* sin_at, const u32 half, const int interleaved, const double unit, const T* y,         \
        u64* mark) {                                                                                                   \
        turn(x, at, m, width, heads, cos, cos_at, sin, sin_at, half, interleaved, unit, y, mark);                      \
    }

KERNEL(bf16, bf16)
KERNEL(f16, f16)
KERNEL(float, f32)
