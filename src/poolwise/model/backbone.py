"""The decoder inside an encoder: attention mode, layout of batches, states, per-layer vectors, cache of frozen states.

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
from poolwise.model.hooks import LayerCollector, attending, base_model, lock_of, zero_at_padding
from poolwise.model.packing import Rows, forward_grouped, forward_packed, has_dropout, packed_attention_on

DIFFERENT = ("a", "The", "zebra", "7", '"', "(")
"""Texts that share no first token, so that what they share after a prompt belongs to the prompt."""
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class Backbone(Transformer):
    """A decoder with a declared attention mode: states of tokens and, if collected, one vector per layer.

    Position ids always come from the mask, so that the padding side does not matter.

    Args:
        attention: a mode of `catalogue.ATTENTIONS`.
        collect: `last` or `mean`, how a layer's tokens become its vector; None collects no vectors.
        include_prompt: False leaves the prompt out of pooling.
        pad_by_id: the id of the padding token decides what is pooled, as in the paper's code, instead of the mask.
        skip_start: number of tokens at the start that are never pooled (BOS).
        special_tokens: False leaves BOS, EOS and the like out of pooling.
        template: what texts are written into, see `model.base.FORMS`.
    """

    __module__ = "poolwise"  # stored in exported folders: must stay importable wherever the class moves
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
        self.pools_padding = False  # see `pooling_padding`
        self.frozen: FrozenStates | None = None
        set_attention(self.model, attention)
        self.collector = LayerCollector(self.model, reduce=collect) if collect else None

    @classmethod
    def of(cls, loaded: Transformer, attention: str) -> Backbone:
        """A backbone around the model and the tokenizer of `loaded`, which is not changed.

        `attention` is not set: it must be the mode that the model already has.
        """
        backbone = cls.__new__(cls)  # __init__ would load the model a second time
        backbone.__dict__.update(vars(loaded), _modules=dict(loaded._modules), _prompt_length_mapping={})
        backbone.unpad_inputs = False
        backbone.attention, backbone.collect, backbone.collector, backbone.frozen = attention, None, None, None
        backbone.include_prompt, backbone.pad_by_id, backbone.skip_start = True, False, 0
        backbone.special_tokens, backbone.template = True, "plain"
        backbone.layout, backbone.once, backbone.pools_padding = "padded", False, False
        backbone.takes_position_ids = takes_position_ids(backbone.model)
        return backbone

    @property
    def words(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which every text model has."""
        return cast(PreTrainedTokenizerBase, self.tokenizer)

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Held during a forward and its setup, because the hooks serve one batch at a time.

        Encoders that share the decoder share the lock.
        """
        return lock_of(base_model(self.model))

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Texts to `input_ids` and `attention_mask` (B, T), each written into the template after its prompt."""
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
        pooled = torch.ones_like(mask) if self.pools_padding else self.pooling_mask(features)
        prefix = self._prompt_tokens(features).expand(len(mask), 1)
        # only states of real tokens are cached, so padding that is pooled needs a forward
        run = self._forward if self.frozen is None or self.pools_padding else self._known_or_forward
        zeroed = zero_at_padding(self.model, mask) if self.pools_padding else contextlib.nullcontext()
        with self.lock, zeroed:
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
        """States and, if collected, vectors of a batch in the current layout; arguments as in `_forward_padded`."""
        if self.layout == "packed":
            return forward_packed(self.model, self.collector, Rows(ids, mask, pooled), once=self.once)
        if self.layout == "grouped":
            return forward_grouped(self._forward_padded, Rows(ids, mask, pooled), prefix)
        return self._forward_padded(ids, mask, pooled, prefix)

    def _known_or_forward(
        self, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor, prefix: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The same from the cache of a frozen base; only new texts are run through it.

        Where layers are pooled, the states of tokens are not cached and None is returned for them.
        """
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
            inputs["attention_mask"] = None  # no real token attends to the padding on its right
            if self.takes_position_ids:  # transformers takes gaps for the borders of packed texts
                inputs["position_ids"] = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        if self.collector is None:
            with attending(self.model, mask, prefix):
                return self.model(**inputs).last_hidden_state, None
        with attending(self.model, mask, prefix), self.collector.collect(mask, pooled):
            states = self.model(**inputs).last_hidden_state
            return states, self.collector.vectors(states)

    @contextlib.contextmanager
    def in_layout(self, layout: str) -> Iterator[None]:
        """Run forwards in one of the layouts of `model.packing`: padded, grouped, packed.

        Or in layout `right`: for batches padded on the right, which need no mask under causal attention.
        """
        before = self.layout, self.once
        with packed_attention_on(self.model) if layout == "packed" else contextlib.nullcontext():
            self.layout, self.once = layout, not has_dropout(self.model)
            try:
                yield
            finally:
                self.layout, self.once = before

    @contextlib.contextmanager
    def pooling_padding(self) -> Iterator[None]:
        """Inside, padding is pooled like any token, and attention's output is zero there: what the paper's evaluation
        computes for `masked = false`. An embedding then depends on how much padding its batch needs."""
        self.pools_padding = True
        try:
            yield
        finally:
            self.pools_padding = False

    def pooling_mask(self, features: dict[str, Any]) -> torch.Tensor:
        """Which tokens are pooled (B, T): all real ones, less those that the recipe, template or design leave out."""
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
        # a prompt that fills max_length leaves no text to pool: then pool all tokens rather than none
        return torch.where(content.any(1, keepdim=True), content, mask)

    def _prompt_tokens(self, features: dict[str, Any]) -> torch.Tensor:
        """How many tokens come before the text: (1, 1), or (B, 1) if the texts of a batch have different prompts."""
        length = features.get("prompt_length")
        if length is None:
            with lock_of(self.words):
                length = 0 if self.template == "plain" else write(self.template, (), "", self.words, 10**6)[1]
        return torch.as_tensor(length, device=features["attention_mask"].device).reshape(-1, 1)

    def _get_prompt_length(self, prompt: str, **kwargs: Any) -> int | None:
        """Number of tokens of the prompt whatever text follows (a trailing space may merge with the next word)."""
        if prompt not in self._prompt_length_mapping:
            ids = [self.words(prompt + text)["input_ids"] for text in DIFFERENT]
            shared = 0
            while all(len(row) > shared and row[shared] == ids[0][shared] for row in ids):
                shared += 1
            self._prompt_length_mapping[prompt] = shared
        return self._prompt_length_mapping[prompt]


CAPACITY = 2 << 30
"""Bytes of states kept at most, in memory and in the folder's files; further texts are run through the base."""
PIECE = 64 << 20
"""Bytes of new states that a process holds in its own memory before it writes them to a file and maps that."""
FAILURES = (OSError, SafetensorError)


@dataclass
class FrozenStates:
    """A cache of what a frozen decoder computes for each text, shared between trials through files in `folder`.

    `asked` and `computed` count texts, `size` the bytes of the states in the cache. An invalid file is ignored, and if
    files cannot be written, states are recomputed: the cache can only cost time, never change a result.
    """

    folder: Path | None = None
    capacity: int = CAPACITY
    asked: int = 0
    computed: int = 0
    size: int = 0
    known: dict[bytes, Tensor] = field(default_factory=dict)
    new: dict[bytes, Tensor] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._map_new_files()

    def states(self, keys: list[bytes], compute: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """The states (N, D) of each text; `compute` gets the numbers of those that are not known, each once."""
        self.asked += len(keys)
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        missing = [row for key, row in first.items() if key not in self.known]
        computed: dict[bytes, Tensor] = {}
        if missing:
            self.computed += len(missing)
            for row, states in zip(missing, compute(missing), strict=True):
                key = keys[row]
                computed[key] = states.detach().float().cpu().clone()
                if self.size + computed[key].nbytes <= self.capacity:
                    self.known[key] = self.new[key] = computed[key]
                    self.size += computed[key].nbytes
            if self.folder is not None and _bytes(self.new) >= PIECE:
                self.share()
        return [computed[key] if key in computed else self.known[key] for key in keys]

    def share(self) -> None:
        """Write the new states to the folder for other trials and map that file; stop sharing if that fails."""
        if self.folder is None:
            return
        self._map_new_files()  # another trial may have written the same texts meanwhile
        if not self.new:
            return
        if _write(self.new, self.folder, self.capacity):
            self._map_new_files()
        else:  # no room: continue with the states in memory, without letting them grow
            self.folder, self.capacity = None, self.size

    def _map_new_files(self) -> None:
        """Map the files that have appeared in the folder, as far as they fit."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.seen) if self.folder else ():
            self.seen.add(path)
            try:
                content = _read(path)
            except (*FAILURES, ValueError, TypeError, RuntimeError):  # invalid: its texts are computed again
                continue
            added = {key: states for key, states in content.items() if key not in self.known}
            if self.size + _bytes(added) > self.capacity:
                continue
            self.size += _bytes(added)
            self.known |= added
            for key in self.new.keys() & content.keys():  # frees this process's own copy
                self.known[key] = content[key]
                del self.new[key]


def _bytes(states: dict[bytes, Tensor]) -> int:
    return sum(part.nbytes for part in states.values())


def _digest(keys: Tensor, lengths: Tensor, states: Tensor) -> str:
    digest = hashlib.sha256()
    for part in (keys, lengths, states):
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())  # a file's header is not covered by its bytes
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def _write(new: dict[bytes, Tensor], folder: Path, capacity: int) -> bool:
    """Write one file of states, a copy of which `PIECE` bounds the size; False if there is no room or it fails."""
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
    except FAILURES:  # e.g. a full disk
        return False
    return True


def _read(path: Path) -> dict[bytes, Tensor]:
    """The states in a file, mapped. Raises one of several errors if the file is not what was written."""
    with safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name) for name in ("keys", "lengths", "states")}
        expected = (file.metadata() or {}).get("sha256")
    if _digest(**content) != expected:
        raise ValueError(f"{path}: its checksum differs")
    parts = content["states"].split(content["lengths"].tolist())
    return {key.tobytes(): part for key, part in zip(content["keys"].numpy(), parts, strict=True)}
