"""Matryoshka widths and guided negatives: what the recipe says is what sentence-transformers' losses compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from poolwise.errors import ModelError, StudyError
from poolwise.model.encoder import build
from poolwise.runs.prepare import Trial, base_config, check_base, prepare
from poolwise.runs.train import _loss, train
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from tiny import tiny_folder

QUERIES = ["where is the heron?", "how long is the ferry?", "what is pooling?", "where is the heron now?"]
POSITIVES = ["in the shallow water", "it takes forty minutes", "the second choice", "it waits for a fish"]
NEGATIVES = ["in a tree", "it is a small model", "query: which tokens", "in calm weather"]
COLUMNS = {"query": QUERIES, "positive": POSITIVES, "negative_1": NEGATIVES}
MEAN = Design(name="mean", attention="bidirectional", pooling="mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random base models, `llama` to train and `qwen2` to guide."""
    folder = tmp_path_factory.mktemp("losses")
    for family in ("llama", "qwen2"):
        tiny_folder(folder, family)
    return folder


def recipe(folder: Path, **changes: object) -> Recipe:
    small = {
        "batch_size": 4,
        "steps": 2,
        "warmup_steps": 0,
        "max_length": 32,
        "learning_rate": 1e-3,
        "lora": {"dropout": 0.0},
    }
    return Recipe.model_validate({"base_model": str(folder / "llama"), **small, **changes})


def embeddings(encoder: SentenceTransformer) -> list[torch.Tensor]:
    return [encoder.encode(texts, convert_to_tensor=True).float() for texts in COLUMNS.values()]


def infonce(vectors: list[torch.Tensor], temperature: float, keep: torch.Tensor | None = None) -> torch.Tensor:
    """InfoNCE as the formula has it: −log softmax over the cosines of a query to all documents, `keep` of them."""
    query, documents = F.normalize(vectors[0], dim=-1), F.normalize(torch.cat(vectors[1:]), dim=-1)
    logits = query @ documents.T / temperature
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    return (torch.logsumexp(logits, 1) - logits.diagonal()).mean()


def value(encoder: SentenceTransformer, recipe: Recipe) -> torch.Tensor:
    features = [encoder.preprocess(texts) for texts in COLUMNS.values()]
    loss = _loss(encoder.train(), recipe, gather=False)(features, torch.arange(4))
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


@pytest.mark.parametrize("mini_batch_size", [0, 2])
def test_matryoshka_sums_the_loss_of_each_width(folder: Path, mini_batch_size: int) -> None:
    wanted = recipe(folder, matryoshka=[8, 16], mini_batch_size=mini_batch_size)
    encoder = build(wanted, MEAN, 0)
    vectors = embeddings(encoder)
    expected = sum(infonce([v[:, :width] for v in vectors], 0.05) for width in (8, 16, 32))
    torch.testing.assert_close(value(encoder, wanted), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mini_batch_size", [0, 2])
@pytest.mark.parametrize("margin", [0.0, 0.05, -3.0])
def test_a_guide_drops_what_it_finds_closer_than_the_positive(
    folder: Path, margin: float, mini_batch_size: int
) -> None:
    """Kept: the positive, and each document whose cosine to the query, in the guide's eyes, is at most the positive's
    less the margin; −3 keeps all, which is plain InfoNCE."""
    guide = str(folder / "qwen2")
    wanted = recipe(folder, guide=guide, guide_margin=margin, mini_batch_size=mini_batch_size)
    encoder = build(wanted, MEAN, 0)
    seen = [v / v.norm(dim=-1, keepdim=True) for v in embeddings(SentenceTransformer(guide))]
    cosines = seen[0] @ torch.cat(seen[1:]).T
    keep = cosines <= cosines.diagonal()[:, None] - margin
    keep[torch.arange(4), torch.arange(4)] = True
    assert keep.all() == (margin == -3.0)
    vectors = embeddings(encoder)
    torch.testing.assert_close(value(encoder, wanted), infonce(vectors, 0.05, keep), atol=1e-4, rtol=1e-4)
    if margin == -3.0:
        torch.testing.assert_close(infonce(vectors, 0.05, keep), infonce(vectors, 0.05))


def test_only_the_encoder_is_trained(folder: Path, tmp_path: Path) -> None:
    """Law 5 with a guide and widths: the guide stays as it was, every trainable tensor of the encoder moves."""
    wanted = recipe(folder, guide=str(folder / "qwen2"), guide_margin=-3.0, matryoshka=[8])
    design = Design(name="cross", attention="causal", pooling="cross_attention")
    encoder = build(wanted, design, 0)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    result = train(encoder, wanted, Dataset.from_dict({k: v * 2 for k, v in COLUMNS.items()}), tmp_path, seed=0)
    assert len(result["losses"]) == 2
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_options_that_are_not_used_leave_trials_as_they_were(folder: Path) -> None:
    def made(**changes: object) -> list[Trial]:
        raw = {"base_model": "./llama", "steps": 2, "batch_size": 4, "max_length": 32, **changes}
        study = {"name": "s", "designs": [{"preset": "m1"}], "recipe": raw, "references": [], "seeds": 1}
        return prepare(Study.parse(study, base_dir=folder)).trials

    plain = made(matryoshka=[])
    assert not {"matryoshka", "guide", "guide_margin"} & plain[0].spec["recipe"].keys()
    others = ({}, {"matryoshka": [8]}, {"guide": "./qwen2"}, {"guide": "./llama"})
    assert len({trial.id for other in others for trial in made(**other)}) == 4 * len(plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guide": "g", "negatives": 2}, "at most one hard negative"),
        ({"guide": "g", "loss": "symmetric_infonce"}, "a guide filters infonce only"),
        ({"guide_margin": 0.1}, "name a guide"),
        ({"matryoshka": [8, 8]}, "give each width once"),
        ({"matryoshka": [0]}, "recipe.matryoshka"),
    ],
)
def test_mistakes(changes: dict[str, object], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        Study.parse({"name": "s", "designs": [{"preset": "m1"}], "recipe": changes})


def test_a_width_beyond_the_model_is_refused(folder: Path) -> None:
    raw = {
        "name": "s",
        "designs": [{"preset": "m1"}],
        "recipe": {"base_model": "./llama", "max_length": 32, "matryoshka": [8, 32]},
    }
    study = Study.parse(raw, base_dir=folder)
    with pytest.raises(ModelError, match="32 must be below 32"):
        check_base(study, *base_config(study))
