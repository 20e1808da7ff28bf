"""What a device's kernels reach, each beside its alternative in the same run: `make bench-device`, within 8 minutes.

Without a device the same sections run on the CPU's own forms at smaller sizes: every row says what it compares. Times
are medians of wall-clock seconds, the device waited for before and after.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from bench.provenance import provenance
from gpu import draws, forest, freivalds, hashing
from gpu.clearing import folds, products
from gpu.clearing.operands import Operands
from gpu.clearing.stand import Shelf, Stand
from gpu.device import CHOICES, Device, Memory, select
from gpu.freivalds import Product
from gpu.ops.registry import REGISTRY
from gpu.resident import Resident
from proof.policy import policy
from proof.sampling import Draw
from tests.gpu.clearing import call_of
from tests.gpu.nodes import Case, assembled, claims

RESULTS = Path(__file__).parent / "results"
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
PACKAGES = ("numpy", "numba", "torch", "transformers", "onnx", "ml_dtypes")
LLAMA = {  # Llama-3-8B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
SMALL = (
    LLAMA
    | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"vocab_size": 97}
)
WEIGHTS = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
STEP_WIDTHS = 32 * ([8192] * 8 + [2048] * 4 + [28672] * 4)  # bytes of a row of each tensor that a step adds

Row = dict[str, Any]
Rows = list[Row]
RNG = np.random.default_rng(0)
out = Console()


class Bench:
    """Where and how long to measure."""

    def __init__(self, device: Device | None, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.rounds = 1 if quick else 10 if device else 3

    def wait(self) -> None:
        if self.device:
            self.device.numpy(self.device.zeros(1, np.uint8))

    def timed(self, work: Callable[[], Any], rounds: int | None = None) -> float:
        work()
        found = []
        for _ in range(rounds or self.rounds):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - started)
        return median(found)

    def size(self, on_device: int, on_cpu: int, quick: int) -> int:
        return quick if self.quick else on_device if self.device else on_cpu

    def copy(self, nbytes: int) -> float:
        """Seconds to copy so many bytes where the work is."""
        if self.device is None:
            source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
            return self.timed(lambda: np.copyto(target, source))
        source, target = self.device.zeros(nbytes, np.uint8), self.device.empty(nbytes, np.uint8)

        def copy() -> None:
            target[...] = source

        return self.timed(copy)


def sound(device: Device, mark: Memory, entries: int, what: str) -> None:
    """What is timed must have judged every entry, and left none of an honest run to the reference."""
    _, judged, left = device.numpy(mark).tolist()
    if left or judged != entries:
        raise RuntimeError(f"{what}: {judged} of {entries} entries judged, {left} left")


def row(what: str, seconds: float, beside: str, other: float, **more: Any) -> Row:
    return {"what": what, "seconds": seconds, "beside": beside, "other_seconds": other, "ratio": other / seconds} | more


def random(*shape: int, dtype: np.dtype = BF16) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32).astype(dtype)


def digests(bench: Bench) -> Rows:
    """Row digests, and trees above them, against a copy of as many bytes."""
    rows, width = bench.size(4096, 1024, 16), bench.size(28672, 28672, 2048)
    heads = bench.size(131072, 8192, 64)
    step = STEP_WIDTHS[: bench.size(len(STEP_WIDTHS), len(STEP_WIDTHS), 16)]
    forms = {
        f"a tensor of {rows} rows of {width} bytes": [(rows, width)],
        f"a step's {len(step)} tensors of one row": [(1, width) for width in step],
        f"{heads} rows of a head": [(heads, 256)],
    }
    found = []
    for what, shapes in forms.items():
        arrays = [RNG.integers(0, 256, shape, np.uint8) for shape in shapes]
        size = sum(array.nbytes for array in arrays)
        if bench.device:
            residents = [Resident.of(bench.device, array) for array in arrays]
            leaves = bench.device.empty((sum(r.rows for r in residents), 32), np.uint8)
            starts = np.cumsum([0] + [r.rows for r in residents]).tolist()
            pairs = [(r.segments[0], start) for r, start in zip(residents, starts, strict=False)]
            seconds = bench.timed(lambda p=pairs, to=leaves: forest.digest(bench.device, p, to))
            trees = bench.timed(lambda held=residents: forest.plant(held))
        else:
            seconds = bench.timed(lambda held=arrays: [hashing.row_digests(array) for array in held])
            trees = bench.timed(lambda held=arrays: [hashing.tensor_levels(array) for array in held])
        copy = bench.copy(size)
        rate = {"GB/s": size / seconds / 1e9, "copy GB/s": size / copy / 1e9, "with trees": trees}
        found.append(row(what, seconds, "a copy", copy, **rate))
    return found


def operands(device: Device, x: np.ndarray, w: np.ndarray, y: np.ndarray) -> Operands:
    return Operands(
        x=device.array(x),
        x_at=device.array(np.arange(len(x))),
        w=device.array(w),
        w_first=0,
        w_strides=(w.shape[1], 1),
        y=device.array(y),
        bias=device.zeros((1, w.shape[1]), np.float64),
        bias_rows=0,
        k=len(w),
        dtype=y.dtype,
    )


def multiply(bench: Bench, x: np.ndarray, w: np.ndarray) -> tuple[Callable[[], Any], str]:
    """The product by the library that runs it where the work is."""
    if bench.device is None:
        left, right = x.astype(np.float32), w.astype(np.float32)
        return lambda: left @ right, "the product by BLAS in float32"
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    kind = torch.bfloat16 if x.dtype == BF16 else torch.float32
    a, b = (torch.from_numpy(m.astype(np.float32)).to(bench.device.place, kind) for m in (x, w))
    return lambda: torch.matmul(a, b), "the product by cuBLAS"


def t1(bench: Bench) -> Rows:
    """T1 of every row against the product itself, and its passes against a copy of what each reads."""
    found, rules = [], policy("full")
    for n in [bench.size(4096, 1024, 128), bench.size(8192, 2048, 160)]:
        for dtype in (BF16, F32):
            x, w = random(n, n, dtype=dtype), random(n, n, dtype=dtype)
            y = (x.astype(np.float32) @ w.astype(np.float32)).astype(dtype)
            work, beside = multiply(bench, x, w)
            product = bench.timed(work)
            draw = Draw(bytes(32), "bench")
            if bench.device is None:
                claim = Product(x, w, y)
                seconds = bench.timed(lambda c=claim, d=draw: freivalds.check_rows(c, rules, d, len(c.y)))
                found.append(row(f"T1, {n} x {n}, {dtype}", seconds, beside, product))
                continue
            given, mark = operands(bench.device, x, w, y), bench.device.zeros(3, np.uint64)
            found.append(passes(bench, given, draw, mark) | row(f"T1, {n} x {n}, {dtype}", 1.0, beside, product))
            found[-1]["seconds"] = found[-1]["all"]
            found[-1]["ratio"] = product / found[-1]["all"]
    return found


def passes(bench: Bench, given: Operands, draw: Draw, mark: Memory) -> Row:
    """Seconds of the whole of T1 and of its passes over a square matrix, one block of columns for W R and Y R."""
    device, n = bench.device, given.shape[2]
    assert device
    width = min(n, freivalds.WIDEST_FOLD)
    quantile = freivalds.quantile_of(folds.S, 40, given.shape[0])

    def whole() -> None:
        for start in range(0, n, width):
            normals = draws.normals(device, draw, f"normals/{start}", (folds.S, min(width, n - start)))
            folds.clear_rows(given, device, mark, normals, quantile, start)

    whole()
    sound(device, mark, given.shape[0] * n, "T1")
    normals = draws.normals(device, draw, "normals", (folds.S, width))
    vectors = folds.weigh(given, device, mark, normals, 0)
    factor = folds.fold_w(given, device, vectors, 0)
    block = n * width * given.dtype.itemsize
    parts = {
        "W R": (bench.timed(lambda: folds.fold_w(given, device, vectors, 0)), block),
        "X U": (bench.timed(lambda: folds.fold_x(given, device, factor)), n * n * given.dtype.itemsize),
        "Y R": (bench.timed(lambda: folds.fold_y(given, device, vectors, 0)), block),
    }
    copied = {size: bench.copy(size) for size in {size for _, size in parts.values()}}
    shares = {f"{name}, of copy bandwidth": copied[size] / 2 / seconds for name, (seconds, size) in parts.items()}
    return {"all": bench.timed(whole)} | {name: seconds for name, (seconds, _) in parts.items()} | shares


def weights(bench: Bench) -> Rows:
    """W R of every weight of a Llama-3-8B layer, 32 times, against reading them."""
    total, size, found = 0.0, 0, []
    layer = WEIGHTS if bench.device and not bench.quick else [(bench.size(4096, 1024, 96), bench.size(1024, 1024, 64))]
    for k, n in layer:
        w = random(k, n)
        size += w.nbytes
        if bench.device is None:
            normals = RNG.standard_normal((8, n)).astype(np.float32)
            total += bench.timed(lambda m=w, r=normals: freivalds.prepare(m, r))
            continue
        device, mark = bench.device, bench.device.zeros(3, np.uint64)
        given = operands(device, random(1, k), w, random(1, n))

        total += bench.timed(lambda g=given, d=device, m=mark: _folded(d, g, m))
    copy = bench.copy(size)
    model = {"all 32 layers": 32 * total} if layer is WEIGHTS else {}
    found.append(row(f"W R of {size / 1e6:.0f} MB of weights", total, "a copy", copy, **model))
    return found


def _folded(device: Device, given: Operands, mark: Memory) -> None:
    for first in range(0, given.shape[2], freivalds.WIDEST_FOLD):
        width = min(freivalds.WIDEST_FOLD, given.shape[2] - first)
        normals = draws.normals(device, Draw(bytes(32), "w"), str(first), (folds.S, width))
        folds.fold_w(given, device, folds.weigh(given, device, mark, normals, first), first)


def recomputed(bench: Bench) -> Rows:
    """17 rows of a product again, entry by entry, against copying its weights."""
    found = []
    for k, n in [(4096, 4096), (4096, 14336)] if bench.device and not bench.quick else [(bench.size(0, 2048, 96), 256)]:
        x, w = random(17, k), random(k, n)
        y = (x.astype(np.float32) @ w.astype(np.float32)).astype(BF16)
        if bench.device:
            given, mark = operands(bench.device, x, w, y), bench.device.zeros(3, np.uint64)
            products.recompute(given, bench.device, mark)
            sound(bench.device, mark, y.size, "recomputed rows")
            seconds = bench.timed(lambda g=given, m=mark: products.recompute(g, bench.device, m))
        else:
            claim = Product(x, w, y)
            seconds = bench.timed(lambda c=claim: freivalds.recompute(c))
        found.append(row(f"17 rows of {k} x {n} again", seconds, "a copy of the weights", bench.copy(w.nbytes)))
    return found


def judged(bench: Bench, what: str, run: Any, rows: np.ndarray, size: int) -> Row:
    """An op's check of some rows, the claims' way to the device included, against copying what it reads."""
    op = REGISTRY[run.site.node.domain, run.site.node.op]
    call = call_of(op, run, (rows,), claims(run, (rows,)))
    if bench.device is None:
        return row(what, bench.timed(lambda: op.check(call)), "a copy of what it reads", bench.copy(size))
    stand = Stand(Shelf(bench.device, 1e12), 1)
    mark = bench.device.zeros(3, np.uint64)
    assert op.clear is not None
    if not op.clear(call, stand, mark):
        raise RuntimeError(f"{what}: the device has no kernel")
    sound(bench.device, mark, call.claimed[0].size, what)
    seconds = bench.timed(lambda: op.clear(call, stand, mark))
    return row(what, seconds, "a copy of what it reads", bench.copy(size))


def attention(bench: Bench) -> Rows:
    """The last row of 32 query heads of width 128 on 8 key-value heads."""
    found, heads, groups = [], bench.size(32, 4, 4), bench.size(8, 1, 1)
    for keys in [bench.size(4096, 1024, 1024), bench.size(32768, 4096, 2048)]:
        q, k, v = random(1, heads, keys, 128), random(1, groups, keys, 128), random(1, groups, keys, 128)
        run = assembled(Case("Attention", [q, k, v], {"is_causal": 1}, opset=24), [np.zeros_like(q)])
        honest = _attended(q, k, v)
        run.outputs[0][:, :, -1] = honest
        rows = np.arange(heads) * keys + keys - 1
        found.append(judged(bench, f"attention, {heads} rows over {keys} keys", run, rows, k.nbytes + v.nbytes))
    return found


def _attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    times = q.shape[1] // k.shape[1]
    made = []
    for head in range(q.shape[1]):
        keys, values = k[0, head // times].astype(np.float32), v[0, head // times].astype(np.float32)
        scores = keys @ q[0, head, -1].astype(np.float32) / np.float32(128**0.5)
        chances = np.exp(scores - scores.max())
        made.append(chances / chances.sum() @ values)
    return np.stack(made)[None].astype(q.dtype)


def rowwise(bench: Bench) -> Rows:
    """Softmax, a norm and an activation over whole tensors."""
    rows, width = bench.size(4096, 512, 16), bench.size(4096, 4096, 256)
    x = random(rows, width)
    wide, scale = x.astype(np.float32), random(width)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    root = (wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(1e-5))).astype(BF16)
    cases = {
        "Softmax": (Case("Softmax", [x], opset=13), powers / powers.sum(-1, keepdims=True)),
        "RMSNormalization": (
            Case("RMSNormalization", [x, scale], opset=23, constant=(1,)),
            root.astype(np.float32) * scale.astype(np.float32),
        ),
        "Swish": (Case("Swish", [x], opset=24), wide / (1 + np.exp(-wide))),
        "Mul": (Case("Mul", [x, x], opset=14), wide * wide),
    }
    what = f"{rows} rows of {width}"
    return [
        judged(bench, f"{name}, {what}", assembled(case, [made.astype(BF16)]), np.arange(rows), 2 * x.nbytes)
        for name, (case, made) in cases.items()
    ]


def generation(bench: Bench) -> Rows:
    """Generation with recording and commitment, everything included, against plain generation."""
    import torch
    from decoders import sparse
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from prover import prove
    from prover.decoders import check, graph
    from prover.engines.torch import Recorder

    large = bench.device is not None and not bench.quick
    config, steps = (
        (LLAMA, 128) if large else (SMALL | {"num_hidden_layers": bench.size(0, 32, 2)}, bench.size(0, 32, 4))
    )
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check.write_config(folder, config)
        sparse(folder / "model.safetensors", config)
        statement = graph.save(graph.build(folder), folder / "model.onnx")
        place = bench.device.place if bench.device else "cpu"
        with torch.device(place):
            torch.set_default_dtype(torch.bfloat16)
            network = LlamaForCausalLM(LlamaConfig(**{**config, "attn_implementation": "sdpa"})).eval()
            torch.set_default_dtype(torch.float32)
        recorder = Recorder(network, statement, bench.device)
        for batch in (1, 16, 64) if large else (1, bench.size(0, 4, 2)):
            size = batch, max(steps // batch, 32) if large else steps
            found.append(_generated(bench, recorder, network, size, prove, GenerationConfig))
            found[-1]["nodes"] = len(statement.nodes)
    return found


def _generated(bench: Bench, recorder: Any, network: Any, size: tuple[int, int], prove: Any, settings: Any) -> Row:
    import torch

    batch, steps = size
    words = network.config.vocab_size
    prompts = RNG.integers(3, words, (batch, 64))
    ids = torch.from_numpy(prompts).to(network.device)
    config = settings(max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
    asked = [
        {"prompt": prompt, "temperature": np.float32(1e4), "top_k": np.int64(0), "top_p": np.float32(1)}
        | {"seed": RNG.integers(0, 256, 32, np.uint8), "max_tokens": np.int64(steps)}
        for prompt in prompts
    ]
    rounds = 1 if bench.quick else 3

    def plain() -> None:
        network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    parts: dict[str, list[float]] = {"recorded": [], "committed": [], "tokens": []}

    def recorded() -> None:
        started = time.perf_counter()
        traces = recorder.generate_batch(asked)
        parts["recorded"].append(time.perf_counter() - started)
        parts["tokens"].append(max(len(trace["answer"]) for trace in traces))
        for trace in traces:
            prove.commit(recorder.statement, trace).commitment.digest()
        parts["committed"].append(time.perf_counter() - started - parts["recorded"][-1])

    without, _ = bench.timed(plain, rounds), bench.timed(recorded, rounds)
    tokens = median(parts["tokens"])
    seconds = median(parts["recorded"]) / tokens + median(parts["committed"]) / tokens
    more = {
        "recorded ms a step": 1e3 * median(parts["recorded"]) / tokens,
        "commitment ms a sequence": 1e3 * median(parts["committed"]) / batch,
        "overhead": seconds / (without / steps) - 1,
        "bytes on the device": recorder.peak.device,
        "bytes moved to the host": recorder.peak.host,
    }
    return row(f"generating {steps} tokens, batch {batch}", seconds, "plain generation", without / steps, **more)


SECTIONS = {
    "digests": digests,
    "T1": t1,
    "weights": weights,
    "recomputed": recomputed,
    "attention": attention,
    "rowwise": rowwise,
    "generation": generation,
}


def main(
    choice: Annotated[str, typer.Option("--device", help=f"{', '.join(CHOICES)}.")] = "auto",
    to: Annotated[Path | None, typer.Option("--json", help="Where the results go, if not to bench/results.")] = None,
    only: Annotated[str | None, typer.Option(help="One section.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smallest sizes, once: does it run at all?")] = False,
) -> None:
    """Every section in turn; exit 1 if one of them failed, whose error stands in its place."""
    device = select(choice)
    bench = Bench(device, quick)
    name = device.name if device else "cpu"
    results: dict[str, Any] = {"device": name} | provenance("python bench/device.py", PACKAGES)
    if device:
        import cupy

        results["driver"] = cupy.cuda.runtime.driverGetVersion()
    slug = "-".join(name.lower().split())
    path = to or RESULTS / f"{slug}-{datetime.now(UTC).date().isoformat()}.json"
    failed = False
    for title, section in SECTIONS.items():
        if only not in (None, title):
            continue
        out.print(f"[bold]{title}[/]: {section.__doc__}")
        try:
            results[title] = section(bench)
            out.print(_table(results[title]))
        except Exception as error:  # noqa: BLE001  # one section that fails must not lose the others
            failed, results[title] = True, f"{type(error).__name__}: {error}"
            out.print(f"[red]{results[title]}[/]")
        path.write_text(json.dumps(results, indent=1) + "\n")
    out.print(f"written to {path}")
    if failed:
        raise typer.Exit(1)


def _table(rows: Rows) -> Table:
    table = Table("what", "ms", "beside", "ms", "times", "more")
    for found in rows:
        own = {"what", "seconds", "beside", "other_seconds", "ratio"}
        more = ", ".join(f"{key} {value:.4g}" for key, value in found.items() if key not in own)
        numbers = (f"{1e3 * found[key]:.3f}" for key in ("seconds", "other_seconds"))
        first, second = numbers
        table.add_row(found["what"], first, found["beside"], second, f"{found['ratio']:.2f}", more)
    return table


if __name__ == "__main__":
    typer.run(main)
