"""Packed training: loss and gradient of the padded batch, texts that do not see each other, and who may not be packed.

Dropout is 0 where two layouts are compared. Weights are scaled up (`tiny`), so that attention matters, and LoRA's B is
not zero, so that its A has a gradient. Differences are relative: to the loss, and to the norm of the whole gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, Gemma2Config, GptOssConfig

from poolwise.errors import ModelError
from poolwise.model import packing
from poolwise.model import packing as layouts
from poolwise.model.attention import backend, set_attention
from poolwise.model.encoder import build
from poolwise.model.hooks import LayerCollector, decoder_layers
from poolwise.model.packing import Rows, Segments, choose, has_dropout, joined, refusal
from poolwise.runs import train as training
from poolwise.runs.prepare import base_config, check_base
from poolwise.study.design import Design
from poolwise.study.recipe import Lora, Recipe
from poolwise.study.study import Study
from test_laws import paper
from tiny import FAMILIES, tiny_folder, tiny_model

CLOSE = 1e-5
LONG = 64
NO_DROPOUT = Lora(rank=4, dropout=0.0)
DESIGNS = {
    **{name: Design.model_validate({"preset": name}) for name in ("m1", "m2", "m3", "m4", "m5")},
    "mean": Design(name="mean", attention="bidirectional", pooling="mean"),
}
LOSSES: dict[str, dict[str, Any]] = {
    "infonce": {},
    "symmetric": {"loss": "symmetric_infonce"},
    "cached": {"mini_batch_size": 2},
    "matryoshka": {"matryoshka": (8, 16)},
}
COLUMNS = [
    ["the cat sat", "a dog and a cat on the river bank in the morning", "water", "people walk home with a book"],
    ["a mat", "the dog sat here", "some people walk to the river every morning and some do not", "x"],
    ["no cat", "nothing at all to see in the house of the dog", "book", "morning people"],
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: str(tiny_folder(folder, family)) for family in ("llama", "qwen2", "mistral")}


def recipe(base: str, **changes: Any) -> Recipe:
    return Recipe(**{"base_model": base, "max_length": LONG, "lora": NO_DROPOUT, "warmup_steps": 0, **changes})


def encoder_of(base: str, design: Design, **changes: Any) -> Any:
    encoder = build(recipe(base, **changes), design, 0, device="cpu").train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


def features(encoder: Any, columns: list[list[str]] = COLUMNS, prompts: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    prompts = prompts or ("",) * len(columns)
    return [encoder[0].preprocess(texts, prompt=prompt) for texts, prompt in zip(columns, prompts, strict=True)]


def loss_and_gradient(encoder: Any, given: Recipe, layout: str, batch: list[dict[str, Any]]) -> tuple[float, Any]:
    encoder.zero_grad()
    with encoder[0].in_layout(layout):
        loss = training._loss(encoder, given, gather=False)([dict(f) for f in batch], None)
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def apart(a: tuple[float, torch.Tensor], b: tuple[float, torch.Tensor]) -> float:
    return max(abs(a[0] - b[0]) / abs(b[0]), float((a[1] - b[1]).norm() / b[1].norm()))


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_loss_and_gradient_are_those_of_the_padded_batch(family: str, name: str, bases: dict[str, str]) -> None:
    encoder = encoder_of(bases[family], DESIGNS[name])
    batch = features(encoder)
    for changes in LOSSES.values():
        given = recipe(bases[family], **changes)
        padded = loss_and_gradient(encoder, given, "padded", batch)
        assert padded[1].norm() > 1e-2
        for layout in ("packed", "grouped") if not changes else ("packed",):
            assert apart(loss_and_gradient(encoder, given, layout, batch), padded) < CLOSE, (layout, changes)


@pytest.mark.parametrize("name", ["m1", "m4", "m5"])
def test_gradient_checkpointing(name: str, bases: dict[str, str]) -> None:
    padded, packed = (
        loss_and_gradient(encoder, recipe(bases["qwen2"], **changes), layout, features(encoder))
        for layout, checkpointing in (("padded", False), ("packed", True))
        for changes in ({"gradient_checkpointing": checkpointing, "mini_batch_size": 3 * checkpointing},)
        for encoder in (encoder_of(bases["qwen2"], DESIGNS[name], gradient_checkpointing=checkpointing),)
    )
    assert apart(packed, padded) < CLOSE


def test_a_leak_would_be_seen_by_the_comparisons(bases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with all texts in one segment, loss and gradient are far away."""
    encoder = encoder_of(bases["llama"], DESIGNS["mean"])
    given, batch = recipe(bases["llama"]), features(encoder)
    padded = loss_and_gradient(encoder, given, "padded", batch)
    monkeypatch.setattr(packing, "Segments", leaking())
    assert apart(loss_and_gradient(encoder, given, "packed", batch), padded) > 0.1


def leaking() -> type[Segments]:
    class Leaking(Segments):
        """Attention that takes all texts for one."""

        def __init__(self, lengths: list[int], device: torch.device):
            super().__init__(lengths, device)
            self.runs, self.sizes = [(1, sum(lengths))], [sum(lengths)]

    return Leaking


def test_columns_go_through_the_model_together(bases: dict[str, str]) -> None:
    encoder = encoder_of(bases["llama"], DESIGNS["m1"])
    batch = features(encoder)
    shapes: list[tuple[int, ...]] = []
    encoder[0].model.register_forward_pre_hook(
        lambda model, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    tokens = sum(int(f["attention_mask"].sum()) for f in batch)
    loss_and_gradient(encoder, recipe(bases["llama"]), "packed", batch)
    assert shapes == [(1, tokens)]


@pytest.mark.parametrize("name", ["m2", "m3", "m5"])
@pytest.mark.parametrize("layout", ["packed", "grouped"])
def test_padding_side_and_amount_do_not_matter(layout: str, name: str, bases: dict[str, str]) -> None:
    encoder = encoder_of(bases["llama"], DESIGNS[name]).eval()
    rows = [encoder[0].words(text)["input_ids"] for text in COLUMNS[0]]
    found = []
    for before, after in ((0, 0), (3, 0), (0, 3), (2, 4)):
        width = max(map(len, rows)) + before + after
        ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            start = before if after >= before else width - after - len(row)
            ids[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), 1
        with encoder[0].in_layout(layout), torch.no_grad():
            out = encoder({"input_ids": ids, "attention_mask": mask})
        assert torch.equal(out["attention_mask"], mask)
        assert not out["token_embeddings"][mask == 0].any()
        found.append((out["sentence_embedding"], out["token_embeddings"][mask == 1]))
    with torch.no_grad():
        alone = encoder({"input_ids": torch.tensor(rows[:1]), "attention_mask": torch.ones(1, len(rows[0]))})
    assert torch.allclose(found[0][0][:1], alone["sentence_embedding"], atol=CLOSE)
    for embeddings, tokens in found[1:]:
        assert torch.allclose(embeddings, found[0][0], atol=CLOSE)
        assert torch.allclose(tokens, found[0][1], atol=1e-4)  # in the order of the text


@pytest.mark.parametrize("name", ["mean", "m4", "m5"])
def test_prompts_left_out_of_pooling(name: str, bases: dict[str, str]) -> None:
    """Queries have a prompt, documents have none: each row of the one forward keeps its own."""
    encoder = encoder_of(bases["llama"], DESIGNS[name], include_prompt=False)
    batch = features(encoder, prompts=("find the book: ", "", ""))
    assert joined(batch)["prompt_length"].unique().numel() == 2
    given = recipe(bases["llama"])
    padded = loss_and_gradient(encoder, given, "padded", batch)
    whole = loss_and_gradient(encoder, given, "padded", [{**f, "prompt_length": 0} for f in batch])
    assert apart(whole, padded) > 1e-2
    for layout in ("packed", "grouped"):
        assert apart(loss_and_gradient(encoder, given, layout, batch), padded) < CLOSE


@pytest.mark.parametrize("name", ["m1", "m4", "m5"])
def test_equal_texts_are_encoded_once_without_dropout_only(name: str, bases: dict[str, str], monkeypatch: Any) -> None:
    columns = [COLUMNS[0], COLUMNS[1], [COLUMNS[0][1], COLUMNS[1][0], COLUMNS[1][0], "other"]]
    packs: list[list[int]] = []

    class Watched(Segments):
        def __init__(self, lengths: list[int], device: torch.device):
            super().__init__(lengths, device)
            packs.append(lengths)

    monkeypatch.setattr(packing, "Segments", Watched)
    encoder = encoder_of(bases["llama"], DESIGNS[name])
    given, batch = recipe(bases["llama"]), features(encoder, columns)
    padded = loss_and_gradient(encoder, given, "padded", batch)
    assert apart(loss_and_gradient(encoder, given, "packed", batch), padded) < CLOSE
    assert len(packs.pop()) == 9
    dropping = encoder_of(bases["llama"], DESIGNS[name], lora=Lora(dropout=0.1))
    loss_and_gradient(dropping, given, "packed", features(dropping, columns))
    assert len(packs.pop()) == 12
    assert has_dropout(dropping[0].model)
    assert not has_dropout(encoder[0].model)
    assert has_dropout(tiny_model("llama", attention_dropout=0.1))


def test_segments_travel_by_flash_attentions_names() -> None:
    segments = Segments([5, 3, 3, 1], torch.device("cpu"))
    assert segments.runs == [(1, 5), (2, 3), (1, 1)]
    given = segments.arguments(flash=True)
    assert given.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert given["cu_seq_lens_q"].tolist() == [0, 5, 8, 11, 12]
    assert given["cu_seq_lens_q"].dtype == torch.int32
    assert given["max_length_k"] == 5


def test_a_text_without_tokens() -> None:
    """An empty text (no BOS, no EOS) takes no place, and its vectors are zero, as in a padded batch."""
    model = tiny_model("llama")
    set_attention(model, "bidirectional")
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    ids = torch.arange(12).view(3, 4) + 5
    collector = LayerCollector(model, "mean")
    with packing.packed_attention_on(model), torch.no_grad():
        states, vectors = packing.forward_packed(model, collector, Rows(ids, mask, mask), once=False)
    assert not states[0].any()
    assert vectors is not None
    assert not vectors[0].any()
    with collector.collect(mask[1:]), torch.no_grad():
        out = model(input_ids=ids[1:], attention_mask=mask[1:]).last_hidden_state
    torch.testing.assert_close(vectors[1:], collector.vectors(out), atol=1e-4, rtol=1e-4)


# --- who may be packed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mistral_window", "gemma3")])
def test_families_that_can_be_packed(family: str, mode: str) -> None:
    model = tiny_model(family, scale=3.0)
    set_attention(model, "causal")
    assert refusal(model, mode, LONG) is None
    assert backend(model) == "sdpa"
    assert model.config.is_causal
    assert refusal(model.bfloat16(), mode, LONG) is None


def test_families_that_cannot() -> None:
    assert "0 of its 2 layers received" in str(refusal(tiny_model("stablelm"), "causal", LONG))
    assert "sliding window of 4 tokens, shorter than max_length = 64" in str(
        refusal(tiny_model("mistral_window"), "causal", LONG)
    )
    assert refusal(tiny_model("mistral_window", sliding_window=LONG), "causal", LONG) is None
    assert "'eager' cannot attend by segments" in str(refusal(tiny_model("llama", attn="eager"), "causal", LONG))
    assert "takes no position ids" in str(refusal(tiny_model("mamba"), "causal", LONG))
    assert refusal(tiny_model("gpt_neo"), "causal", LONG)


SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "term"),
    [(Gemma2Config(**SIZES), "softcap"), (GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1), "s_aux")],
    ids=["gemma2", "gpt_oss"],
)
def test_terms_that_packed_attention_does_not_know(config: Any, term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft caps and sinks: transformers refuses sdpa for them today; should that change, they are refused here."""
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    assert "'eager' cannot attend by segments" in str(refusal(model, "causal", LONG))
    model.config._attn_implementation = "sdpa"
    assert "does not support" in str(refusal(model, "causal", LONG))
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    assert f"its attention has {term}" in str(refusal(model, "causal", LONG))


def test_the_probe_sees_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert refusal(model, "causal", LONG) is None
    monkeypatch.setattr(layouts, "Segments", leaking())
    for mode in ("causal", "bidirectional"):
        assert "change by" in str(refusal(model, mode, LONG))
        assert "with its neighbours in the pack" in str(refusal(model, mode, LONG))


def test_a_layer_that_is_not_told_is_seen_in_every_forward(bases: dict[str, str]) -> None:
    encoder = encoder_of(bases["llama"], DESIGNS["m1"])
    batch = features(encoder)
    layer = decoder_layers(encoder[0].model)[1]
    forward = layer.forward
    layer.forward = lambda *args, segments=None, **given: forward(*args, **given)
    assert "1 of its 2 layers" in str(refusal(encoder[0].model, "causal", LONG))
    with pytest.raises(ModelError, match="1 of its 2 layers"):
        loss_and_gradient(encoder, recipe(bases["llama"]), "packed", batch)


def test_one_layout_for_all_designs_of_a_study() -> None:
    model = tiny_model("llama")
    plain = [DESIGNS["m1"], DESIGNS["m5"]]
    assert choose(model, plain, LONG) == ("packed", None)
    assert choose(model, [*plain, paper("m4-paper"), paper("m5-paper")], LONG) == ("packed", None)
    layout, reason = choose(tiny_model("mistral_window"), plain, LONG)
    assert layout == "grouped"
    assert "sliding window of 4" in str(reason)
    prefix = Design(name="prefix", attention="prefix", pooling="mean")
    assert choose(model, [*plain, prefix], LONG)[0] == "grouped"


def test_check_says_what_is_not_packed(tmp_path: Path) -> None:
    raw = {
        "name": "s",
        "designs": [{"preset": "m1"}, {"preset": "m4"}],
        "recipe": {"base_model": str(tiny_folder(tmp_path, "mistral_window", sliding_window=16)), "max_length": LONG},
    }
    study = Study.parse(raw)
    layers, note = check_base(study, *base_config(study))
    assert layers.startswith("Of 2 layers 0 attend to all tokens; 2 to 16 tokens at most")
    assert note.startswith("Training batches are grouped, not packed")
    assert "sliding window of 16 tokens" in note
    short = Study.parse({**raw, "recipe": {**raw["recipe"], "max_length": 16}})
    assert check_base(short, *base_config(short)) == []


def test_prefix_attention_in_groups(bases: dict[str, str]) -> None:
    """Rows change their order in groups, and the lengths of their prompts with them."""
    design = Design(name="prefix", attention="prefix", pooling="mean")
    encoder = encoder_of(bases["llama"], design)
    batch = features(encoder, prompts=("find the book: ", "", ""))
    padded, grouped = (
        loss_and_gradient(encoder, recipe(bases["llama"]), layout, batch) for layout in ("padded", "grouped")
    )
    assert apart(grouped, padded) < CLOSE
    causal = loss_and_gradient(encoder, recipe(bases["llama"]), "padded", [{**f, "prompt_length": 0} for f in batch])
    assert apart(causal, padded) > 1e-3


def test_the_layout_ends_with_its_block(bases: dict[str, str]) -> None:
    encoder = encoder_of(bases["llama"], DESIGNS["m1"])
    block = encoder[0].in_layout("packed")
    with block:
        assert backend(encoder[0].model) == packing.PACKED_SDPA
        encoder[0].model.forward = None
        with pytest.raises(TypeError):
            encoder(features(encoder)[0])
    assert backend(encoder[0].model) == "sdpa"
    assert encoder[0].layout == "padded"


# --- inside the trainer ----------------------------------------------------------------------------------------------


def pairs(rows: int) -> Dataset:
    words = ["cat", "dog", "river", "book", "water", "morning", "people"]
    return Dataset.from_dict(
        {
            "query": [f"the {words[i % 7]} {i}" * (1 + i % 3) for i in range(rows)],
            "positive": [f"a {words[i % 7]} and {words[i % 5]} {i}" * (1 + i % 4) for i in range(rows)],
            "negative_1": [f"no {words[(i + 3) % 7]} {i}" for i in range(rows)],
        }
    )


@pytest.mark.parametrize(
    "changes", [{}, {"mini_batch_size": 3, "gradient_checkpointing": True}], ids=["plain", "cached"]
)
@pytest.mark.parametrize("name", ["m1", "m5"])
def test_training_makes_the_same_steps(
    name: str, changes: Any, bases: dict[str, str], tmp_path: Path, monkeypatch: Any
):
    given = recipe(
        bases["qwen2"], steps=4, batch_size=8, learning_rate=1e-3, head_learning_rate=1e-3,
        query_prompt="query: ", **changes,
    )  # fmt: skip
    results, weights = {}, {}
    for layout in ("packed", "padded", "grouped")[: 2 if changes else 3]:
        encoder = encoder_of(bases["qwen2"], DESIGNS[name], query_prompt="query: ", **changes)
        if layout != "packed":
            monkeypatch.setattr(training, "choose", lambda *given, layout=layout: (layout, "asked for"))
        results[layout] = training.train(encoder, given, pairs(32), tmp_path / layout, seed=0)
        weights[layout] = torch.cat([p.detach().flatten() for p in encoder.parameters() if p.requires_grad])
        assert results[layout]["layout"] == layout
    assert results["packed"]["layout_reason"] is None
    assert results["padded"]["layout_reason"] == "asked for"
    for layout in results.keys() - {"packed"}:
        losses = [torch.tensor(list(results[which]["losses"].values())) for which in ("packed", layout)]
        assert len(losses[0]) == 4
        assert torch.allclose(*losses, rtol=1e-4)
        assert (weights["packed"] - weights[layout]).norm() < 1e-4 * weights[layout].norm()


def test_designs_beside_it_decide_too(bases: dict[str, str], tmp_path: Path) -> None:
    given = recipe(bases["llama"], steps=1, batch_size=4)
    beside = [Design(attention="bidirectional_last_1", pooling="mean")]
    result = training.train(
        encoder_of(bases["llama"], DESIGNS["m1"]), given, pairs(4), tmp_path, seed=0, designs=beside
    )
    assert result["layout"] == "grouped"
    assert "bidirectional_last_1" in result["layout_reason"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_varlen_attention_on_cuda(bases: dict[str, str]) -> None:
    """torch's varlen kernel against SDPA text by text, in bf16, and that it is the kernel in use."""
    encoder = encoder_of(bases["llama"], DESIGNS["mean"], dtype="bfloat16").to("cuda")
    batch = [{k: v.to("cuda") if torch.is_tensor(v) else v for k, v in f.items()} for f in features(encoder)]
    given = recipe(bases["llama"])
    padded = loss_and_gradient(encoder, given, "padded", batch)
    assert apart(loss_and_gradient(encoder, given, "packed", batch), padded) < 0.1
    assert packing._takes_varlen(torch.zeros(1, 4, 8, 64, device="cuda", dtype=torch.bfloat16), 0.0)
