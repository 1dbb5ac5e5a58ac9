"""The paper's head against a second transcription of its code, and the heads that its authors released."""

from __future__ import annotations

import pytest
import torch

from paper_head import paper_head, random_weights
from poolwise.errors import CheckpointError, ModelError
from poolwise.pooling.paper import load_paper_head
from poolwise.study.catalogue import PRESETS
from poolwise.study.pooling_spec import Arg
from test_pooling import LAYERS, TOKENS, WIDTH, make_preset, random_states, sharpen


@pytest.mark.parametrize("rows", [None, 4, 6])
@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_paper_head_equals_the_transcription(rows, heads, masked):
    weights = random_weights(width=8, latents=3, heads=heads, head_dim=10 // heads, rows=rows)
    vectors = random_states(3, 4, 8)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]]) if masked else None
    ours, theirs = load_paper_head(weights, heads=heads)(vectors, mask), paper_head(weights, vectors, heads, mask)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(3))


def test_the_transcription_sees_every_detail_of_the_layout():
    """Each change to the layout moves the vector by far more than the tolerance above: the comparison can fail."""
    weights = random_weights(heads=2, head_dim=5, rows=4)
    vectors = random_states(3, 4, 8)
    right = load_paper_head(weights, heads=2)(vectors)
    first, second = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    kv, net = weights[first + "fn.to_kv.weight"], weights[second + "fn.net.0.weight"]
    changes = {
        "values first": {first + "fn.to_kv.weight": kv.roll(10, 0)},
        "norms swapped": {
            first + "norm.weight": weights[first + "norm_context.weight"],
            first + "norm_context.weight": weights[first + "norm.weight"],
        },
        "gate first": {second + "fn.net.0.weight": net.roll(32, 0)},
        "heads interleaved": {first + "fn.to_out.weight": weights[first + "fn.to_out.weight"].roll(1, 1)},
        "rows shifted": {"pos_emb.weight": weights["pos_emb.weight"].roll(1, 0)},
    }
    for what, change in changes.items():
        assert (load_paper_head({**weights, **change}, heads=2)(vectors) - right).abs().max() > 1e-2, what
    assert (load_paper_head(weights, heads=1)(vectors) - right).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-paper")])
def test_paper_presets_equal_the_transcription(name):
    """The presets are the published computation: their weights, read as a released head, give the same vectors."""
    pooling = sharpen(make_preset(name))
    ours = pooling.state_dict()
    first, second = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    weights = {
        "latents": ours["latents"],
        first + "fn.to_q.weight": ours["to_q.weight"],
        first + "fn.to_kv.weight": torch.cat([ours["to_k.weight"], ours["to_v.weight"]]),
        first + "fn.to_out.weight": ours["to_out.weight"],
    }
    for part in ("weight", "bias"):
        weights[first + f"norm.{part}"] = ours[f"norm_states.{part}"]
        weights[first + f"norm_context.{part}"] = ours[f"norm_latents.{part}"]
        weights[second + f"norm.{part}"] = ours[f"norm_ffn.{part}"]
        weights[second + f"fn.net.0.{part}"] = ours[f"ffn_in.{part}"]
        weights[second + f"fn.net.2.{part}"] = ours[f"ffn_out.{part}"]
    if "layer_weights" in ours:
        weights["pos_emb.weight"] = ours["layer_weights"]
    states = random_states(2, TOKENS if pooling.reads == "tokens" else LAYERS, WIDTH)
    vectors = states[:, -1:] if name == "m2-paper" else states
    result = torch.nn.functional.normalize(pooling(states), dim=-1)
    torch.testing.assert_close(result.double(), paper_head(weights, vectors, 2), rtol=0, atol=1e-5)


# --- released heads: what is read and what is refused -----------------------------------------------------------------


def test_paper_head_from_a_file_in_bf16_with_a_prefix(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in random_weights().items()}
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "attn_pool.pt")
    head, vectors = load_paper_head(tmp_path / "attn_pool.pt", heads=2), random_states(2, 4, 8)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in head.parameters())
    torch.testing.assert_close(head(vectors).double(), paper_head(weights, vectors, 2), rtol=0, atol=1e-5)


def test_paper_head_does_not_share_memory_with_the_state_dict():
    weights = random_weights()
    head, vectors = load_paper_head(weights, heads=2), random_states(2, 4, 8)
    before = head(vectors)
    for tensor in weights.values():
        tensor.zero_()
    assert torch.equal(head(vectors), before)


def test_paper_head_refuses_what_it_cannot_read(tmp_path):
    weights = random_weights()
    without = {name: tensor for name, tensor in weights.items() if name != "latents"}
    with pytest.raises(CheckpointError, match=r"missing latents; unexpected extra$"):
        load_paper_head({**without, "extra": torch.zeros(1)}, heads=2)
    with pytest.raises(CheckpointError, match="heads = 32 does not divide the inner width 10"):
        load_paper_head(weights)
    norm = "cross_attend_blocks.1.norm.bias"
    with pytest.raises(CheckpointError, match=r"norm_ffn.bias \(9,\) instead of \(8,\)"):
        load_paper_head({**weights, norm: torch.zeros(9)}, heads=2)
    keys = "cross_attend_blocks.0.fn.to_kv.weight"  # a single row cannot hold both
    with pytest.raises(CheckpointError, match=r"to_v.weight \(missing\) instead of \(10, 8\)"):
        load_paper_head({**weights, keys: torch.zeros(1, 8)}, heads=2)
    with pytest.raises(CheckpointError, match=r"latents has shape \(8,\)"):
        load_paper_head({**weights, "latents": torch.zeros(8)}, heads=2)
    with pytest.raises(CheckpointError, match="no such file"):
        load_paper_head(tmp_path / "nothing.pt")
    (tmp_path / "noise.pt").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"noise\.pt"):
        load_paper_head(tmp_path / "noise.pt")
    torch.save(Arg(int, 1, "a class that is not a tensor"), tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="load safely"):
        load_paper_head(tmp_path / "code.pt")
    torch.save({"weights": weights}, tmp_path / "nested.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_paper_head(tmp_path / "nested.pt")
    with pytest.raises(ModelError, match="5 vectors for a head of 4 layer weights"):
        load_paper_head(weights, heads=2)(random_states(1, 5, 8))
