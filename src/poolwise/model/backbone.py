"""The decoder inside an encoder: its attention declared, probed and stored, its batches laid out, its states handed on.

Shapes: (B, T, D) tokens of the last layer, (B, L, D) one vector per layer.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers.base.modules import Transformer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from poolwise.files import atomic_path
from poolwise.model.attention import position_ids, set_attention, takes_position_ids
from poolwise.model.base import pooled_from, write
from poolwise.model.hooks import LayerCollector, attending, base_model, lock_of
from poolwise.model.packing import Rows, forward_grouped, forward_packed, has_dropout, packed_attention_on

DIFFERENT = ("a", "The", "zebra", "7", '"', "(")
"""Texts that share no first token: what they have in common after a prompt is the prompt's alone."""
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class Backbone(Transformer):
    """A decoder whose attention is declared, probed and stored: token states, and one vector per layer if asked.

    `attention`: a mode of `catalogue.ATTENTIONS`. `collect`: None, `last` or `mean`; what stands for each
    layer's tokens. `include_prompt`: False leaves the prompt out of pooling, `special_tokens`: False leaves out
    BOS, EOS and the like, `skip_start` so many tokens at the start (BOS). `pad_by_id`: the padding token's id decides
    what is pooled, as in the paper's code, instead of the mask. `template`: what texts are written into, see `inputs`.
    Position ids always come from the mask, so the side of the padding does not matter.
    """

    config_keys = [  # noqa: RUF012 (as in the parent)
        *Transformer.config_keys,
        "attention",
        "collect",
        "include_prompt",
        "pad_by_id",
        "skip_start",
        "special_tokens",
        "template",
    ]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        attention: str = "causal",
        collect: str | None = None,
        include_prompt: bool = True,
        pad_by_id: bool = False,
        skip_start: int = 0,
        special_tokens: bool = True,
        template: str = "plain",
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("modality_config", TEXT)
        kwargs.setdefault("module_output_name", "token_embeddings")
        kwargs["unpad_inputs"] = False
        super().__init__(model_name_or_path, **kwargs)
        self.attention = attention
        self.collect = collect
        self.include_prompt = include_prompt
        self.pad_by_id = pad_by_id
        self.skip_start = skip_start
        self.special_tokens = special_tokens
        self.template = template
        self.model.config.use_cache = False
        self.takes_position_ids = takes_position_ids(self.model)
        self.layout, self.once = "padded", False  # see `in_layout`
        self.frozen: FrozenStates | None = None
        set_attention(self.model, attention)
        self.collector = LayerCollector(self.model, reduce=collect) if collect else None

    @classmethod
    def of(cls, loaded: Transformer, attention: str) -> Backbone:
        """A backbone around the model and the tokenizer of `loaded`, which stays as it is. The attention is not set:
        it must be the one that the model has."""
        own = cls.__new__(cls)
        own.__dict__.update(vars(loaded), _modules=dict(loaded._modules), _prompt_length_mapping={})
        own.unpad_inputs = False
        own.attention, own.collect, own.collector, own.frozen = attention, None, None, None
        own.include_prompt, own.pad_by_id, own.skip_start, own.special_tokens = True, False, 0, True
        own.template, own.layout, own.once = "plain", "padded", False
        own.takes_position_ids = takes_position_ids(own.model)
        return own

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which every text model has."""
        return cast(PreTrainedTokenizerBase, self.tokenizer)

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """To hold around a forward and what is set up for it: layers are hooked for one batch at a time. What shares
        the decoder shares the lock."""
        return lock_of(base_model(self.model))

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Texts to `input_ids` and `attention_mask` (B, T), written into the template after their prompt."""
        with lock_of(self.words):
            if self.template == "plain":
                return super().preprocess(inputs, prompt=prompt, **kwargs)
            limit = int(self.max_seq_length or self.words.model_max_length)
            rows, before = write(self.template, [str(text) for text in inputs], prompt or "", self.words, limit)
            batch = self.words.pad({"input_ids": rows}, return_tensors="pt")
        return {**batch, "modality": "text", "prompt_length": before}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `token_embeddings` (B, T, D), `pooling_mask` (B, T) and, if collected, `layer_embeddings` (B, L, D)."""
        mask = features["attention_mask"]
        pooled = self._pooling_mask(features)
        prefix = self._prompt_tokens(features).expand(len(mask), 1)
        run = self._forward if self.frozen is None else self._known_or_forward
        with self.lock:
            states, vectors = run(features["input_ids"], mask, pooled, prefix)
        if vectors is not None:
            features["layer_embeddings"] = vectors
        if states is not None:
            features["token_embeddings"] = states
        features["pooling_mask"] = pooled
        return features

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor, prefix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States and, if collected, vectors of a batch in the layout that is set; arguments as in `_forward_padded`."""
        if self.layout == "packed":
            return forward_packed(self.model, self.collector, Rows(ids, mask, pooled), once=self.once)
        if self.layout == "grouped":
            return forward_grouped(self._forward_padded, Rows(ids, mask, pooled), prefix)
        return self._forward_padded(ids, mask, pooled, prefix)

    def _known_or_forward(
        self, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor, prefix: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The same from the states that are kept of a frozen base, and forwards of the texts that are new; without the
        token states where layers are pooled."""
        assert self.frozen is not None
        real = mask.bool()
        keys = [
            hashlib.sha256(
                ids[row][real[row]].cpu().numpy().tobytes()
                + pooled[row][real[row]].cpu().bool().numpy().tobytes()
                + str(int(prefix[row])).encode()
            ).digest()
            for row in range(len(ids))
        ]

        def compute(rows: list[int]) -> list[torch.Tensor]:
            chosen = torch.tensor(rows, device=ids.device)
            with torch.no_grad():
                states, vectors = self._forward(ids[chosen], mask[chosen], pooled[chosen], prefix[chosen])
            return (
                [part[real[row]] for part, row in zip(states, rows, strict=True)] if vectors is None else list(vectors)
            )

        found = [states.to(ids.device) for states in self.frozen.states(keys, compute)]
        if self.collector is not None:
            return None, torch.stack(found)
        padded = found[0].new_zeros(*mask.shape, found[0].shape[-1])
        padded[real] = torch.cat(found)
        return padded, None

    def _forward_padded(
        self, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor, prefix: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States (B, T, D) and, if collected, vectors (B, L, D) of one padded batch.

        ids, mask, pooled: (B, T). prefix (B, 1): how many tokens of each text are its prompt.
        """
        inputs = {"input_ids": ids, "attention_mask": mask, "return_dict": True}
        if self.takes_position_ids:
            inputs["position_ids"] = position_ids(mask)
        if self.layout == "right" and (self.attention == "causal" or bool(mask.all())):
            inputs["attention_mask"] = None  # what stands on the right is seen by no real token
            if self.takes_position_ids:  # gaps in them would be taken for several texts in a row
                inputs["position_ids"] = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        if self.collector is None:
            with attending(self.model, mask, prefix):
                return self.model(**inputs).last_hidden_state, None
        with attending(self.model, mask, prefix), self.collector.collect(mask, pooled):
            states = self.model(**inputs).last_hidden_state
            return states, self.collector.vectors(states)

    @contextlib.contextmanager
    def in_layout(self, layout: str) -> Iterator[None]:
        """Inside, forwards run in one of the layouts of `decoder.packing`; or in layout `right`, for batches that come
        padded on the right and need no mask where attention is causal."""
        before = self.layout, self.once
        with packed_attention_on(self.model) if layout == "packed" else contextlib.nullcontext():
            self.layout, self.once = layout, not has_dropout(self.model)
            try:
                yield
            finally:
                self.layout, self.once = before

    def _pooling_mask(self, features: dict[str, Any]) -> torch.Tensor:
        """Which tokens are pooled (B, T): the attended ones, less the prompt's where the recipe excludes it, less what
        template and design leave out."""
        mask = features["attention_mask"]
        if self.pad_by_id:  # the paper's code: whatever has the padding token's id counts as padding
            mask = (features["input_ids"] != self.words.pad_token_id).to(mask.dtype)
        before = self._prompt_tokens(features)
        start = (before * (not self.include_prompt)).clamp(min=self.skip_start)
        if self.template != "plain":
            with lock_of(self.words):
                start = start.maximum(pooled_from(self.template, mask.sum(1, keepdim=True), before, self.words))
        if self.special_tokens and not start.any():
            return mask
        content = mask * (mask.cumsum(1) > start)
        if not self.special_tokens:
            special = torch.tensor(self.words.all_special_ids, device=mask.device)
            content = content * ~torch.isin(features["input_ids"], special)
        # a text that the prompt fills to the limit keeps its last token: an embedding of nothing helps nobody
        return torch.where(content.any(1, keepdim=True), content, mask)

    def _prompt_tokens(self, features: dict[str, Any]) -> torch.Tensor:
        """How many tokens stand before the text: (1, 1), or (B, 1) where texts of several prompts come together."""
        length = features.get("prompt_length")
        if length is None:
            with lock_of(self.words):
                length = 0 if self.template == "plain" else write(self.template, (), "", self.words, 10**6)[1]
        return torch.as_tensor(length, device=features["attention_mask"].device).reshape(-1, 1)

    def _get_prompt_length(self, prompt: str, **kwargs: Any) -> int | None:
        """Tokens that belong to the prompt whatever follows it (a trailing space may merge with the next word)."""
        if prompt not in self._prompt_length_mapping:
            ids = [self.words(prompt + text)["input_ids"] for text in DIFFERENT]
            shared = 0
            while all(len(row) > shared and row[shared] == ids[0][shared] for row in ids):
                shared += 1
            self._prompt_length_mapping[prompt] = shared
        return self._prompt_length_mapping[prompt]


CAPACITY = 2 << 30
"""Bytes of states used at most, and of files in the folder; texts beyond that are run through the base again."""
PIECE = 64 << 20
"""Bytes of new states held in a process's own memory before they are written and mapped."""
FAILURES = (OSError, SafetensorError)


@dataclass
class FrozenStates:
    """What a frozen decoder made of each text. `asked` and `computed` count texts, `size` bytes of states."""

    folder: Path | None = None
    capacity: int = CAPACITY
    asked: int = 0
    computed: int = 0
    size: int = 0
    known: dict[bytes, Tensor] = field(default_factory=dict)
    new: dict[bytes, Tensor] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._find()

    def states(self, keys: list[bytes], compute: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """The states (N, D) of each text; `compute` gets the numbers of those that are not known, each once."""
        self.asked += len(keys)
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        missing = [row for key, row in first.items() if key not in self.known]
        found: dict[bytes, Tensor] = {}
        if missing:
            self.computed += len(missing)
            for row, made in zip(missing, compute(missing), strict=True):
                found[keys[row]] = made.detach().float().cpu().clone()
                if self.size + found[keys[row]].nbytes <= self.capacity:
                    self.known[keys[row]] = self.new[keys[row]] = found[keys[row]]
                    self.size += found[keys[row]].nbytes
            if self.folder is not None and _bytes(self.new) >= PIECE:
                self.leave()
        return [found[key] if key in found else self.known[key] for key in keys]

    def leave(self) -> None:
        """Write what is new to the folder, for other trials, and map it; where that fails, it is not shared."""
        if self.folder is None:
            return
        self._find()  # what another trial has left meanwhile need not be there twice
        if not self.new:
            return
        if _write(self.new, self.folder, self.capacity):
            self._find()
        else:  # no room: go on with what is here
            self.folder, self.capacity = None, self.size

    def _find(self) -> None:
        """Map the files that have come into the folder, as far as they fit."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.seen) if self.folder else ():
            self.seen.add(path)
            try:
                found = _read(path)
            except (*FAILURES, ValueError, TypeError, RuntimeError):  # its texts are computed again
                continue
            added = {key: states for key, states in found.items() if key not in self.known}
            if self.size + _bytes(added) > self.capacity:
                continue
            self.size += _bytes(added)
            self.known |= added
            for key in self.new.keys() & found.keys():
                self.known[key] = found[key]
                del self.new[key]


def _bytes(states: dict[bytes, Tensor]) -> int:
    return sum(part.nbytes for part in states.values())


def _digest(keys: Tensor, lengths: Tensor, states: Tensor) -> str:
    digest = hashlib.sha256()
    for part in (keys, lengths, states):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def _write(new: dict[bytes, Tensor], folder: Path, capacity: int) -> bool:
    """Write one file of states, if there is room for it; whether that went well. Copies them, which `PIECE` bounds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if sum(path.stat().st_size for path in folder.glob("*.safetensors")) + _bytes(new) > capacity:
            return False
        content = {
            "keys": torch.from_numpy(np.stack([np.frombuffer(key, dtype=np.uint8) for key in new])),
            "lengths": torch.tensor([len(states) for states in new.values()]),
            "states": torch.cat(list(new.values())),
        }
        # not flushed to disk: a reader checks the hash and computes what is damaged again
        with atomic_path(folder / f"{secrets.token_hex(8)}.safetensors", durable=False) as temporary:
            save_file(content, str(temporary), {"sha256": _digest(**content)})
    except FAILURES:  # a full disk, say
        return False
    return True


def _read(path: Path) -> dict[bytes, Tensor]:
    """The states that a file holds, mapped. Raises one of several errors where it is not what was written."""
    with safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name) for name in ("keys", "lengths", "states")}
        expected = (file.metadata() or {}).get("sha256")
    if _digest(**content) != expected:
        raise ValueError(f"{path}: its checksum differs")
    parts = content["states"].split(content["lengths"].tolist())
    return {key.tobytes(): part for key, part in zip(content["keys"].numpy(), parts, strict=True)}
