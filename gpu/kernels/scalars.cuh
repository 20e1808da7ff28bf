// Names of the scalar types, and 16-bit floats as their bits; NVRTC has no <stdint.h>.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 { u16 bits; };
struct f16 { u16 bits; };

// What a thread reads at once.
template <typename T> struct alignas(16) Piece { T at[16 / sizeof(T)]; };

__device__ inline float as_float(u32 bits) { return __uint_as_float(bits); }

// Exact: every value of a narrower format is one of the wider. NaN stays NaN.
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bf16 x) { return as_float((u32)x.bits << 16); }
__device__ inline float widen(f16 x) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    const u32 sign = (u32)(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 1023u;
    if (exponent == 31u) return as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent) return as_float(sign | exponent + 112u << 23 | fraction << 13);
    const float tiny = (float)fraction * as_float(103u << 23);  // subnormal: fraction 2^-24
    return sign ? -tiny : tiny;
#endif
}

__device__ inline bool is_finite(double x) { return (__double_as_longlong(x) >> 52 & 2047) != 2047; }
