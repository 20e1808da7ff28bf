// One level of many Merkle trees: parent p = BLAKE3 keyed with `key` of children 2p and 2p + 1, a lone last child handed up.
//
// table (trees, 4) int64: first thread, first child, children, first parent, places counted in nodes (total, 32) uint8.
// key (8) uint32; a thread makes one parent of `parents`. Bit for bit the trees of proof/merkle.py.

#include "blake3.cuh"

extern "C" __global__ void __launch_bounds__(128) grow_level(const i64* table, const int trees, const i64 parents, const u32* key, u8* nodes) {
    const i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= parents) return;
    int low = 0, high = trees - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table[4 * (i64)middle] <= thread) low = middle;
        else high = middle - 1;
    }
    const i64* tree = table + 4 * (i64)low;
    const i64 p = thread - tree[0];
    const u32* children = (const u32*)(nodes + 32 * (tree[1] + 2 * p));
    u32* parent = (u32*)(nodes + 32 * (tree[3] + p));
    u32 m[16], cv[8];
    if (2 * p + 1 < tree[2]) {
#pragma unroll
        for (int i = 0; i < 16; i++) m[i] = children[i];
#pragma unroll
        for (int i = 0; i < 8; i++) cv[i] = key[i];
        compress(cv, m, 0, BLOCK, KEYED_HASH | CHUNK_START | CHUNK_END | ROOT);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) cv[i] = children[i];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) parent[i] = cv[i];
}
