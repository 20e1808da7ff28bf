"""The demo's chat model out of llama.cpp's file: a folder that Transformers reads, and that knows a few things."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu.plan import Model
from proof.errors import Malformed
from prover import smollm2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.folder(tmp_path_factory.mktemp("cache") / "smollm2")


def test_it_is_made_once(folder):
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert smollm2.folder(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_of_another_type_is_not_taken_for_it(folder):
    with pytest.raises(Malformed, match="bfloat16"):
        smollm2.folder(folder, "float32")


def test_its_graph_can_be_verified(folder):
    model = Model.open(folder / "model.onnx")
    assert model.nodes[-1].attributes["eos"] == (2,)
    assert sum(array.size for array in model.graph.weights.values()) > 134_000_000


@pytest.mark.parametrize(
    "text", ["Hello, world! 12345 is 3.14159\n\n\tdef f(x): return x**2", "Ünïcödé, 你好 🙂", "  spaces   and\r\n"]
)
def test_text_comes_back_from_its_tokens(folder, text):
    speller = AutoTokenizer.from_pretrained(folder)
    assert speller.decode(speller(text)["input_ids"]) == text


def test_digits_are_tokens_of_their_own(folder):
    speller = AutoTokenizer.from_pretrained(folder)
    assert speller.tokenize("4096") == ["4", "0", "9", "6"]


def test_a_chat_without_a_system_prompt_gets_the_models_own(folder):
    speller = AutoTokenizer.from_pretrained(folder)
    chat = speller.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert speller(chat)["input_ids"].count(speller.eos_token_id) == 2


def test_it_knows_the_capital_of_france(folder):
    speller = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = speller("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert speller.decode(network(ids).logits[0, -1].argmax()) == " Paris"
