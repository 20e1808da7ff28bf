"""BLAKE3 keyed digests of many messages of one length: eight at a time, one in each lane of a vector.

Source: the BLAKE3 paper, sections 2.1 to 2.5 and 5.3. Control flow is that of its reference hasher, whose 32-bit
words are here vectors of LANES words; the compression function and the transposition around it are LLVM IR.
In memory a chaining value is 8 and a block 16 such vectors. Kernels take addresses: who calls them keeps the arrays.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
DIGEST, BLOCK, CHUNK = 32, 64, 1024  # bytes
VECTOR_BYTES = 4 * LANES
CV = DIGEST * LANES
TALLEST = 55  # chaining values of a message of 2^64 bytes: 54 that wait, and the one at work

CHUNK_START, CHUNK_END, PARENT, ROOT, KEYED_HASH = 1, 2, 4, 8, 16
IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
INTERLEAVINGS = {  # of words, of pairs, of halves; each is one instruction of AVX2
    1: ((0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    2: ((0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    4: ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
}

BYTE, WORD, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(WORD, LANES)
BYTES, VECTORS = BYTE.as_pointer(), VECTOR.as_pointer()

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]
Builder = Any  # llvmlite and Numba are untyped
Value = Any


def _constant(word: int) -> Value:
    return ir.Constant(VECTOR, [word] * LANES)


def _spread(builder: Builder, word: Value) -> Value:
    lane = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), word, WORD(0))
    return builder.shuffle_vector(lane, lane, _constant(0))


def _load(builder: Builder, base: Value, count: int) -> list[Value]:
    return [builder.load(builder.gep(base, [LONG(index)]), align=1) for index in range(count)]


def _store(builder: Builder, vectors: list[Value], base: Value) -> None:
    for index, vector in enumerate(vectors):
        builder.store(vector, builder.gep(base, [LONG(index)]), align=1)


def _rotate(builder: Builder, x: Value, bits: int) -> Value:
    return builder.or_(builder.lshr(x, _constant(bits)), builder.shl(x, _constant(32 - bits)))


def _opaque(builder: Builder, x: Value) -> Value:
    """`x`, as if from nowhere. For AVX2, LLVM rotates by whole bytes with a shuffle; seeing two of them with an
    xor between, it would move the second before the xor and so make three."""
    return builder.call(ir.InlineAsm(ir.FunctionType(VECTOR, [VECTOR]), "", "=x,0"), [x])


def _emit_compression(builder: Builder, avx2: bool) -> None:
    """Section 2.2: void(cv, block, counter, length, flags, next cv)."""
    cv, block, counter, length, flags, target = builder.function.args
    high = builder.lshr(counter, LONG(32))
    last = [builder.trunc(word, WORD) for word in (counter, high, length, flags)]
    v = _load(builder, cv, 8) + [_constant(word) for word in IV] + [_spread(builder, word) for word in last]
    words = _load(builder, block, 16)

    def half_mix(quarters: tuple[tuple[int, ...], ...], inputs: list[Value], first: int, second: int) -> None:
        """Half of G on four quarters, whose steps alternate to hide latency."""
        for (a, b, _, _), word in zip(quarters, inputs, strict=True):
            v[a] = builder.add(builder.add(v[a], word), v[b])
        for a, _, _, d in quarters:
            x = builder.xor(v[d], v[a])
            v[d] = _rotate(builder, _opaque(builder, x) if avx2 else x, first)
        for _, _, c, d in quarters:
            v[c] = builder.add(v[c], v[d])
        for _, b, c, _ in quarters:
            v[b] = _rotate(builder, builder.xor(v[b], v[c]), second)

    for _ in range(7):
        for quarters, inputs in ((COLUMNS, words[:8]), (DIAGONALS, words[8:])):
            half_mix(quarters, inputs[::2], 16, 12)
            half_mix(quarters, inputs[1::2], 8, 7)
        words = [words[at] for at in PERMUTATION]
    _store(builder, [builder.xor(v[i], v[i + 8]) for i in range(8)], target)


def _transposed(builder: Builder, rows: list[Value]) -> list[Value]:
    """The columns of 8 x 8 words."""
    for distance, masks in INTERLEAVINGS.items():
        pairs = [(i, i + distance) for i in range(LANES) if not i & distance]
        for pair in pairs:
            one, other = (rows[i] for i in pair)
            for i, mask in zip(pair, masks, strict=True):
                rows[i] = builder.shuffle_vector(one, other, ir.Constant(VECTOR, mask))
    return [rows[i] for i in (0, 2, 1, 3, 4, 6, 5, 7)]


def _emit_gather(builder: Builder) -> None:
    """The blocks that lie `stride` bytes apart, transposed: void(first, stride, count, ahead, block)."""
    first, stride, count, ahead, block = builder.function.args
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch.p0", fnty=ir.FunctionType(ir.VoidType(), [BYTES, WORD, WORD, WORD])
    )
    halves: list[list[Value]] = [[], []]
    start = builder.bitcast(first, BYTES)
    for lane in range(LANES):
        exists = builder.icmp_signed("<", LONG(lane), count)
        place = builder.gep(start, [builder.mul(builder.select(exists, LONG(lane), LONG(0)), stride)])
        builder.call(prefetch, [builder.gep(place, [ahead]), WORD(0), WORD(3), WORD(1)])
        for half, vector in zip(halves, _load(builder, builder.bitcast(place, VECTORS), 2), strict=True):
            half.append(vector)
    _store(builder, _transposed(builder, halves[0]) + _transposed(builder, halves[1]), block)


def _emit_trim(builder: Builder) -> None:
    """Zero what lies beyond the first bytes of the messages in a block: void(block, length)."""
    block, length = builder.function.args
    words = []
    for at, vector in enumerate(_load(builder, block, 16)):
        left = builder.sub(length, LONG(4 * at))
        left = builder.select(builder.icmp_signed("<", left, LONG(0)), LONG(0), left)
        left = builder.select(builder.icmp_signed(">", left, LONG(4)), LONG(4), left)
        mask = builder.sub(builder.shl(LONG(1), builder.mul(left, LONG(8))), LONG(1))
        words.append(builder.and_(vector, _spread(builder, builder.trunc(mask, WORD))))
    _store(builder, words, block)


def _emit_scatter(builder: Builder) -> None:
    """The chaining values, one lane after the other: void(cv, target)."""
    cv, target = builder.function.args
    _store(builder, _transposed(builder, _load(builder, cv, 8)), target)


def _call(builder: Builder, name: str, emit: Any, args: list[Value], pointers: tuple[int, ...]) -> None:
    """Call the module's function `name`, which `emit` writes at first; the arguments at `pointers` are addresses."""
    args = [builder.inttoptr(arg, VECTORS) if at in pointers else arg for at, arg in enumerate(args)]
    function = builder.module.globals.get(name)
    if function is None:
        signature = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        function = ir.Function(builder.module, signature, name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        function.attributes.alignstack = VECTOR_BYTES  # so that no spilled vector straddles cache lines
        body = ir.IRBuilder(function.append_basic_block())
        emit(body)
        body.ret_void()
    builder.call(function, args)


@intrinsic  # type: ignore[untyped-decorator]
def _compress(_: Any, cv: Any, block: Any, counter: Any, length: Any, flags: Any, target: Any) -> Any:
    def generate(context: Any, builder: Builder, signature: Any, args: list[Value]) -> None:
        features = context.codegen().magic_tuple()[2]
        avx2 = "+avx2" in features and "+avx512vl" not in features
        _call(builder, "blake3_compress", lambda body: _emit_compression(body, avx2), args, (0, 1, 5))

    return types.void(*[types.int64] * 6), generate


@intrinsic  # type: ignore[untyped-decorator]
def _gather(_: Any, first: Any, stride: Any, count: Any, ahead: Any, block: Any) -> Any:
    def generate(context: Any, builder: Builder, signature: Any, args: list[Value]) -> None:
        _call(builder, "blake3_gather", _emit_gather, args, (0, 4))

    return types.void(*[types.int64] * 5), generate


@intrinsic  # type: ignore[untyped-decorator]
def _trim(_: Any, block: Any, length: Any) -> Any:
    def generate(context: Any, builder: Builder, signature: Any, args: list[Value]) -> None:
        _call(builder, "blake3_trim", _emit_trim, args, (0,))

    return types.void(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _scatter(_: Any, cv: Any, target: Any) -> Any:
    def generate(context: Any, builder: Builder, signature: Any, args: list[Value]) -> None:
        _call(builder, "blake3_scatter", _emit_scatter, args, (0, 1))

    return types.void(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _address(_: Any, array: Any) -> Any:
    def generate(context: Any, builder: Builder, signature: Any, args: list[Value]) -> Value:
        return builder.ptrtoint(context.make_array(array)(context, builder, args[0]).data, LONG)

    return types.int64(array), generate


@intrinsic  # type: ignore[untyped-decorator]
def _move(_: Any, source: Any, target: Any, length: Any) -> Any:
    def generate(context: Any, builder: Builder, signature: Any, args: list[Value]) -> None:
        source, target = (builder.inttoptr(arg, BYTES) for arg in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _scratch(_: Any) -> Any:
    """The address of two blocks, the first one zero, and TALLEST chaining values, all on the caller's stack."""

    def generate(context: Any, builder: Builder, signature: Any, args: list[Value]) -> Value:
        area = cgutils.alloca_once(builder, ir.ArrayType(VECTOR, 2 * 16 + 8 * TALLEST))
        cgutils.memset(builder, area, LONG(LANES * BLOCK), 0)
        return builder.ptrtoint(area, LONG)

    return types.int64(), generate


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _digest(data: int, width: int, rows: int, key: int, out: int) -> None:
    """The digests of `rows` messages of `width` bytes that follow each other at `data`, to `out`."""
    spare = _scratch()
    block = spare + LANES * BLOCK
    waiting = block + LANES * BLOCK
    end = data + rows * width
    chunks = max(1, (width + CHUNK - 1) // CHUNK)
    ahead = LANES * width if width < 8 * CHUNK else 4 * BLOCK  # the next messages, or the rest of these
    for row in range(0, rows, LANES):
        lanes = min(LANES, rows - row)
        height = 0
        for chunk in range(chunks):
            # Section 2.4: a chunk's blocks, each from the chaining value of the one before
            final = chunk == chunks - 1
            source, flags, cv = key, KEYED_HASH | CHUNK_START, waiting + height * CV
            place = data + row * width + chunk * CHUNK
            length = min(width - chunk * CHUNK, CHUNK)
            while length > BLOCK:
                _gather(place, width, lanes, ahead, block)
                _compress(source, block, chunk, BLOCK, flags, cv)
                source, flags = cv, KEYED_HASH
                place, length = place + BLOCK, length - BLOCK
            if place + (lanes - 1) * width + BLOCK <= end:
                _gather(place, width, lanes, ahead, block)
                if length < BLOCK:
                    _trim(block, length)
            else:
                for lane in range(lanes):
                    _move(place + lane * width, spare + lane * BLOCK, length)
                _gather(spare, BLOCK, LANES, 0, block)
            _compress(source, block, chunk, length, flags | CHUNK_END | (ROOT if chunks == 1 else 0), cv)
            # Section 2.5: complete subtrees are joined at once, the others when the message ends
            height, whole = height + 1, chunk + 1
            while height > 1 and (final or whole & 1 == 0):
                height, whole = height - 1, whole >> 1
                pair = waiting + (height - 1) * CV
                _compress(key, pair, 0, BLOCK, KEYED_HASH | PARENT | (ROOT if final and height == 1 else 0), pair)
        if lanes == LANES:
            _scatter(waiting, out + row * DIGEST)
        else:
            _scatter(waiting, block)
            _move(block, out + row * DIGEST, lanes * DIGEST)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def digest_rows(data: Bytes, width: int, first: int, last: int, key: Words, out: Bytes) -> None:
    """Digest rows [first, last) of `data`, of `width` bytes each, to the same rows of `out` (rows, 32)."""
    source, target = _address(data) + first * width, _address(out) + first * DIGEST
    _digest(source, width, last - first, _address(key), target)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def digest_levels(nodes: Bytes, size: int, key: Words) -> None:
    """Append to the first `size` nodes of `nodes` (n, 32), which are a level, all levels above it."""
    level = _address(nodes)
    while size > 1:
        above = level + size * DIGEST
        _digest(level, 2 * DIGEST, size // 2, _address(key), above)
        if size & 1:
            _move(above - DIGEST, above + size // 2 * DIGEST, DIGEST)
        level, size = above, (size + 1) // 2


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def climb(size: int, at: Places, nodes: Bytes, siblings: Bytes, pairs: Bytes, key: Words) -> int:
    """Hash the nodes (m, 32) at places `at` (m,) of a level of `size` up to the root, which is left in nodes[0].

    Returns how many siblings (k, 32) that takes, or -1 unless `at` is sorted, unique and inside the level; the root
    is one only if it takes them all and no more. Overwrites `at` and `pairs` (m, 64) too.
    """
    count, used = len(at), 0
    for i in range(count):
        if at[i] < 0 or at[i] >= size or (i > 0 and at[i] <= at[i - 1]):
            return -1
    while size > 1:
        read = hashed = 0
        while read < count and at[read] ^ 1 < size:
            place, node, pair = at[read], _address(nodes) + read * DIGEST, _address(pairs) + hashed * 2 * DIGEST
            at[hashed] = place >> 1
            read, hashed = read + 1, hashed + 1
            if read < count and at[read] == place ^ 1:
                _move(node, pair, 2 * DIGEST)
                read += 1
                continue
            _move(node, pair + (place & 1) * DIGEST, DIGEST)
            if used < len(siblings):
                _move(_address(siblings) + used * DIGEST, pair + (place & 1 ^ 1) * DIGEST, DIGEST)
            used += 1
        _digest(_address(pairs), 2 * DIGEST, hashed, _address(key), _address(nodes))
        if read < count:  # the last node of an odd level
            at[hashed] = at[read] >> 1
            _move(_address(nodes) + read * DIGEST, _address(nodes) + hashed * DIGEST, DIGEST)
            hashed += 1
        count, size = hashed, (size + 1) // 2
    return used


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def siblings_of(size: int, at: Places, found: Places) -> Places:
    """Write the places of the siblings that `climb` takes to `found`, level by level; return how many of each level.

    Overwrites `at`.
    """
    count, used, height = len(at), 0, 0
    taken = np.zeros(64, np.int64)
    while size > 1:
        read = parents = 0
        while read < count:
            place = at[read]
            at[parents] = place >> 1
            read, parents = read + 1, parents + 1
            if read < count and at[read] == place ^ 1:
                read += 1
            elif place ^ 1 < size:
                found[used] = place ^ 1
                used += 1
                taken[height] += 1
        count, size, height = parents, (size + 1) // 2, height + 1
    return taken[:height]
