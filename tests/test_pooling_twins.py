"""Every pooling beside a second computation of the same formula: a slow transcription in fp64, one text and one token
at a time, or sentence-transformers' own module."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling as TheirPooling
from torch import Tensor

from poolwise.study.catalogue import CONCATENATIONS, POOLINGS
from test_pooling import LAYERS, SIZES, WIDTH, make, random_states, sharpen

MASKS = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [1, 0, 1, 1, 0, 0, 1]]
)
STATES = random_states(len(MASKS), MASKS.shape[1], WIDTH, seed=3)
VECTORS = random_states(5, LAYERS, WIDTH, seed=4)


def texts() -> list[list[Tensor]]:
    """The attended states of each text, in fp64."""
    return [[h.double() for h, keep in zip(*rows, strict=True) if keep] for rows in zip(STATES, MASKS, strict=True)]


def total(vectors: list[Tensor]) -> Tensor:
    return torch.stack(vectors).sum(0)


def check(name: str, slow: Callable[[dict[str, Tensor], list[Tensor]], Tensor], **args) -> None:
    """The pooling, with weights that count, against `slow(weights, vectors of one text)`."""
    pooling = sharpen(make(name, **args))
    weights = {key: value.double() for key, value in pooling.state_dict().items()}
    if pooling.reads == "layers":
        rows, found = [list(text.double()) for text in VECTORS], pooling(VECTORS)
    else:
        rows, found = texts(), pooling(STATES, MASKS)
    for row, vector in zip(rows, found, strict=True):
        torch.testing.assert_close(vector.double(), slow(weights, row), rtol=1e-4, atol=1e-5)


# --- transcriptions ---------------------------------------------------------------------------------------------------


def test_max():
    check("max", lambda w, row: torch.tensor([max(float(h[d]) for h in row) for d in range(WIDTH)]).double())


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_last_tokens(count):
    check("last_tokens", lambda w, row: total(row[-count:]) / len(row[-count:]), count=count)


@pytest.mark.parametrize("parts", CONCATENATIONS)
def test_concat(parts):
    one = {
        "first_token": lambda row: row[0],
        "last_token": lambda row: row[-1],
        "mean": lambda row: total(row) / len(row),
        "max": lambda row: torch.stack(row).amax(0),
    }
    check("concat", lambda w, row: torch.cat([one[part](row) for part in parts.split("+")]), parts=parts)
    assert make("concat", parts=parts).dimension == (parts.count("+") + 1) * WIDTH


@pytest.mark.parametrize("heads", [1, 4])
def test_attention(heads):
    def slow(w: dict[str, Tensor], row: list[Tensor]) -> Tensor:
        size, out = WIDTH // heads, []
        for head in range(heads):
            parts = [h[head * size : (head + 1) * size] for h in row]
            scores = [
                math.exp(sum(float(a * b) for a, b in zip(w["query"][head], p, strict=True)) / size**0.5) for p in parts
            ]
            out.append(total([score * part for score, part in zip(scores, parts, strict=True)]) / sum(scores))
        return torch.cat(out)

    check("attention", slow, heads=heads)


def test_mean_gain():
    check("mean_gain", lambda w, row: w["gain"] * total(row) / len(row))


def normed(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


@pytest.mark.parametrize("heads", [1, 2])
def test_latent_attention(heads):
    """NV-Embed's: the token asks, the latents answer, then the feed-forward, then the mean."""

    def slow(w: dict[str, Tensor], row: list[Tensor]) -> Tensor:
        size, outs = len(w["to_q.weight"]) // heads, []
        latents = [normed(z, w, "norm_latents") for z in w["latents"]]
        for h in row:
            gathered = []
            query = w["to_q.weight"] @ normed(h, w, "norm_states")
            for part in (slice(i * size, (i + 1) * size) for i in range(heads)):
                keys, values = ([w[f"to_{kind}.weight"][part] @ z for z in latents] for kind in "kv")
                scores = [math.exp(float(query[part] @ key) / size**0.5) for key in keys]
                gathered.append(total([s * v for s, v in zip(scores, values, strict=True)]) / sum(scores))
            x = h + w["to_out.weight"] @ torch.cat(gathered)
            a, g = (w["ffn_in.weight"] @ normed(x, w, "norm_ffn") + w["ffn_in.bias"]).chunk(2)
            gelu = g * (1 + torch.erf(g / 2**0.5)) / 2
            outs.append(x + w["ffn_out.weight"] @ (a * gelu) + w["ffn_out.bias"])
        return total(outs) / len(outs)

    check("latent_attention", slow, heads=heads, head_dim=8)


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_single_layer(layer):
    check("single_layer", lambda w, row: row[layer - 1], layer=layer)


def unit(row: list[Tensor], normalize: bool) -> list[Tensor]:
    return [h / h.square().sum().sqrt() for h in row] if normalize else row


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layers", range(1, LAYERS + 1))
def test_last_layers(layers, normalize):
    check(
        "last_layers",
        lambda w, row: total(unit(row, normalize)[-layers:]) / layers,
        layers=layers, normalize=normalize,
    )  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
def test_scalar_mix(normalize):
    def slow(w: dict[str, Tensor], row: list[Tensor]) -> Tensor:
        shares = [math.exp(float(v)) for v in w["mix"]]
        return total([s * h for s, h in zip(shares, unit(row, normalize), strict=True)]) / sum(shares)

    check("scalar_mix", slow, normalize=normalize)


def leaky(x: Tensor) -> Tensor:
    return torch.where(x < 0, x * (1 / 8 + 1 / 3) / 2, x)


def standardised(row: list[Tensor]) -> list[Tensor]:
    return [(h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() for h in row]


def test_layer_attention():
    def slow(w: dict[str, Tensor], row: list[Tensor]) -> Tensor:
        x, gathered = standardised(row), []
        for asking in x:
            query = leaky(w["query.weight"] @ asking)
            scores = [math.exp(float(query @ leaky(w["key.weight"] @ asked)) / len(x)) for asked in x]
            values = [leaky(w["value.weight"] @ asked) for asked in x]
            gathered.append(total([s * v for s, v in zip(scores, values, strict=True)]) / sum(scores))
        joined = torch.cat([x[-1], total(gathered) / len(gathered)])
        return torch.tanh(w["merge.weight"] @ joined + w["merge.bias"])

    check("layer_attention", slow)


def test_layer_mean_ffn():
    def slow(w: dict[str, Tensor], row: list[Tensor]) -> Tensor:
        x = standardised(row)
        values = [leaky(w["third.weight"] @ leaky(w["second.weight"] @ leaky(w["value.weight"] @ h))) for h in x]
        return torch.tanh(w["merge.weight"] @ torch.cat([x[-1], total(values) / len(values)]) + w["merge.bias"])

    check("layer_mean_ffn", slow)


# --- sentence-transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "args", "theirs"),
    [
        ("last_token", {}, "lasttoken"),
        ("mean", {}, "mean"),
        ("weighted_mean", {}, "weightedmean"),
        ("max", {}, "max"),
        ("concat", {"parts": "mean+max"}, ("mean", "max")),
        ("concat", {"parts": "last_token+mean"}, ("lasttoken", "mean")),
    ],
)
def test_sentence_transformers_has_the_same(ours, args, theirs):
    """On masks without gaps; the weighted mean padded on the right, for they count places from the batch's start."""
    masks = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    if ours != "weighted_mean":
        masks = torch.cat([masks, masks.flip(1)])
    states = STATES[:1].expand(len(masks), -1, -1)
    features = {"token_embeddings": states.clone(), "attention_mask": masks}
    expected = TheirPooling(WIDTH, pooling_mode=theirs)(features)["sentence_embedding"]
    torch.testing.assert_close(make(ours, **args)(states, masks), expected, rtol=1e-5, atol=1e-5)


# --- where training starts, and what controls what --------------------------------------------------------------------


def test_untrained_poolings_start_where_they_say():
    mean = make("mean")(STATES, MASKS)
    for name in ("attention", "mean_gain"):
        torch.testing.assert_close(make(name)(STATES, MASKS), mean, rtol=1e-5, atol=1e-5)
    assert torch.cosine_similarity(make("latent_attention", latents=512)(STATES, MASKS), mean).min() > 0.99
    for normalize in (True, False):
        mix, all_layers = (make(name, normalize=normalize, **more) for name, more in (
            ("scalar_mix", {}), ("last_layers", {"layers": LAYERS})))  # fmt: skip
        torch.testing.assert_close(mix(VECTORS), all_layers(VECTORS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(make("last_tokens", count=1)(STATES, MASKS), make("last_token")(STATES, MASKS))


def parameters(name: str, **args) -> int:
    return sum(p.numel() for p in make(name, **args).parameters())


def test_controls_have_as_many_parameters():
    """Up to the norm of the queries, the layer weights and the L scalars, as the table says."""
    assert parameters("attention") == parameters("mean_gain") == WIDTH
    assert parameters("layer_attention") == parameters("layer_mean_ffn") == 5 * WIDTH**2 + WIDTH
    assert parameters("latent_attention") - parameters("mean_ffn") == 2 * WIDTH
    assert parameters("scalar_mix") - parameters("last_layers") == LAYERS
    assert parameters("cross_attention") - parameters("mean_ffn") == 2 * WIDTH


def test_every_trainable_pooling_has_a_control():
    controls = {control for spec in POOLINGS.values() for control in spec.all_controls}
    trained = {name for name in POOLINGS if parameters(name)} - controls
    assert {name for name, spec in POOLINGS.items() if spec.controls} == trained
    for spec in POOLINGS.values():
        if isinstance(spec.controls, dict):
            assert tuple(spec.controls) == spec.args["tokens"].allowed
    assert controls <= set(POOLINGS)


def test_all_poolings_are_compared_here_or_in_test_pooling():
    here = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    there = {"first_token", "last_token", "mean", "weighted_mean", "cross_attention", "layer_cross_attention"}
    assert set(POOLINGS) - here - there == {
        "last_token_ffn",
        "mean_ffn",
    }  # equal to a head over one token: test_pooling
    assert set(SIZES) <= {argument for spec in POOLINGS.values() for argument in spec.args}
