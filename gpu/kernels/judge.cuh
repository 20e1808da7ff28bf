// What a kernel may clear: a claimed entry that the reference (gpu/rounding.py, compare) accepts, for certain.
//
// An entry y is cleared iff all is finite and |y - z| + evaluation <= (half_ulp(y) + flush + slack) (1 - 2^-20), where
// z is the kernel's value in float64, `slack` the op's radius and `evaluation` bounds how far z and slack may lie from
// the reference's. Anything else is left to the reference, an honest infinity included.

#include "scalars.cuh"

template <typename T> struct Format;  // p significand bits; below 2^e_min the spacing stays; flush as in gpu/rounding.py
template <> struct Format<float> {
    static constexpr int p = 24, e_min = -126;
    static constexpr double flush = 0x1p-126, largest = 0x1.fffffep127;
};
template <> struct Format<bf16> {
    static constexpr int p = 8, e_min = -126;
    static constexpr double flush = 0x1p-126, largest = 0x1.fep127;
};
template <> struct Format<f16> {
    static constexpr int p = 11, e_min = -14;
    static constexpr double flush = 0.0, largest = 65504.0;
};

// Half the spacing of T in the binade of y.
template <typename T> __device__ inline double half_ulp(double y) {
    const i64 exponent = __double_as_longlong(y) >> 52 & 2047, least = Format<T>::e_min + 1023;
    return __longlong_as_double((exponent > least ? exponent : least) - Format<T>::p << 52);
}

// z rounded to the nearest even of T, once, or infinite.
template <typename T> __device__ inline double quantized(double z) {
    const i64 own = __double_as_longlong(z) >> 52 & 2047, least = Format<T>::e_min + 1023;
    const i64 place = (own > least ? own : least) - Format<T>::p + 1;  // of the last bit, as an exponent of float64
    const double value = rint(z * __longlong_as_double(2046 - place << 52)) * __longlong_as_double(place << 52);
    return fabs(value) <= Format<T>::largest ? value : copysign(__longlong_as_double(2047ll << 52), z);
}

// One thread's share of a check: the largest |y - z| relative to its radius, entries judged, and entries not cleared.
struct Tally {
    static constexpr double ROOM = 1.0 - 0x1p-20;

    double worst;
    u64 judged, left;
    __device__ Tally() : worst(0.0), judged(0), left(0) {}

    template <typename T> __device__ void entry(T claimed, double z, double slack, double evaluation) {
        const double y = (double)widen(claimed), radius = half_ulp<T>(y) + Format<T>::flush + slack;
        const double off = fabs(y - z);
        judged++;
        if (is_finite(y) && is_finite(z) && is_finite(radius) && slack >= 0.0 && off + evaluation <= radius * ROOM)
            worst = fmax(worst, off / radius);
        else
            left++;
    }

    // For claims that must be equal bit for bit, zeros of both signs apart.
    __device__ void equal(bool same) {
        judged++;
        left += !same;
    }

    // mark: bits of the largest ratio, entries judged, entries left to the reference.
    __device__ void report(u64* mark) const {
        if (worst > 0.0) atomicMax(mark, (u64)__double_as_longlong(worst));
        if (judged) atomicAdd(mark + 1, judged);
        if (left) atomicAdd(mark + 2, left);
    }
};
