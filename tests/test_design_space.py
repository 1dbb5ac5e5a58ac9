"""The design space on tiny models: every pooling × attention × {Llama, Qwen2, Mistral, Gemma 3}, laws 1 to 5, 9, 10.

Weights are scaled four times; the encoder is built, probed and embeds real batches. Poolings cannot tell families
apart, so each family meets every attention, and every pooling meets every attention on Llama; `pytest -m wide` runs the
product of all three.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from poolwise.encoding.fast import FastEncoder
from poolwise.model import checkpoint
from poolwise.model.attention import influence
from poolwise.model.checkpoint import export
from poolwise.model.encoder import build
from poolwise.model.hooks import reachable
from poolwise.runs.train import train
from poolwise.study.catalogue import POOLINGS as SPECS
from poolwise.study.catalogue import PRESETS
from poolwise.study.design import Design
from poolwise.study.recipe import Lora
from poolwise.verdicts.factors import control_pairs, pooling_level
from test_laws import DESIGNS, TEXTS, pairs, recipe
from tiny import tiny_folder

FAMILIES = ("llama", "qwen2", "mistral", "gemma3")
ATTENTIONS = ("causal", "bidirectional", "bidirectional_last_1", "prefix", "causal_prefix")
POOLINGS = tuple(SPECS)
PROMPT = "find the book: "
SMALL = {"latents": 4, "count": 3}


def design(pooling: str, attention: str = "causal", **more: Any) -> Design:
    """A design with small sizes; layer poolings read means where attention is bidirectional, so both are covered."""
    known = SPECS[pooling].args
    args = {name: value for name, value in SMALL.items() if name in known}
    if SPECS[pooling].reads == "layers" and attention == "bidirectional":
        args["tokens"] = "mean"
    return Design(name=f"{pooling}-{attention}", attention=attention, pooling=pooling, pooling_args=args, **more)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: str(tiny_folder(folder, family)) for family in FAMILIES}


def some(family: str, bases: dict[str, str], **changes: Any) -> Any:
    return recipe(bases[family], query_prompt=PROMPT, lora=Lora(rank=2, dropout=0.0), **changes)


def roughen(encoder: Any) -> None:
    """First weights are partly zero, and zeros hide what they multiply."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder[1].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def features_of(encoder: Any, texts: list[str], side: str = "right", more: int = 0, junk: int = 0) -> dict[str, Any]:
    """A batch as preprocessing gives it, padded anew on `side` with `more` extra columns of the token `junk`."""
    found = encoder[0].preprocess(texts, prompt=PROMPT)
    rows = [ids[mask.bool()] for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)]
    width = max(map(len, rows)) + more
    ids, mask = torch.full((len(rows), width), junk), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "prompt_length": found["prompt_length"]}


def embed(encoder: Any, *args: Any) -> torch.Tensor:
    with torch.no_grad():
        return encoder(features_of(encoder, *args))["sentence_embedding"]


def check_laws(case: Design, family: str, bases: dict[str, str]) -> None:
    """Laws 1, 2, 5, 9 and 10 of one cell."""
    encoder = build(some(family, bases), case, 0).eval()
    # 2: the mode was probed by `build`; the matrix is exactly the mode's, where no window hides anything
    if family != "gemma3":
        assert torch.equal(influence(encoder[0].model) > 1e-6, reachable(case.attention, 8, 3))
    # 5: one backward pass from a rough head reaches every trainable tensor, but LoRA's A, whose B is still zero
    roughen(encoder)
    before = encoder(features_of(encoder, TEXTS))["sentence_embedding"]
    assert before.dtype == torch.float32
    (before @ torch.randn(before.shape[1], generator=torch.Generator().manual_seed(2))).square().sum().backward()
    sees_itself = case.pooling == "first_token" and case.attention in ("causal", "causal_prefix")  # softmax over one
    for name, parameter in encoder.named_parameters():
        used = parameter.grad is not None and bool(parameter.grad.count_nonzero())
        if sees_itself and ("q_proj" in name or "k_proj" in name):
            continue  # rounding decides whether its gradient is zero
        assert used == (parameter.requires_grad and "lora_A" not in name), name
    # 1 and 10: alone, in company, on either side, beside padding that looks like words
    alone = torch.cat([embed(encoder, [text]) for text in TEXTS])
    if case.pooling != "first_token" or case.attention.startswith("bidirectional"):  # else it is the prompt's
        assert (alone[0] - alone[1]).abs().max() > 1e-3
    for side in ("left", "right"):
        for more, junk in ((0, 0), (5, 7), (3, 2)):
            assert torch.allclose(embed(encoder, TEXTS, side, more, junk), alone, atol=1e-5), (side, more, junk)
    # 9: states in bf16 are pooled in fp32
    features = encoder[0](features_of(encoder, TEXTS))
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in features.items()
            if isinstance(value, torch.Tensor)}  # fmt: skip
    full = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    with torch.no_grad():
        assert torch.equal(encoder[1](half)["sentence_embedding"], encoder[1](full)["sentence_embedding"])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_and_attention(pooling: str, attention: str, bases: dict[str, str]) -> None:
    check_laws(design(pooling, attention), "llama", bases)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pooling", ["mean", "latent_attention", "scalar_mix"])
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_every_family_and_attention(family: str, pooling: str, attention: str, bases: dict[str, str]) -> None:
    check_laws(design(pooling, attention), family, bases)


@pytest.mark.wide
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_the_whole_space(family: str, pooling: str, attention: str, bases: dict[str, str]) -> None:
    check_laws(design(pooling, attention), family, bases)


def test_law_4_same_start_for_every_design(bases: dict[str, str]) -> None:
    """Equal names and shapes start equal, whatever the pooling, the attention and the template."""
    cases = [design(pooling, ATTENTIONS[i % len(ATTENTIONS)]) for i, pooling in enumerate(POOLINGS)]
    cases.append(design("mean", template="echo"))
    seen: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    heads: set[str] = set()
    compared = 0
    for case in cases:
        for name, value in build(some("llama", bases), case, 3).state_dict().items():
            key = (name, tuple(value.shape))
            assert torch.equal(seen.setdefault(key, value), value), (case.name, key)
            compared += 1
            heads |= {name} if name.startswith("1.") else set()
    assert compared > 10 * len(cases)
    assert {"1.head.latents", "1.head.query", "1.head.mix", "1.head.gain", "1.head.merge.weight"} <= heads


@dataclass(frozen=True)
class Saved:
    """A run folder and its export, what their encoder gave before it was saved, and how near they have to come."""

    case: Design
    expected: np.ndarray
    run: Path
    export: Path
    near: float


def saved(encoder: Any, case: Design, folder: Path, near: float) -> Saved:
    expected = encoder.encode(TEXTS)
    run = checkpoint.save(encoder, folder / "run")
    return Saved(case, expected, run, export(checkpoint.load(run), folder / "export"), near)


def trained(bases: dict[str, str], folder: Path) -> Iterator[Saved]:
    for case in DESIGNS:
        encoder = build(recipe(bases["llama"]), case, 0)
        train(encoder, recipe(bases["llama"]), pairs(8), folder / case.name / "training", seed=0)
        yield saved(encoder, case, folder / case.name, 1e-5)


def untrained(bases: dict[str, str], folder: Path) -> Iterator[Saved]:
    """Every pooling and attention once."""
    cases = [design(pooling, ATTENTIONS[i % len(ATTENTIONS)]) for i, pooling in enumerate(POOLINGS)]
    cases += [Design.model_validate({"preset": name, "name": name}) for name in ("echo", "bellm", "nv-embed")]
    cases.append(design("last_token", special_tokens=False))
    for number, case in enumerate(cases):
        small = {**case.pooling_args, "latents": 4} if "latents" in case.spec.args else case.pooling_args
        case = Design.model_validate({**case.model_dump(exclude={"preset"}), "pooling_args": small})
        encoder = build(some("llama", bases, max_length=64), case, 0).eval()
        roughen(encoder)
        with torch.no_grad():  # LoRA's B is zero at the start, and a merge of nothing proves nothing
            for name, parameter in encoder[0].named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        yield saved(encoder, case, folder / str(number), 1e-4)  # a merge rounds each weight once


FRESH = """
import json, sys, numpy as np, poolwise
out = {}
for folder in json.loads(sys.argv[1]):
    model = poolwise.load(folder)
    out[folder] = [model.encode(json.loads(sys.argv[2])).tolist(), model[0].model.config.is_causal]
print(json.dumps(out))
"""
Reloaded = tuple[dict[str, list[Saved]], dict[str, tuple[list[list[float]], bool]]]


@pytest.fixture(scope="module")
def reloaded(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Reloaded:
    """What was saved, and embeddings and `is_causal` of each folder, loaded in another process: one for all."""
    folder = tmp_path_factory.mktemp("saved")
    made = {"trained": list(trained(bases, folder / "t")), "untrained": list(untrained(bases, folder / "u"))}
    folders = [str(path) for each in made.values() for one in each for path in (one.run, one.export)]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(folders), json.dumps(TEXTS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return made, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("which", "count"), [("trained", len(DESIGNS)), ("untrained", len(POOLINGS) + 4)])
def test_law_3_survives_a_fresh_process(which: str, count: int, reloaded: Reloaded) -> None:
    """build -> (train ->) save -> load -> merge -> export -> reload: equal embeddings, attention and head kept."""
    made, found = reloaded
    assert len(made[which]) == count
    for one in made[which]:
        for folder, near in ((one.run, 1e-5), (one.export, one.near)):
            vectors, is_causal = found[str(folder)]
            assert np.abs(np.array(vectors) - one.expected).max() < near, (folder.name, one.case.name)
            assert is_causal == (one.case.attention != "bidirectional"), (folder.name, one.case.name)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("-paper")])
def test_every_preset_can_be_built(name: str, bases: dict[str, str]) -> None:
    encoder = build(some("qwen2", bases), Design.model_validate({"preset": name}), 0).eval()
    vectors = encoder.encode(TEXTS, prompt=PROMPT)
    assert vectors.shape == (len(TEXTS), encoder.get_embedding_dimension())
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("more", [{}, {"template": "echo"}, {"special_tokens": False}], ids=str)
@pytest.mark.parametrize("pooling", ["last_token", "concat", "scalar_mix"])
def test_fast_encoding_is_the_same(pooling: str, more: dict[str, Any], attention: str, bases: dict[str, str]) -> None:
    """Shortcuts of the fast encoder (shared prompts, the last layer for one token) know every mode, or stay away."""
    encoder = build(some("llama", bases), design(pooling, attention, **more), 0).eval()
    expected = encoder.encode(TEXTS, prompt=PROMPT)
    assert np.abs(FastEncoder(encoder).encode(TEXTS, PROMPT) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("pooling", "args", "prunes"),
    [
        ("last_token", {}, True),
        ("last_token_ffn", {"latents": 4}, True),
        ("cross_attention", {"latents": 4, "tokens": "last"}, True),
        ("cross_attention", {"latents": 4}, False),
        ("last_tokens", {}, False),
    ],
)
def test_the_last_layer_is_pruned_if_only_the_last_token_is_read(
    pooling: str, args: dict[str, Any], prunes: bool, bases: dict[str, str]
) -> None:
    case = Design(name="d", attention="causal", pooling=pooling, pooling_args=args)
    encoder = build(some("llama", bases), case, 0).eval()
    fast = FastEncoder(encoder)
    assert fast.prunes == prunes
    assert np.abs(fast.encode(TEXTS, PROMPT) - encoder.encode(TEXTS, prompt=PROMPT)).max() < 1e-5


def test_template_and_special_tokens_are_levels_of_the_pooling() -> None:
    designs = [
        design("mean"), design("mean", template="echo"), design("mean", special_tokens=False), design("attention"),
        design("mean_gain"), design("mean_gain", template="echo"),
    ]  # fmt: skip
    levels = [{"pooling": pooling_level(case, {})} for case in designs]
    names = [level["pooling"] for level in levels]
    assert names[:3] == ["mean", "mean (template echo)", "mean (no special tokens)"]
    assert len(set(names)) == len(designs)
    assert list(control_pairs(designs, levels)) == [("attention", "mean_gain")]  # not the one in another template
