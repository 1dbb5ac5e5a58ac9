"""Tiny random backbones, a real byte-level BPE tokenizer and model folders, shared by the tests.

Weights are scaled 3-4 times: at the usual std of .02 attention is nearly uniform and no test of it can fail.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from poolwise.model.base import restored_rng

VOCAB = 320
PAD, BOS, EOS = 0, 1, 2
SENTENCES = (
    "The heron stands in the shallow water and waits for a fish.",
    "Which tokens may see which is the first choice, pooling is the second.",
    "A small model learns slowly when the rate is small.",
    "query: how long does the ferry to the island take?",
    "The ferry to the island takes forty minutes in calm weather.",
    "Ünïcode, numbers 0123456789 and (brackets) must survive too.",
)

_ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_HEAD = {"head_dim": 8}
_LAYERED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}

# family: (transformers' model_type, sizes)
FAMILIES: dict[str, tuple[str, dict]] = {
    "mistral": ("mistral", {**_ROPE, "sliding_window": None}),
    "mistral_window": ("mistral", {**_ROPE, "sliding_window": 4}),
    "qwen2": ("qwen2", _ROPE),
    "qwen3": ("qwen3", {**_ROPE, **_HEAD}),
    "llama": ("llama", _ROPE),
    "gemma": ("gemma", {**_ROPE, **_HEAD}),
    "gemma3": ("gemma3_text", {**_ROPE, **_HEAD, **_LAYERED}),
    "phi3": ("phi3", _ROPE),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "olmo2": ("olmo2", _ROPE),
    "granite": ("granite", _ROPE),
    "smollm3": ("smollm3", _ROPE),
}
# families that ignore the mode wholly or on some backend, and an encoder
REFUSED: dict[str, tuple[str, dict]] = {
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "mamba": (
        "mamba",
        {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4},
    ),
    "stablelm": ("stablelm", _ROPE),
    "bert": (
        "bert",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
}


# families whose layers are not all attention
HYBRID: dict[str, tuple[str, dict]] = {"lfm2": ("lfm2", _ROPE)}


def tiny_config(family: str, **overrides) -> PretrainedConfig:
    """The configuration of `family` in tiny: 2 layers, width 32, vocabulary 320; `overrides` replace fields."""
    model_type, sizes = {**FAMILIES, **REFUSED, **HYBRID}[family]
    return CONFIG_MAPPING[model_type](**{**_SPECIAL, **sizes, **overrides})


def tiny_model(family: str, scale: float = 4.0, seed: int = 0, attn: str | None = None, **overrides):
    """A random `AutoModel` backbone in eval mode, its matrices multiplied by `scale`; `attn`: eager, sdpa, …

    The caller's random state is left as found.
    """
    config = tiny_config(family, **overrides)
    with restored_rng(seed=seed):
        model = AutoModel.from_config(config, **({"attn_implementation": attn} if attn else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    return model.eval()


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(padding_side: str = "right", max_length: int = 64) -> PreTrainedTokenizerFast:
    """A fresh byte-level BPE tokenizer trained on `SENTENCES`: `<pad>` 0, `<bos>` 1, `<eos>` 2; it adds no token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side=padding_side,
        model_max_length=max_length,
    )


def tiny_folder(tmp_path: Path, family: str = "llama", **model_arguments) -> Path:
    """`tmp_path/family` with model and tokenizer, as `AutoModel` and `SentenceTransformer` read it."""
    folder = Path(tmp_path) / family
    tiny_model(family, **model_arguments).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
