"""The base model as it is on disk or on the Hub: its path, identity, configuration, tokenizer; and text templates."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poolwise.errors import DataError, ModelError
from poolwise.files import cached_if_unreachable, user_path
from poolwise.study.recipe import Recipe

CPU_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""What Linux calls the instructions that compute in bfloat16, on x86 and on Arm."""


def base_path(name: str, base_dir: Path | None = None, field: str = "recipe.base_model") -> str:
    """Where `recipe.base_model` (or another `field`) is loaded from: built-in, a folder, or a Hub name."""
    if name == "nano":
        from poolwise.demo import nano_path

        return str(nano_path())
    try:
        folder = user_path(name)
    except DataError as error:
        raise ModelError(f"{field}: {error}") from None
    for candidate in (folder, (base_dir or Path.cwd()) / folder):
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if (candidate / "config.json").is_file():
                return str(candidate.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{field} = {name!r}: no such model folder (one with a config.json)")
    return name


def base_identity(path: str, commit: str | None = None) -> str:
    """Identifies a base model by its Hub commit, or by a hash of its folder's configuration, tokenizer and weights.

    Of files beyond 64 MiB only the size and the first and last MiB are hashed, so that it takes no minutes.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{commit or 'unknown'}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in {".json", ".safetensors", ".bin", ".model"} or file.name == "generation_config.json":
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= 1 << 26:
                digest.update(stream.read())
            else:
                digest.update(stream.read(1 << 20))
                stream.seek(-(1 << 20), os.SEEK_END)
                digest.update(stream.read())
    return f"sha256:{digest.hexdigest()[:24]}"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a recipe's `dtype`; `auto` is bf16 on a GPU that computes in it, fp32 elsewhere."""
    if name == "auto":
        # older GPUs emulate bf16, slowly, and torch reports that as support unless asked not to
        computes = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if computes else torch.float32
    return cast(torch.dtype, getattr(torch, name))


@functools.cache
def cpu_bfloat16_gain() -> float:
    """How many times faster this CPU multiplies matrices in bfloat16 than in float32, measured once in about 50 ms; 1.0
    if its flags name no instructions for it (AVX512-BF16, AMX, or Arm's), where bfloat16 is emulated."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return 1.0
    if not flags & CPU_BFLOAT16:
        return 1.0
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        a @ b
        times = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    return best[torch.float32] / best[torch.bfloat16]


@contextlib.contextmanager
def restored_rng(model: nn.Module | None = None, seed: int | None = None) -> Iterator[None]:
    """Restores torch's random state at the end of the block: the CPU's, and that of the GPUs that `model` is on.

    seed: seeds the CPU's generator for the block. `torch.random.fork_rng` and `torch.manual_seed` are not used, because
    they ask for accelerators: that initialises CUDA, after which a forked process could not use it any more.
    """
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"} if model is not None else set()
    states = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}
    state = torch.get_rng_state()
    if seed is not None:
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for gpu, before in states.items():
            torch.cuda.set_rng_state(before, gpu)


def ensure_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer end every text with its EOS token, truncated texts included, and check that it does.

    Raises ModelError if the tokenizer has no EOS token or does not append it.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"recipe.append_eos = true: the tokenizer {type(tokenizer).__name__} has no EOS token; "
            "set append_eos = false (the last token is then the last word piece)"
        )
    if not _ends_with_eos(tokenizer):
        from tokenizers.processors import TemplateProcessing

        prefix = tokenizer("")["input_ids"]
        prefix = [i for i in prefix if i != tokenizer.eos_token_id]
        names = [tokenizer.convert_ids_to_tokens(i) for i in prefix]
        special = {tokenizer.eos_token: tokenizer.eos_token_id, **dict(zip(names, prefix, strict=True))}
        template = [*names, "$A", tokenizer.eos_token]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join(template),
            pair=" ".join([*template, "$B:1", f"{tokenizer.eos_token}:1"]),
            special_tokens=list(special.items()),
        )
    if not _ends_with_eos(tokenizer):
        raise ModelError(
            f"recipe.append_eos = true: the tokenizer {type(tokenizer).__name__} does not append "
            f"{tokenizer.eos_token!r}; set append_eos = false or give the model a tokenizer.json with a post-processor"
        )


def _ends_with_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    for text in ("a text", "a much longer text " * 20):
        ids = tokenizer(text, truncation=True, max_length=8)["input_ids"]
        if not ids or ids[-1] != tokenizer.eos_token_id or ids.count(tokenizer.eos_token_id) != 1:
            return False
    return True


def load_base(name: str, base_dir: Path | None = None, **options: Any) -> PreTrainedModel:
    """The base model without its language-model head. Raises ModelError if it cannot be loaded."""
    from transformers import AutoModel

    try:
        path = base_path(name, base_dir)
        with cached_if_unreachable(path):
            return cast(PreTrainedModel, AutoModel.from_pretrained(path, **options))
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("model", name, error) from error


def load_config(name: str, path: str) -> Any:
    """The configuration of the base model at `path`, named `name` in the study. Raises ModelError."""
    from transformers import AutoConfig

    try:
        with cached_if_unreachable(path):
            return AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError) as error:
        raise cannot_load("recipe.base_model", name, error) from error


def check_positions(recipe: Recipe, config: Any) -> None:
    """Raise ModelError if a length in training or evaluation exceeds the base model's number of positions."""
    limit = getattr(config, "max_position_embeddings", None)
    for name in ("max_length", "evaluation_max_length"):
        if limit and getattr(recipe, name) > limit:
            raise ModelError(
                f"recipe.{name} = {getattr(recipe, name)}: {recipe.base_model} has {limit} positions; give at most "
                f"{limit}"
            )


def cannot_load(field: str, name: str, error: Exception) -> ModelError:
    """The error for a base model that does not load, with the library's reason and the fix."""
    reason = str(error).strip().split("\n")[0]
    if "attention implementation" in reason:
        return ModelError(f"{field} = {name!r}: {reason.split('. ')[0]}; try recipe.attn_implementation = 'eager'")
    return ModelError(
        f"{field} = {name!r} cannot be loaded ({reason}); "
        "give 'nano' (built in), a model folder, or a name on the Hub that this machine can reach"
    )


class Form(NamedTuple):
    """The words of a template: before the text, between its two copies (None: one copy), after it, before each copy."""

    before: str
    between: str | None
    after: str
    space: str = ""


FORMS = {
    "prompteol": Form('This sentence : "', None, '" means in one word:"'),
    "echo": Form("Rewrite the sentence:", ", rewritten sentence:", "", " "),
}


def template_parts(
    template: str, prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int] | None, list[int], int, str]:
    """Ids before a text, between its two copies (None: one copy) and after it; the tokens left to each copy; and what
    is written in front of a copy before it is tokenised.

    Raises `ModelError` if prompt and template leave no token to the text.
    """
    form = FORMS[template]
    leading, trailing = special_frame(tokenizer)
    before = leading + _ids(tokenizer, prompt + form.before)
    between = None if form.between is None else _ids(tokenizer, form.between)
    after = _ids(tokenizer, form.after) + (trailing if between is not None else [])
    used = len(before) + len(between or ()) + len(after)
    room = (max_length - used) // (1 if between is None else 2)
    if room < 1:
        raise ModelError(
            f"recipe.max_length = {max_length} leaves no room for a text beside its prompt and template {template!r} "
            f"({used} tokens); give a larger max_length or a shorter prompt"
        )
    return before, between, after, room, form.space


def write(
    template: str, texts: Sequence[str], prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], int]:
    """Token ids of each text in its template, at most `max_length` each; and the number of tokens before the text.

    The text is cut, never the template. Raises `ModelError` if prompt and template leave no room for the text.
    """
    before, between, after, room, space = template_parts(template, prompt, tokenizer, max_length)
    rows = []
    for text in texts:
        copy = _ids(tokenizer, space + text)[:room]
        rows.append([*before, *copy, *([] if between is None else [*between, *copy]), *after])
    return rows, len(before)


def pooled_from(template: str, real: Tensor, prefix: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """How many tokens of each text (B, 1) come before those that are pooled: all before echo's second copy, else none.

    real, prefix: (B, 1), the number of tokens of a text in its template, and of those before the text (see `write`).
    """
    between = FORMS[template].between
    if between is None:
        return prefix * 0
    end = len(special_frame(tokenizer)[1])
    copy = (real - prefix - len(_ids(tokenizer, between)) - end) // 2
    return real - copy - end


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer adds before and after every text: BOS, EOS, or none."""
    whole, bare = list(tokenizer("a")["input_ids"]), _ids(tokenizer, "a")
    start = next(i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
