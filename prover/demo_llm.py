"""The demo for a decoder: one service, an honest worker that answers a chat, and cheats of every kind, over HTTP."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu.plan import Model
from prover import smollm2
from prover.client import Client
from prover.decoder_cheats import CHEATS, Inputs, Scene
from prover.engines.torch import Recorder
from prover.prove import Engine
from prover.stage import Array, Attempt, Stage, computing, emptied, perform, result, service, show_table, show_traces

SYSTEM = (
    "You are a patient teacher. Explain things in plain words, give one example from daily life, and say so when you "
    "are not sure. Never give medical or legal advice."
)
QUESTION = "Why is the sky blue at noon and red in the evening?"
FEW = np.int64(8)  # tokens that suffice for a cheat on the network
SAMPLING = {
    "temperature": np.float32(0.7),
    "top_k": np.int64(40),
    "top_p": np.float32(0.95),
    "max_tokens": np.int64(64),
}
AMOUNT = "standard"
PROFILE = "torch-sdpa"
MEASURED = ("AVX2",)  # instruction sets of torch's kernels for which the profile was measured

NETWORK = {  # workers by cheat: these run another network, or another prompt
    "int8 weights": "miser",
    "fp8 weights": "scrimper",
    "int4 weights": "skinflint",
    "a LoRA adapter": "fine-tuner",
    "a quarter of the layers skipped": "skipper",
    "a window on attention": "forgetful",
    "another rotary base": "stretcher",
    "another prompt": "deaf",
    "another prompt under the task's": "mishearing",
}
TEXT = {  # these write another text
    "another temperature": "hothead",
    "another seed": "gambler",
    "a text by int4 weights": "ghost-writer",
    "another tail": "advertiser",
    "tokens never generated": "padder",
    "an answer cut short": "quitter",
}


@dataclass
class Chat(Stage):
    scene: Scene


def scene(folder: Path) -> Scene:
    """SmolLM2-135M-Instruct as Transformers runs it: nothing of it is changed."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").eval()
    return Scene(network, Model.open(folder / "model.onnx"), Recorder)


def request(folder: Path) -> dict[str, Array]:
    """The task's inputs: a conversation through the model's chat template, and how to sample."""
    speller = AutoTokenizer.from_pretrained(folder)
    said = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    text = speller.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    prompt = np.array(speller(text, add_special_tokens=False)["input_ids"], np.int64)
    seed = np.frombuffer(secrets.token_bytes(32), np.uint8)
    return {"prompt": prompt, "seed": seed, **{name: np.asarray(value) for name, value in SAMPLING.items()}}


def profile() -> str | None:
    """The rounding profile that this machine's kernels were measured to keep."""
    return PROFILE if torch.backends.cpu.get_cpu_capability() in MEASURED else None


def _plain_seconds(network: Any, inputs: Inputs) -> float:
    """The network as it stands, nothing recorded, once it is warm: as many tokens, sampled by Transformers."""
    prompt, count = torch.from_numpy(inputs["prompt"].copy())[None], int(inputs["max_tokens"])
    network.generate(prompt, max_new_tokens=1)
    started = time.perf_counter()
    network.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=True)
    return time.perf_counter() - started


def _honest(stage: Chat) -> Engine:
    return stage.honest


HONEST: Attempt[Chat] = computing("honest", "answers the chat", _honest)


def _attempts(workers: Mapping[str, str]) -> list[Attempt[Chat]]:
    return [_attempt(worker, cheat) for cheat, worker in workers.items()]


def _attempt(worker: str, cheat: str) -> Attempt[Chat]:
    return computing(worker, cheat, lambda stage: CHEATS[cheat](stage.scene))


def _chat(client: Client, asked: Scene, inputs: dict[str, Array], kept: str | None, bundles: Path) -> Chat:
    policy = f"{AMOUNT}+{kept}" if kept else AMOUNT
    seconds = _plain_seconds(asked.network, inputs)
    return Chat(client, asked.statement, inputs, policy, bundles, asked.honest, seconds, asked)


def run(folder: Path, console: Console) -> dict[str, Any]:
    """Run the demo in `folder`; returns what happened as JSON, `ok` true iff the honest one alone was paid."""
    bundles = emptied(folder / "bundles")
    with console.status("preparing SmolLM2-135M-Instruct") as status:
        path = smollm2.folder(folder / "smollm2")
        asked, inputs, kept = scene(path), request(path), profile()
        status.update("starting the service")
        with service(bundles / "service") as client:
            status.update("registering the model and its weights")
            client.register(path / "model.onnx")
            status.update("the honest worker at work")
            stage = _chat(client, asked, inputs, kept, bundles)
            honest = [HONEST(stage, secrets.token_bytes(32))]
            few = _chat(client, asked, inputs | {"max_tokens": np.asarray(FEW)}, kept, bundles)
            cheating = perform(_attempts(NETWORK), few, status.update)
            cheating += perform(_attempts(TEXT), stage, status.update)
            told = result(stage, path / "model.onnx", honest, cheating)
            text = (
                AutoTokenizer.from_pretrained(path).decode(stage.output("honest").reshape(-1)) if told["paid"] else ""
            )
    return told | {"profile": kept, "system": SYSTEM, "question": QUESTION, "answer": text}


def show(told: Mapping[str, Any], console: Console) -> None:
    """The table, the conversation, and how to look at what was left behind."""
    show_table(told, console)
    held = f"to the roundings of {told['profile']}" if told["profile"] else "to what any honest kernel may give"
    console.print(f"held {held}; cheats on the network answer with {FEW} tokens", highlight=False)
    console.print("the honest answer, decoded from the proven tokens:", highlight=False)
    console.print(f"  {told['question']}\n  {told['answer']}\n", highlight=False, markup=False)
    show_traces(told, console)
