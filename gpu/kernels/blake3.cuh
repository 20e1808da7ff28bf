// BLAKE3 (the paper, sections 2.1 to 2.5): keyed compression in registers, one thread a message block.

#include "scalars.cuh"

enum Flags : u32 { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8, KEYED_HASH = 16 };
enum Bytes : int { BLOCK = 64, CHUNK = 1024 };

#ifdef __CUDA_ARCH__
template <int BITS> __device__ inline u32 rotated(u32 x) {
    if (BITS == 16) return __byte_perm(x, x, 0x1032);
    if (BITS == 8) return __byte_perm(x, x, 0x0321);
    return __funnelshift_r(x, x, BITS);
}
#else
template <int BITS> inline u32 rotated(u32 x) { return x >> BITS | x << (32 - BITS); }
#endif

// a + x as a multiplication by 1, which no compiler can see through: a pipe of its own takes it, while all else here
// queues for the other one.
__device__ inline u32 added(u32 a, u32 x) { return a * blockDim.y + x; }

// Which word of the block is the i-th of a round.
__device__ constexpr int scheduled(int round, int i) {
    const int permutation[16] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};
    for (int r = 0; r < round; r++) i = permutation[i];
    return i;
}

__device__ inline void mix(u32& a, u32& b, u32& c, u32& d, u32 x, u32 y) {
    a = added(a, x) + b;
    d = rotated<16>(d ^ a);
    c = c + d;
    b = rotated<12>(b ^ c);
    a = added(a, y) + b;
    d = rotated<8>(d ^ a);
    c = c + d;
    b = rotated<7>(b ^ c);
}

template <int R> __device__ inline void mixed(u32 (&v)[16], const u32 (&m)[16]) {
    mix(v[0], v[4], v[8], v[12], m[scheduled(R, 0)], m[scheduled(R, 1)]);
    mix(v[1], v[5], v[9], v[13], m[scheduled(R, 2)], m[scheduled(R, 3)]);
    mix(v[2], v[6], v[10], v[14], m[scheduled(R, 4)], m[scheduled(R, 5)]);
    mix(v[3], v[7], v[11], v[15], m[scheduled(R, 6)], m[scheduled(R, 7)]);
    mix(v[0], v[5], v[10], v[15], m[scheduled(R, 8)], m[scheduled(R, 9)]);
    mix(v[1], v[6], v[11], v[12], m[scheduled(R, 10)], m[scheduled(R, 11)]);
    mix(v[2], v[7], v[8], v[13], m[scheduled(R, 12)], m[scheduled(R, 13)]);
    mix(v[3], v[4], v[9], v[14], m[scheduled(R, 14)], m[scheduled(R, 15)]);
    if constexpr (R < 6) mixed<R + 1>(v, m);
}

// All 16 words of the state after the rounds, before the feed-forward.
__device__ inline void stirred(u32 (&v)[16], const u32 (&cv)[8], const u32 (&m)[16], u64 counter, u32 length, u32 flags) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = cv[i];
    v[8] = 0x6A09E667u;
    v[9] = 0xBB67AE85u;
    v[10] = 0x3C6EF372u;
    v[11] = 0xA54FF53Au;
    v[12] = (u32)counter;
    v[13] = (u32)(counter >> 32);
    v[14] = length;
    v[15] = flags;
    mixed<0>(v, m);
}

// cv = the chaining value after this block.
__device__ inline void compress(u32 (&cv)[8], const u32 (&m)[16], u64 counter, u32 length, u32 flags) {
    u32 v[16];
    stirred(v, cv, m, counter, length, flags);
#pragma unroll
    for (int i = 0; i < 8; i++) cv[i] = v[i] ^ v[i + 8];
}

// m = up to 64 bytes from `at`, zeros after `length`; `aligned` bytes divide the address.
__device__ inline void load_block(u32 (&m)[16], const u8* at, int length, int aligned) {
    if (length == BLOCK && aligned >= 16) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 words = __ldg((const uint4*)at + i);
            m[4 * i] = words.x, m[4 * i + 1] = words.y, m[4 * i + 2] = words.z, m[4 * i + 3] = words.w;
        }
    } else {
        const int words = aligned >= 4 ? length / 4 : 0;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            m[i] = 0;
            if (i < words) m[i] = __ldg((const u32*)at + i);
            else
                for (int j = 0; j < 4; j++)
                    if (4 * i + j < length) m[i] |= (u32)__ldg(at + 4 * i + j) << 8 * j;
        }
    }
}
