"""What the encoding benchmarks share: a model of random weights, texts of given numbers of tokens, and the same model
as poolwise and as sentence-transformers load it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer, PretrainedConfig

from benchmarks.train import LONGEST, _base
from poolwise.demo import nano_path
from poolwise.model.encoder import build
from poolwise.study.design import Design
from poolwise.study.recipe import Recipe

WORDS = "time year people way day man thing woman life child world school state family student group country problem"
CHOSEN = WORDS.split()


class Corpus:
    """Texts of lognormal length (mean 40 tokens, median 24, at most 512), made of words of one token each.

    `base`: a folder with a model and its tokenizer, if there is one already. `many`: take the words from the whole
    vocabulary, so that no two long texts are alike.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: str,
        pooling: dict[str, Any] | None = None,
        sizes: dict[str, int] | None = None,
        *,
        base: Path | None = None,
        many: bool = False,
    ):
        self.base = base or _base(folder, sizes)[0]
        self.recipe = Recipe(base_model=str(self.base), dtype=dtype, max_length=LONGEST, lora=False)  # type: ignore[arg-type]
        design = Design.model_validate({"name": "d", **(pooling or {"preset": "m1"})})
        self.encoder = build(self.recipe, design, 0, device=device).eval()
        self.tokenizer = self.encoder[0].words
        words = CHOSEN
        if many:
            tokens = (self.tokenizer.decode([number]) for number in range(len(self.tokenizer)))
            words = [token[1:] for token in tokens if token[:1] == " " and token[1:].isalpha()]
        ids = self.tokenizer([" " + word for word in words], add_special_tokens=False)["input_ids"]
        self.words = [word for word, row in zip(words, ids, strict=True) if len(row) == 1]
        self.random = np.random.default_rng(0)
        self.special = len(self.tokenizer("")["input_ids"])

    def text(self, tokens: int) -> str:
        """A text of so many tokens, those that the tokenizer adds included; its ids are asserted."""
        return self.texts([tokens])[0]

    def texts(self, lengths: Sequence[int] | np.ndarray, *, different: bool = False) -> list[str]:
        """Texts of so many tokens each, asserted. `different`: no text twice, for ours would encode it once."""
        texts, seen = [], set[str]()
        for tokens in lengths:
            text = ""
            while not text or (different and text in seen):
                text = "".join(f" {word}" for word in self.random.choice(self.words, max(1, tokens - self.special)))
            seen.add(text)
            texts.append(text)
        for ids, tokens in zip(self.tokenizer(texts)["input_ids"], lengths, strict=True):
            assert len(ids) == max(tokens, self.special + 1), f"{len(ids)} tokens instead of {tokens}"
            assert tokens < 12 or len(set(ids)) > 3, "a tokenizer that knows no words"
        return texts

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


def write_base(folder: Path, config: PretrainedConfig) -> Path:
    """A folder with the built-in tokenizer and a configuration, without weights: for `made_on`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in nano_path().glob("*token*"):
        shutil.copy(file, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config.max_position_embeddings = LONGEST
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def made_on(device: str) -> Iterator[None]:
    """Inside, models are made on the device from their configuration, with random weights: no file of weights is
    written or read, which takes longer than the benchmark for a model of 7 billion."""

    def made(path: Any, *_: Any, config: Any, dtype: Any = None, attn_implementation: Any = None, **__: Any) -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModel.from_config(config, dtype=dtype, attn_implementation=attn_implementation)

    with patch.object(AutoModel, "from_pretrained", made):
        yield


def one_by_one(encoder: SentenceTransformer, texts: Sequence[str], prompt: str = "") -> torch.Tensor:
    """(N, D) embeddings of batches of one: what every batch must agree with."""
    return torch.stack([torch.from_numpy(encoder.encode(text, prompt=prompt)) for text in texts])
