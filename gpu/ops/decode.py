"""assay::Decode: the tokens of an answer, each the one that the rule gives for its row of logits.

Decode(logits (n, V), answer (n,), temperature (), top_k (), top_p (), seed (32,), max_tokens ()) -> (n, 1). The answer
is the worker's to give, as what was fed back while it was written; this node ties it to the logits. It ends with a
token of the attribute `eos` or has max_tokens tokens, and no such token comes before. A row of logits is replayed at
little cost, so several are drawn where other nodes have one: a text from elsewhere is wrong in some tokens only.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu.decoding import Settings, admitted
from gpu.ops.call import Call, Family, Measure, Op, RowIds, Site, every_row
from proof.errors import Malformed, Reason, Rejected
from proof.graph import Node, Spec
from proof.policy import Policy
from proof.sampling import SEED_BYTES, drawn

INPUTS = ("logits", "answer", "temperature", "top_k", "top_p", "seed", "max_tokens")
LOGITS, ANSWER = 0, 1
DRAWS = 4  # for each that the policy has of a tensor's rows


def _sample(site: Site, policy: Policy, seed: bytes) -> RowIds:
    out = site.outputs[0]
    assert out is not None
    return drawn(seed, policy.rows and DRAWS * policy.rows, out.rows)


def _reach(site: Site, position: int, rows: RowIds) -> Mapping[int, RowIds]:
    others = {i: every_row(spec) for i, spec in enumerate(site.inputs) if spec is not None and i != LOGITS}
    return {LOGITS: rows} | others


def _check(call: Call) -> Measure:
    given = {name: tensor for name, tensor in zip(INPUTS, call.inputs, strict=True) if tensor is not None}
    answer = given["answer"].whole()
    try:
        settings = Settings.of({name: tensor.whole() for name, tensor in given.items() if name != "logits"})
    except Malformed as error:
        raise Rejected(Reason.INPUT, str(error)) from error
    _check_length(answer.tolist(), settings, call.site)
    tokens = call.outputs[0]
    assert tokens is not None
    if not np.array_equal(tokens.whole().reshape(-1), answer):
        raise Rejected(Reason.REEXECUTION, "the tokens returned are not the answer that was fed back")
    ambiguous = 0
    for row, logits in zip(call.rows[0].tolist(), given["logits"].take(call.rows[0]), strict=True):
        try:
            choices = admitted(logits, settings, row)
        except Malformed as error:
            raise Rejected(Reason.NONFINITE, str(error)) from error
        if answer[row] not in choices:
            raise Rejected(
                Reason.REEXECUTION, f"token {row} of the answer is {answer[row]} where the rule gives {choices[0]}"
            )
        ambiguous += len(choices) > 1
    return Measure(call.claimed[0].size, ambiguous=ambiguous)


def _check_length(answer: list[int], settings: Settings, site: Site) -> None:
    eos, count = site.node.attributes["eos"], len(answer)
    stops = [i for i, token in enumerate(answer) if token in eos]
    if stops and stops[0] != count - 1:
        raise Rejected(Reason.REEXECUTION, f"the answer goes on after token {stops[0]}, which ends it")
    if count > settings.max_tokens:
        raise Rejected(Reason.REEXECUTION, f"an answer of {count} tokens where {settings.max_tokens} are allowed")
    if count < settings.max_tokens and not stops:
        raise Rejected(Reason.REEXECUTION, f"the answer stops after {count} of {settings.max_tokens} tokens, unended")


def _refuses(node: Node) -> str | None:
    eos = node.attributes.get("eos")
    if not isinstance(eos, tuple) or not all(isinstance(token, int) for token in eos):
        return "the attribute eos is not a list of token ids"
    if len(node.inputs) != len(INPUTS) or not all(node.inputs):
        return f"it takes the inputs {', '.join(INPUTS)}"
    return None


def _infer(node: Node, inputs: tuple[Spec | None, ...]) -> tuple[Spec, ...]:
    specs = dict(zip(INPUTS, inputs, strict=True))
    logits, answer = specs["logits"], specs["answer"]
    assert logits is not None
    assert answer is not None
    count = answer.size
    wanted: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        name: (np.dtype(np.int64), ()) for name in ("top_k", "max_tokens")
    }
    wanted |= {name: (np.dtype(np.float32), ()) for name in ("temperature", "top_p")}
    wanted |= {"answer": (np.dtype(np.int64), (count,)), "seed": (np.dtype(np.uint8), (SEED_BYTES,))}
    for name, (dtype, shape) in wanted.items():
        spec = specs[name]
        if spec is None or spec.dtype != dtype or spec.shape != shape:
            raise ValueError(f"{name} is {spec}, not {dtype}{list(shape)}")
    if len(logits.shape) != 2 or logits.shape[0] != count or not count or not logits.width:
        raise ValueError(f"{count} tokens from logits of shape {logits.shape}")
    return (Spec(np.dtype(np.int64), (count, 1)),)


OPS: dict[tuple[str, str], Op] = {
    ("assay", "Decode"): Op(
        family=Family.DECODING,
        reach=_reach,
        check=_check,
        refuses=_refuses,
        infer=_infer,
        sample=_sample,
        answers=(ANSWER,),
    ),
}
