// Claimed rows against a pointwise op of the rows beside them, as gpu/ops/pointwise.py has it, in float64.
//
// Row i of y (m, width) against row at[i] of a, and of b, (rows at hand, width), all T; rows of one element if `single`; at most 2^31 entries.
// add_*, subtract_*, multiply_elements_*, divide_*: one IEEE operation, whose bits are determined: the claim is the value
// of T that is nearest, or 0 where an engine may flush. swish_*: x sigmoid(factor x), and
// gelu_*, by erf, or by tanh if `factor` is not 0, may err by `units` 2^-24 |x|; sigmoid_* by `units` 2^-24 (1 + |z|).
// cast_S_to_T: x itself, of the format S, rounded once or through float32.

#include "judge.cuh"

constexpr double U = 0x1p-24;

struct Sum { __device__ double operator()(double a, double b) const { return a + b; } };
struct Difference { __device__ double operator()(double a, double b) const { return a - b; } };
struct Product { __device__ double operator()(double a, double b) const { return a * b; } };
struct Quotient { __device__ double operator()(double a, double b) const { return a / b; } };

__device__ inline double sigmoid(double x) {
    const double decay = exp(-fabs(x));
    return (x < 0.0 ? decay : 1.0) / (1.0 + decay);
}

// Each gives z, and in `beside` what the radius is relative to.
struct Swish {
    __device__ double operator()(double x, double factor, double& beside) const {
        beside = fabs(x);
        return x * sigmoid(factor * x);
    }
};
struct Sigmoid {
    __device__ double operator()(double x, double, double& beside) const {
        const double z = sigmoid(x);
        beside = 1.0 + z;
        return z;
    }
};
struct Gelu {
    __device__ double operator()(double x, double tanh_form, double& beside) const {
        beside = fabs(x);
        if (tanh_form == 0.0) return 0.5 * x * (1.0 + erf(x / sqrt(2.0)));
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))));
    }
};

struct Same {
    __device__ double operator()(double x, double, double& beside) const {
        beside = 0.0;
        return x;
    }
};

// z, which has the bits of the reference's, rounded to T as it rounds them: a bfloat16 passes through float32.
template <typename T> __device__ inline double rounded(double z) {
    return sizeof(T) == 4 ? (double)(float)z : quantized<T>(Format<T>::p == 8 ? (double)(float)z : z);
}

template <typename T> __device__ inline void nearest(Tally& tally, T claimed, double z) {
    const double y = (double)widen(claimed);
    tally.equal(is_finite(y) && is_finite(z) && (y == rounded<T>(z) || (y == 0.0 && fabs(z) < Format<T>::flush)));
}

template <typename T, typename Op>
__device__ inline void combine(const T* a, const i64* a_at, int a_single, const T* b, const i64* b_at, int b_single, u32 m, u32 width, const T* y, u64* mark) {
    Tally tally;
    const u32 step = gridDim.x * blockDim.x;
    for (u32 e = blockIdx.x * blockDim.x + threadIdx.x; e < m * width; e += step) {
        const u32 i = e / width, j = e - i * width;
        const T left = a[a_single ? a_at[i] : a_at[i] * width + j], right = b[b_single ? b_at[i] : b_at[i] * width + j];
        nearest(tally, y[e], Op()((double)widen(left), (double)widen(right)));
    }
    tally.report(mark);
}

template <typename S, typename T, typename Op>
__device__ inline void apply(const S* x, const i64* at, u32 m, u32 width, double factor, double units, const T* y, u64* mark) {
    Tally tally;
    const u32 step = gridDim.x * blockDim.x;
    for (u32 e = blockIdx.x * blockDim.x + threadIdx.x; e < m * width; e += step) {
        const u32 i = e / width, j = e - i * width;
        double beside;
        const double z = Op()((double)widen(x[at[i] * width + j]), factor, beside);
        const double slack = units * U * beside + (sizeof(T) == 2 ? U * fabs(z) : 0.0);
        tally.entry(y[e], z, slack, 0x1p-48 * beside);
    }
    tally.report(mark);
}

#define COMBINE(NAME, OP, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(128) NAME(                                                            \
        const T* a, const i64* a_at, const int a_single, const T* b, const i64* b_at, const int b_single,              \
        const u32 m, const u32 width, const T* y, u64* mark) {                                                         \
        combine<T, OP>(a, a_at, a_single, b, b_at, b_single, m, width, y, mark);                                       \
    }
#define APPLY(NAME, OP, S, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) NAME(                                                            \
        const S* x, const i64* at, const u32 m, const u32 width, const double factor, const double units,              \
        const T* y, u64* mark) {                                                                                       \
        apply<S, T, OP>(x, at, m, width, factor, units, y, mark);                                                      \
    }
#define KERNELS(T, SUFFIX)                                                                                             \
    COMBINE(add_##SUFFIX, Sum, T)                                                                                      \
    COMBINE(subtract_##SUFFIX, Difference, T)                                                                          \
    COMBINE(multiply_elements_##SUFFIX, Product, T)                                                                    \
    COMBINE(divide_##SUFFIX, Quotient, T)                                                                              \
    APPLY(swish_##SUFFIX, Swish, T, T)                                                                                 \
    APPLY(sigmoid_##SUFFIX, Sigmoid, T, T)                                                                             \
    APPLY(gelu_##SUFFIX, Gelu, T, T)

KERNELS(bf16, bf16)
KERNELS(f16, f16)
KERNELS(float, f32)
APPLY(cast_bf16_to_f16, Same, bf16, f16)
APPLY(cast_bf16_to_f32, Same, bf16, float)
APPLY(cast_f16_to_bf16, Same, f16, bf16)
APPLY(cast_f16_to_f32, Same, f16, float)
APPLY(cast_f32_to_bf16, Same, float, bf16)
APPLY(cast_f32_to_f16, Same, float, f16)
