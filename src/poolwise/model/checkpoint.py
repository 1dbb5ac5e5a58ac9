"""A trained encoder on disk: saved to be loaded by poolwise, or exported for anyone.

    FOLDER/run.json               recipe, design with every size resolved, seed, base model, hash of each file; sealed
    FOLDER/adapter/               LoRA in PEFT's format (or `backbone.safetensors` if all weights were tuned)
    FOLDER/pooling.safetensors    the pooling's weights, fp32

A folder appears whole or not at all. Loading verifies every checksum, sets the attention mode and probes it again. An
exported folder has its checksums in `checksums.json`. Nothing that a folder names is imported, apart from modules of
sentence-transformers and poolwise, unless the caller allows code.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.utils.save_and_load import set_peft_model_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from poolwise.errors import CheckpointError, ModelError, PoolwiseError, StudyError, explain, suggest
from poolwise.files import (
    atomic_folder,
    cached_if_unreachable,
    hashes,
    read_any_json,
    user_path,
    write_json,
)
from poolwise.model.attention import MODES, verify
from poolwise.model.backbone import TEXT, Backbone
from poolwise.model.base import base_path
from poolwise.model.encoder import STANDARD, PoolingHead, build, write_old_forms, write_settings
from poolwise.pooling.paper import ADAPTER, refuse_bare_adapter
from poolwise.study.catalogue import LEXICAL
from poolwise.study.design import Design
from poolwise.study.pooling_spec import allowing_code, find_own, is_own
from poolwise.study.recipe import Recipe
from poolwise.study.records import CHECKSUMS, FORMAT, RUN_FILE, check_modules, read_run, verify_export, verify_files


def save_weights(encoder: SentenceTransformer, folder: Path) -> None:
    """Write the tuned weights into an existing folder: adapter (or backbone) and pooling."""
    backbone, head = cast(Backbone, encoder[0]), cast(PoolingHead, encoder[1])
    model = backbone.model
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
    elif any(parameter.requires_grad for parameter in model.parameters()):
        save_file(_state(model), folder / "backbone.safetensors")
    save_file(_state(head.head), folder / "pooling.safetensors")


def load_weights(encoder: SentenceTransformer, folder: Path) -> None:
    """Load what `save_weights` wrote into an encoder of the same recipe and design.

    Raises CheckpointError naming the file that is missing, damaged or of another shape.
    """
    backbone, head = cast(Backbone, encoder[0]), cast(PoolingHead, encoder[1])
    model = backbone.model
    if isinstance(model, PeftModel):
        load_adapter(model, _read(folder / "adapter" / "adapter_model.safetensors"), folder / "adapter")
    elif any(parameter.requires_grad for parameter in model.parameters()):
        _load_into(model, folder / "backbone.safetensors")
    _load_into(head.head, folder / "pooling.safetensors")


def load_adapter(model: torch.nn.Module, state: dict[str, torch.Tensor], where: Path) -> None:
    """Load an adapter's tensors into a PEFT model. Raises CheckpointError if they are not exactly those it has."""
    with _fitting(where):
        result: Any = set_peft_model_state_dict(model, state)
    expected = sum("lora_" in name for name, _ in model.named_parameters())
    # PEFT ignores tensors that are missing
    if result.unexpected_keys or len(state) != expected:
        raise CheckpointError(f"{where}: holds {len(state)} tensors, the recipe makes {expected}")


def save(encoder: SentenceTransformer, folder: str | Path, **info: Any) -> Path:
    """Save a built encoder; `info` (step, …) is added to `run.json`. The folder appears whole or not at all.

    An existing folder is replaced. Raises CheckpointError for an encoder that poolwise did not build.
    """
    folder = Path(folder)
    spec = getattr(encoder, "poolwise", None)
    if spec is None:
        raise CheckpointError("only encoders made by poolwise.build or poolwise.load can be saved this way")
    with atomic_folder(folder) as temporary:
        save_weights(encoder, temporary)
        write_json(temporary / RUN_FILE, {"format": FORMAT, **spec, **info, "files": hashes(temporary)})
    return folder


def load(
    path: str | Path,
    *,
    base: str | None = None,
    device: str | None = None,
    trainable: bool = False,
    allow_code: bool = False,
) -> SentenceTransformer:
    """The encoder saved at `path`: a folder written by `save`, or an exported one. Needs no trust flag.

    Args:
        base: where the base model is now, if it was moved.
        trainable: LoRA and pooling require gradients, to continue training; otherwise no parameter does.
        allow_code: import the user's own pooling class that the folder names.

    Raises:
        CheckpointError: the folder is damaged or does not fit its base model.
        AttentionError: the model no longer follows the design's attention mode.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / RUN_FILE).exists() and (folder / "modules.json").exists():
        with allowing_code(allow_code, Path.cwd()):
            return load_exported(folder, device=device)
    run = read_run(folder)
    verify_files(folder, run["files"])
    pooling = run["design"].get("pooling")
    if isinstance(pooling, str) and is_own(pooling):
        with allowing_code(allow_code, Path.cwd()):
            _import_own(pooling, folder)
    try:
        recipe, design = Recipe.model_validate(_tuples(run["recipe"])), Design.model_validate(run["design"])
    except ValidationError as error:
        raise CheckpointError(f"{folder / RUN_FILE}: {'; '.join(explain(error, {'': Recipe}))}") from None
    source = base or run["base"]["path"]
    if source != "nano" and run["base"]["local"] and not os.path.isdir(base_path(source)):
        raise CheckpointError(f"{folder}: its base model was at {source}; give its new place: load(path, base=...)")
    recipe = recipe.model_copy(update={"base_model": source})
    encoder = build(recipe, design, run["seed"], device=device)
    identity = encoder.poolwise["base"]["identity"]  # type: ignore[union-attr,index]
    if identity != run["base"]["identity"]:
        raise CheckpointError(
            f"{folder}: trained on base {run['base']['identity']}, but {source} is {identity}; give the same base model"
        )
    load_weights(encoder, folder)
    encoder.poolwise = {key: run[key] for key in ("recipe", "design", "seed", "base")}  # type: ignore[assignment]
    encoder.eval()
    if not trainable:
        encoder.requires_grad_(False)
    return encoder


def recipe_of(encoder: SentenceTransformer) -> Recipe | None:
    """The recipe by which an encoder was built or trained; None for a model that poolwise did not build."""
    spec = getattr(encoder, "poolwise", None)
    return None if spec is None else Recipe.model_validate(_tuples(spec["recipe"]))


def load_any(model: str | Path) -> SentenceTransformer:
    """The encoder in a trial's folder (its last step), in one step's folder or an exported one; or `load_named`.

    Raises CheckpointError for a damaged folder, ModelError for a name that cannot be loaded.
    """
    folder = Path(model).expanduser()
    model = folder if str(model).startswith("~") else model
    steps = {read_run(path.parent)["step"]: path.parent for path in folder.glob(f"*/*/{RUN_FILE}")}
    folder = steps[max(steps)] if steps else folder
    refuse_bare_adapter(folder, RUN_FILE)
    exported = all((folder / name).exists() for name in ("modules.json", "config_sentence_transformers.json"))
    return load(folder) if exported or (folder / RUN_FILE).exists() else load_named(str(model))


def load_named(name: str) -> SentenceTransformer:
    """A sentence-transformers model by Hub name or folder. Raises ModelError if it cannot be loaded."""
    if problem := _no_model(name):
        raise ModelError(problem)
    try:
        check_modules(Path(name))
        with cached_if_unreachable(name):
            encoder = SentenceTransformer(name)
    except PoolwiseError:
        raise
    except Exception as error:  # whatever a hub client, a configuration or a weight file may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model {name!r} cannot be loaded: {reason} (allowed: {', '.join(LEXICAL)}, a sentence-transformers "
            f"model's folder, or its name on a Hub that this machine can reach){suggest(name, LEXICAL)}"
        ) from error
    if not Path(name).is_dir() and isinstance(cached := try_to_load_from_cache(name, ADAPTER), str):
        refuse_bare_adapter(Path(cached).parent, RUN_FILE)  # a snapshot of the Hub
    if Path(name).is_dir():
        says = (Path(name) / "modules.json").exists()
    else:
        says = isinstance(try_to_load_from_cache(name, "modules.json"), str)
    cast(Any, encoder).pools_by_default = "" if says else name
    return encoder


def _no_model(name: str) -> str:
    """Why a name cannot be that of a model, found without asking the Hub; an empty string if it can be."""
    path = user_path(name)
    if name == "nano":
        return (
            "'nano' is the built-in base model: a decoder to train, not an embedding model. `poolwise init demo` "
            "writes a study that trains designs on it, `poolwise run demo.toml` runs it, and `poolwise export "
            "demo.toml m1 --to my-embedder` writes a model whose folder can be named here (`poolwise ab` also takes "
            "demo.toml:m1)"
        )
    if path.suffix == ".toml":
        return (
            f"{name} is a study, not a model; give the folder that `poolwise export {name} DESIGN --to FOLDER` writes "
            f"(`poolwise ab` also takes {name}:DESIGN)"
        )
    if path.is_file():
        return f"{name} is a file; give the folder of a sentence-transformers model, or its name on the Hub"
    # `org/model` may be a name on the Hub, unless a folder called `org` is here.
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and path.parent.is_dir())
    if local and not path.is_dir():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        return (
            f"model {name!r}: there is no such folder (allowed: {', '.join(LEXICAL)}, a sentence-transformers model's "
            f"folder, or its name on the Hub){suggest(path.name, beside)}"
        )
    return ""


def default_pooling(encoder: SentenceTransformer) -> str:
    """A note on a model that was loaded from a folder which does not say how it pools; an empty string for any other.

    sentence-transformers averages the states of such a model, most often a base that nobody has tuned for embeddings.
    """
    if not (name := getattr(encoder, "pools_by_default", "")):
        return ""
    return (
        f"{name} has no modules.json, so it does not say how it pools: sentence-transformers takes the mean of its "
        "last hidden states. If it is a base model, its scores are those of an untuned one"
    )


def _import_own(pooling: str, folder: Path) -> None:
    """Import the user's class that a saved folder names. Raises CheckpointError if that is not allowed or fails."""
    try:
        find_own(pooling)
    except StudyError as error:
        raise CheckpointError(f"{folder}: {'; '.join(error.problems)}") from None


def _tuples(value: Any) -> Any:
    """JSON has lists where a recipe has tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().cpu().clone() for name, tensor in module.state_dict().items()}


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None


def _load_into(module: torch.nn.Module, path: Path) -> None:
    with _fitting(path):
        module.load_state_dict(_read(path))


@contextlib.contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Turns torch's error about tensors that are missing or of another shape into a CheckpointError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit the recipe and the design: {reason}") from None


PROBE_TEXTS = [
    "A short text.",
    "The second text is longer than the first, so that a batch of the two has padding in it.",
    "Whether attention looks back or both ways shows at the end of a sentence.",
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def export(encoder: SentenceTransformer, folder: str | Path) -> Path:
    """Write `encoder` to `folder` with LoRA merged, for sentence-transformers to load.

    The folder appears only after it has been reloaded and gave the same embeddings. Permissions follow the umask.

    Raises:
        CheckpointError: the folder cannot be made, exists and is not empty, or the reloaded embeddings differ.
    """
    folder = Path(folder)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise CheckpointError(f"{folder} exists and is not empty; give another folder or delete it")
        with atomic_folder(folder) as temporary:
            _write_verified(encoder, temporary)
            write_json(temporary / CHECKSUMS, {"files": hashes(temporary)})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder}: cannot be written ({reason}); give another folder or free space") from error
    return folder


def _write_verified(encoder: SentenceTransformer, folder: Path) -> None:
    """Write the merged encoder and reload it. Raises CheckpointError if its embeddings differ."""
    expected = encoder.encode(PROBE_TEXTS)
    backbone, head = cast(Backbone, encoder[0]), cast(PoolingHead, encoder[1])
    dtype = next(backbone.model.parameters()).dtype
    merged = _merged(encoder)
    if _is_standard(backbone, head):
        _save_standard(merged, folder)
        write_old_forms(folder, STANDARD[head.pooling], head.hidden_size, int(backbone.max_seq_length or 0))
    else:
        merged.save(str(folder), create_model_card=False)
    write_settings(merged, folder)
    reloaded = load_exported(folder, device=str(encoder.device)).encode(PROBE_TEXTS)
    difference = float(np.abs(expected - reloaded).max())
    if not difference <= TOLERANCE.get(dtype, 1e-3):  # also false for NaN
        raise CheckpointError(f"the exported model's embeddings differ by {difference:.2g}; nothing was written")


def load_exported(folder: Path, device: str | None = None) -> SentenceTransformer:
    """The encoder in an exported folder, its attention mode probed. Raises CheckpointError for a damaged folder."""
    verify_export(folder)
    modules = check_modules(folder)
    try:
        return _open_exported(folder, modules, device)
    except PoolwiseError:
        raise
    except Exception as error:  # whatever a configuration or a weight file may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder} cannot be loaded ({reason}); export the design again") from error


def _open_exported(folder: Path, modules: list[dict[str, str]], device: str | None) -> SentenceTransformer:
    settings = read_any_json(folder / "config_sentence_transformers.json")
    if modules[0]["type"] != f"{Backbone.__module__}.{Backbone.__qualname__}":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Importing from 'sentence_transformers.models'", DeprecationWarning)
            return _with_widths(SentenceTransformer(str(folder), device=device), settings)
    backbone = Backbone.load(str(folder))
    try:
        head = PoolingHead.load(str(folder), subfolder=modules[1]["path"])
    except StudyError as error:  # a pooling of the user's own
        raise CheckpointError(f"{folder}: {'; '.join(error.problems)}") from None
    encoder = SentenceTransformer(
        modules=[backbone, head, Normalize()],
        device=device,
        prompts=settings.get("prompts"),
        similarity_fn_name="cosine",
    )
    head.float()
    verify(backbone.model, backbone.attention)
    return _with_widths(encoder.eval(), settings)


def _with_widths(encoder: SentenceTransformer, settings: dict[str, Any]) -> SentenceTransformer:
    encoder.matryoshka_dims = tuple(settings.get("matryoshka_dims", ()))  # type: ignore[assignment]
    return encoder


def _is_standard(backbone: Backbone, head: PoolingHead) -> bool:
    """Whether sentence-transformers' own modules compute the same, so that the export needs no poolwise."""
    plain = backbone.attention in MODES and backbone.template == "plain" and backbone.special_tokens
    return plain and head.pooling in STANDARD and backbone.include_prompt and not backbone.pad_by_id


def _merged(encoder: SentenceTransformer) -> SentenceTransformer:
    """A copy of the encoder with LoRA merged into the base's weights."""
    encoder = copy.deepcopy(encoder)
    backbone = cast(Backbone, encoder[0])
    if isinstance(backbone.model, PeftModel):
        backbone.model = cast(Any, backbone.model).merge_and_unload()
    backbone.words.padding_side = "right"  # models without rotary embeddings count positions from the left
    return encoder


def _save_standard(encoder: SentenceTransformer, folder: Path) -> None:
    backbone, head = cast(Backbone, encoder[0]), cast(PoolingHead, encoder[1])
    with tempfile.TemporaryDirectory() as scratch:
        backbone.model.save_pretrained(scratch)
        backbone.words.save_pretrained(scratch)
        plain = Transformer(
            scratch,
            max_seq_length=backbone.max_seq_length,
            modality_config=TEXT,
            module_output_name="token_embeddings",
        )
        pooling = Pooling(head.hidden_size, pooling_mode=STANDARD[head.pooling])
        standard = SentenceTransformer(
            modules=[plain, pooling, Normalize()],
            prompts=cast(dict[str, str], encoder.prompts),
            similarity_fn_name="cosine",
        )
        standard.save(str(folder), create_model_card=False)
