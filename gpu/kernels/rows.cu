// digests[first + (i, j, k) @ places] = BLAKE3 keyed with `key` of `width` bytes at address + (i, j, k) @ strides.
//
// table (segments, 16) int64: address, 3 dims, 3 strides in bytes, width, first, 3 places, first block, rows a block.
// A segment has less than 2^31 rows. key (8) uint32; digests (leaves, 32) uint8. A block of threads takes some rows of
// one segment: first their chunks, flat over threads, then the parents level by level, a lone last one handed up. A row
// of more than ROOM chunks has a block of its own and goes by groups of ROOM chunks, whose values wait on a stack as in
// BLAKE3's incremental hasher. Bit for bit the digests of gpu/hashing.py.

#include "blake3.cuh"

constexpr int THREADS = 128, ROOM = 512, DEEPEST = 40, COLUMNS = 16;

struct Rows {
    const i64* at;
    i64 chunks;
    int aligned;
    __device__ i64 width() const { return at[7]; }
    __device__ i64 offset(u32 row, const i64* steps) const {
        const u32 line = row / (u32)at[3], i = line / (u32)at[2], j = line - i * (u32)at[2], k = row - line * (u32)at[3];
        return i * steps[0] + j * steps[1] + k * steps[2];
    }
    __device__ const u8* bytes(u32 row) const { return (const u8*)at[0] + offset(row, at + 4); }
    __device__ u8* digest(u8* digests, u32 row) const { return digests + 32 * (at[8] + offset(row, at + 9)); }
};

__device__ inline void keep(u32 (&cvs)[8][ROOM], int at, const u32 (&cv)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) cvs[i][at] = cv[i];
}

__device__ inline void write_digest(u8* at, const u32 (&cv)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) ((u32*)at)[i] = cv[i];
}

// The parent of two chaining values, over the left one.
__device__ inline void join(u32 (&left)[8], const u32 (&right)[8], const u32* key, u32 flags) {
    u32 m[16], cv[8];
#pragma unroll
    for (int i = 0; i < 8; i++) m[i] = left[i], m[i + 8] = right[i], cv[i] = key[i];
    compress(cv, m, 0, BLOCK, KEYED_HASH | PARENT | flags);
#pragma unroll
    for (int i = 0; i < 8; i++) left[i] = cv[i];
}

__device__ inline void chunk_value(u32 (&cv)[8], const Rows& rows, u32 row, i64 chunk, const u32* key) {
    const i64 left = rows.width() - CHUNK * chunk;
    const int length = left < CHUNK ? (int)left : CHUNK;
    const u8* at = rows.bytes(row) + CHUNK * chunk;
#pragma unroll
    for (int i = 0; i < 8; i++) cv[i] = key[i];
    for (int done = 0; done < length || !done; done += BLOCK) {
        u32 m[16], flags = KEYED_HASH;
        const int here = length - done < BLOCK ? length - done : BLOCK;
        load_block(m, at + done, here, rows.aligned);
        if (!done) flags |= CHUNK_START;
        if (done + BLOCK >= length) flags |= rows.chunks == 1 ? CHUNK_END | ROOT : CHUNK_END;
        compress(cv, m, (u64)chunk, (u32)here, flags);
    }
}

// Reduces the `count` values of each of `rows` rows to one, where its first was; the last step is the root's if `root`.
__device__ inline void reduce(u32 (&cvs)[8][ROOM], int rows, int count, const u32* key, bool root) {
    for (int left = count; left > 1; left = (left + 1) / 2) {
        const int items = (left + 1) / 2, all = rows * items;
        for (int first = 0; first < all; first += THREADS) {
            const int item = first + threadIdx.x, p = item % items, own = item / items * count;
            u32 cv[8];
            if (item < all) {
                u32 right[8];
                const bool pair = 2 * p + 1 < left;
#pragma unroll
                for (int i = 0; i < 8; i++) cv[i] = cvs[i][own + 2 * p], right[i] = cvs[i][own + 2 * p + pair];
                if (pair) join(cv, right, key, root && left == 2 ? ROOT : 0);
            }
            __syncthreads();
            if (item < all) keep(cvs, own + p, cv);
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) digest_rows(const i64* table, const int segments, const u32* key, u8* digests) {
    __shared__ u32 cvs[8][ROOM], stack[DEEPEST][8];
    int low = 0, high = segments - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table[(i64)middle * COLUMNS + 12] <= blockIdx.x) low = middle;
        else high = middle - 1;
    }
    Rows rows{table + (i64)low * COLUMNS, 1, 16};
    rows.chunks = rows.width() > CHUNK ? (rows.width() + CHUNK - 1) / CHUNK : 1;
    const i64 apart = rows.at[0] | rows.at[4] | rows.at[5] | rows.at[6];
    rows.aligned = apart & 3 ? 1 : apart & 15 ? 4 : 16;
    const u32 total = (u32)(rows.at[1] * rows.at[2] * rows.at[3]), most = (u32)rows.at[13];
    const u32 first = (blockIdx.x - (u32)rows.at[12]) * most;
    const int own = (int)(total - first < most ? total - first : most);

    const bool whole = rows.chunks <= ROOM;
    int depth = 0;
    for (i64 start = 0, groups = 1; start < rows.chunks; start += ROOM, groups++) {
        const int count = (int)(whole ? rows.chunks : min(rows.chunks - start, (i64)ROOM));
        for (int i = threadIdx.x; i < own * count; i += THREADS) {
            u32 cv[8];
            chunk_value(cv, rows, first + i / count, start + i % count, key);
            keep(cvs, i, cv);
        }
        __syncthreads();
        reduce(cvs, own, count, key, whole);
        for (int i = threadIdx.x; i < own; i += THREADS) {
            u32 cv[8];
#pragma unroll
            for (int j = 0; j < 8; j++) cv[j] = cvs[j][i * count];
            const bool last = start + ROOM >= rows.chunks;
            for (i64 merged = groups; depth && (last || !(merged & 1)); merged /= 2) {
                u32 left[8];
                depth--;
#pragma unroll
                for (int j = 0; j < 8; j++) left[j] = stack[depth][j];
                join(left, cv, key, last && !depth ? ROOT : 0);
#pragma unroll
                for (int j = 0; j < 8; j++) cv[j] = left[j];
            }
            if (last) write_digest(rows.digest(digests, first + i), cv);
            else write_digest((u8*)stack[depth++], cv);
        }
        __syncthreads();
    }
}
