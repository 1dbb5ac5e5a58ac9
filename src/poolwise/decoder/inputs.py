"""Templates: what a text is written into before the model reads it. `plain` is the text itself, after its prompt.

- `prompteol` (arXiv 2307.16645): `This sentence : "TEXT" means in one word:"`. Its last token is where the model would
  say the word; no end token follows. Made for last_token, usable with every pooling.
- `echo` (2402.15449): `Rewrite the sentence: TEXT, rewritten sentence: TEXT`. Only the second copy is pooled, each of
  whose tokens has seen the whole first one under causal attention; the end token too, if the recipe appends one.

The pieces are tokenised each on its own and then joined, so both copies have the same tokens, long texts are cut inside
the template, and the span of the second copy is exact. Cost: echo reads a text twice; both add about ten tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from poolwise.errors import ModelError


class Form(NamedTuple):
    """A template's words: before the text, between its two copies (None: one copy), after it, and in front of each."""

    before: str
    between: str | None
    after: str
    space: str = ""


FORMS = {
    "prompteol": Form('This sentence : "', None, '" means in one word:"'),
    "echo": Form("Rewrite the sentence:", ", rewritten sentence:", "", " "),
}


def write(
    template: str, texts: Sequence[str], prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], int]:
    """Ids of each text in its template, at most `max_length` of them; and how many of them stand before the text.

    Raises `ModelError` where prompt and template leave no token to the text.
    """
    form = FORMS[template]
    leading, trailing = special_frame(tokenizer)
    before = leading + _ids(tokenizer, prompt + form.before)
    between = [] if form.between is None else _ids(tokenizer, form.between)
    after = _ids(tokenizer, form.after) + (trailing if form.between is not None else [])
    copies = 1 if form.between is None else 2
    room = (max_length - len(before) - len(between) - len(after)) // copies
    if room < 1:
        raise ModelError(
            f"recipe.max_length = {max_length} leaves no room for a text beside its prompt and template {template!r} "
            f"({len(before) + len(between) + len(after)} tokens); give a larger max_length or a shorter prompt"
        )
    rows = []
    for text in texts:
        copy = _ids(tokenizer, form.space + text)[:room]
        rows.append([*before, *copy, *between, *(copy if copies == 2 else []), *after])
    return rows, len(before)


def pooled_from(template: str, real: Tensor, prefix: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """How many tokens of each text stand before what is pooled: before the second copy in echo, none in others.

    real, prefix: (B, 1), tokens of a text in its template, and those of them before the text, as `write` gives them.
    """
    between = FORMS[template].between
    if between is None:
        return prefix * 0
    end = len(special_frame(tokenizer)[1])
    copy = (real - prefix - len(_ids(tokenizer, between)) - end) // 2
    return real - copy - end


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after every text: BOS, EOS, or none."""
    whole, bare = list(tokenizer("a")["input_ids"]), _ids(tokenizer, "a")
    start = next(i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
