"""What is found out before the first trial: does the base model take the recipe and every attention mode, does the
training data fit it, and what should the user know of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poolwise.attention import check_window, set_attention, verify
from poolwise.cost import base_parameters
from poolwise.data import COUNTS, Pairs
from poolwise.decoder.base import cannot_load, check_positions, ensure_eos, load_base
from poolwise.decoder.layouts import choose
from poolwise.errors import AttentionError, ModelError
from poolwise.reading.rows import random_stream
from poolwise.study import Design, Recipe, Study

LARGEST = 1_000_000_000
"""Parameters up to which a base model in a folder is loaded (fp32, CPU) to be probed beforehand."""
SAMPLED_ROWS = 1000


def check_base(study: Study, path: str, config: Any) -> list[str]:
    """Refuse a base model that cannot carry the study; says what could not be tried yet.

    Raises ModelError where `max_length` exceeds the positions or a width of `matryoshka` the model's, AttentionError
    where a design's attention is ignored.
    """
    recipe = study.recipe
    check_positions(recipe, config)
    width = config.get_text_config().hidden_size
    if too_wide := [wanted for wanted in recipe.matryoshka if wanted >= width]:
        raise ModelError(
            f"recipe.matryoshka = {list(recipe.matryoshka)}: {', '.join(map(str, too_wide))} must be below {width}, "
            f"the width of {recipe.base_model}'s embeddings, which is trained anyway"
        )
    if not Path(path).is_dir() or base_parameters(config) > LARGEST or recipe.attn_implementation.startswith("flash"):
        return [f"Whether {recipe.base_model} takes the attention modes is probed when a trial loads it."]
    model = load_base(recipe.base_model, study.base_dir, attn_implementation=recipe.attn_implementation)
    for mode in dict.fromkeys(design.attention for design in study.designs):
        try:
            set_attention(model, mode)
            check_window(model, mode, recipe.max_length)
            verify(model, mode)
        except AttentionError as error:
            names = _names(study.designs, mode)
            raise AttentionError(f"recipe.base_model = {recipe.base_model!r} cannot carry {names}: {error}") from error
    layout, reason = choose(model, study.designs, recipe.max_length)
    return [f"Training batches are {layout}, not packed, which costs time: {reason}."] if reason else []


def _names(designs: Sequence[Design], mode: str) -> str:
    names = [design.name for design in designs if design.attention == mode]
    return f"the design{'s' * (len(names) > 1)} {', '.join(names)}"


def data_notes(pairs: Pairs, recipe: Recipe, path: str) -> list[str]:
    """What was counted, changed or dropped in the training data, and what the base model will not see of it."""
    report = pairs.report
    sources = ", ".join(f"{name} {rows:,}" for name, rows in report["rows_by_source"].items())
    notes = [f"{report['rows']:,} training rows ({sources})"]
    notes += [f"{report[name]:,} {words}" for name, words in COUNTS.items() if report[name]]
    if report["evaluation_texts"]:
        notes.append(
            f"{report['decontaminated_rows']:,} training rows removed, as they hold one of the "
            f"{report['evaluation_texts']:,} evaluation texts"
        )
    cut, texts = cut_texts(pairs, recipe, path)
    if cut:
        notes.append(
            f"{cut:,} of {texts:,} sampled training texts are longer than recipe.max_length = {recipe.max_length} "
            "tokens and are cut"
        )
    return notes


def cut_texts(pairs: Pairs, recipe: Recipe, path: str) -> tuple[int, int]:
    """How many texts of at most `SAMPLED_ROWS` training rows exceed `max_length` tokens, of how many."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise cannot_load("recipe.base_model", recipe.base_model, error) from error
    if recipe.append_eos:
        ensure_eos(tokenizer)
    rows = random_stream("lengths").permutation(len(pairs.dataset))[:SAMPLED_ROWS]
    sample = pairs.dataset.select(rows)
    texts = []
    for name in (name for name in sample.column_names if name != "source"):
        prompt = recipe.query_prompt if name == "query" else recipe.document_prompt
        texts += [prompt + text for text in sample[name]]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return sum(length > recipe.max_length for length in lengths), len(texts)
