"""What a pack must not change: dropout, equal tokens of different prompts, windows; and what its probe compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from poolwise.errors import ModelError
from poolwise.model import packing as layouts
from poolwise.model.packing import Segments, joined, refusal
from test_packing import DESIGNS, LONG, bases, encoder_of, features
from tiny import tiny_folder, tiny_model

__all__ = ["bases"]


def test_attention_drops_out_in_packs_too(tmp_path: Path) -> None:
    """A base that drops attention weights: while it trains, no two passes are equal."""
    encoder = encoder_of(str(tiny_folder(tmp_path, "llama", attention_dropout=0.5)), DESIGNS["m1"])
    for layout in ("padded", "packed"):
        with encoder[0].in_layout(layout), torch.no_grad():
            one, other = (encoder(dict(features(encoder)[1]))["sentence_embedding"] for _ in range(2))
        assert (one - other).abs().max() > 1e-3, layout


@pytest.mark.parametrize("name", ["mean", "m5"])
def test_equal_tokens_of_different_prompts_are_not_one_text(name: str, bases: dict[str, str]) -> None:
    """With the prompt left out of pooling, the same tokens are pooled from another place on."""
    design = DESIGNS[name]
    if name == "m5":  # the mean of the pooled tokens of each layer
        design = design.model_copy(update={"pooling_args": {**design.pooling_args, "tokens": "mean"}})
    encoder = encoder_of(bases["llama"], design, include_prompt=False).eval()
    batch = joined(features(encoder, [["find: the cat"], ["the cat"]], ("", "find: ")))
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    found = {}
    for layout in ("padded", "packed"):
        with encoder[0].in_layout(layout), torch.no_grad():
            found[layout] = encoder(dict(batch))["sentence_embedding"]
    assert (found["padded"][0] - found["padded"][1]).abs().max() > 1e-2
    assert torch.allclose(found["packed"], found["padded"], atol=1e-5)


def test_a_text_may_be_as_long_as_its_sliding_window() -> None:
    states = torch.randn(1, 4, 10, 8, generator=torch.Generator().manual_seed(0))
    segments = Segments([6, 4], torch.device("cpu"))
    layer = torch.nn.Module()
    plain, _ = layouts.packed_attention(layer, states, states, states, None, segments=segments)
    held, _ = layouts.packed_attention(layer, states, states, states, None, segments=segments, sliding_window=6)
    assert torch.equal(plain, held)
    with pytest.raises(ModelError, match="a text of 6 tokens is longer than its sliding window of 5"):
        layouts.packed_attention(layer, states, states, states, None, segments=segments, sliding_window=5)


@pytest.mark.parametrize("which", ["alone in a pack", "in a padded batch"])
def test_the_probe_compares_with_the_text_alone_and_with_a_padded_batch(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States that are wrong in packs of several texts, or in all packs, though no text sees another."""
    right = layouts.run_pack

    def wrong(model: Any, collector: Any, segments: Segments, *rest: Any) -> Any:
        states, vectors = right(model, collector, segments, *rest)
        return states * (1.5 if len(segments.lengths) > 1 or which == "in a padded batch" else 1), vectors

    model = tiny_model("llama")
    assert refusal(model, "causal", LONG) is None
    monkeypatch.setattr(layouts, "run_pack", wrong)
    assert f"from those {which}" in str(refusal(model, "causal", LONG))
