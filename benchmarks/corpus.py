"""What the encoding benchmarks share: a Qwen2-shaped model of random weights, texts of given numbers of tokens, and the
same model as poolwise and as sentence-transformers load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from benchmarks.train import LONGEST, _base
from poolwise.model.encoder import build
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe

WORDS = "time year people way day man thing woman life child world school state family student group country problem"
CHOSEN = WORDS.split()


class Corpus:
    """Texts of lognormal length (mean 40 tokens, median 24, at most 512), made of words of one token each."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: str,
        pooling: dict[str, Any] | None = None,
        sizes: dict[str, int] | None = None,
    ):
        self.base, self.vocabulary = _base(folder, sizes)
        self.recipe = Recipe(base_model=str(self.base), dtype=dtype, max_length=LONGEST, lora=False)  # type: ignore[arg-type]
        design = Design.model_validate({"name": "d", **(pooling or {"preset": "m1"})})
        self.encoder = build(self.recipe, design, 0, device=device).eval()
        self.tokenizer = self.encoder[0].words
        self.words = [w for w in CHOSEN if len(self.tokenizer(" " + w, add_special_tokens=False)["input_ids"]) == 1]
        self.random = np.random.default_rng(0)
        extra = len(self.tokenizer("")["input_ids"])
        self.special = extra

    def text(self, tokens: int) -> str:
        """A text of so many tokens, those that the tokenizer adds included; its ids are asserted."""
        text = "".join(f" {word}" for word in self.random.choice(self.words, max(1, tokens - self.special)))
        ids = self.tokenizer(text)["input_ids"]
        assert len(ids) == max(tokens, self.special + 1), f"{len(ids)} tokens instead of {tokens}"
        assert tokens < 12 or len(set(ids)) > 3, "a tokenizer that knows no words"
        return text

    def lengths(self, count: int) -> np.ndarray:
        """(count,) numbers of tokens."""
        spread = np.sqrt(2 * np.log(40 / 24))
        return np.clip(np.exp(self.random.normal(np.log(24), spread, count)).round(), 3, LONGEST).astype(int)

    def peer(self) -> SentenceTransformer:
        """The same weights under sentence-transformers' own modules: last token, its own padding and batches."""
        self.tokenizer.save_pretrained(self.base)  # the one that ends each text with EOS
        plain = Transformer(str(self.base), max_seq_length=LONGEST)
        plain.model = self.encoder[0].model
        sample = self.text(20)
        assert plain.tokenizer(sample)["input_ids"] == self.tokenizer(sample)["input_ids"], "other token ids"
        modules = [plain, Pooling(self.encoder[0].model.config.hidden_size, "lasttoken"), Normalize()]
        return SentenceTransformer(modules=modules, device=str(self.encoder.device)).eval()


def one_by_one(encoder: SentenceTransformer, texts: Sequence[str], prompt: str = "") -> torch.Tensor:
    """(N, D) embeddings of batches of one: what every batch must agree with."""
    return torch.stack([torch.from_numpy(encoder.encode(text, prompt=prompt)) for text in texts])
