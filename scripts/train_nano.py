"""Train poolwise's built-in base model (`nano`): byte-level BPE, a small Llama decoder, next-token loss.

One command makes the model again, from nothing or from earlier weights, on a GPU or on one CPU core:

    python scripts/train_nano.py --text TEXT_FOLDER --out runs/nano --minutes 75 [--init FOLDER]

TEXT_FOLDER holds `wikipedia_en.jsonl.gz`, `classic_books.jsonl.gz` (training, field `text`) and
`wikitext2_valid.jsonl.gz` (validation only). Without `--init` the tokenizer is trained on the training text and the
weights start at random; with it both are taken from that folder. In `--out`: `checkpoint.pt` (weights, optimisers,
position; written atomically, so a killed run goes on where it stood), `curve.csv` (the loss curve), `best/` (the
model folder with the lowest validation loss) and `summary.json` (seed, data hash, tokens, loss, perplexity).

Matrices of the layers are trained by Muon (Jordan et al. 2024), everything else by AdamW; the rate warms up over
100 steps, stays, and falls linearly to zero over the last 40 % of the time or the tokens, whichever is nearer its end.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TRAIN_FILES = ("wikipedia_en.jsonl.gz", "classic_books.jsonl.gz")
VALID_FILE = "wikitext2_valid.jsonl.gz"
SPECIAL = ("<pad>", "<bos>", "<eos>")
SHAPE = {
    "vocab_size": 6144,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}


def texts(path: Path) -> Iterator[str]:
    """The `text` field of each row of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def data_hash(folder: Path) -> str:
    """SHA-256 over the bytes of the training files, in their fixed order."""
    digest = hashlib.sha256()
    for name in TRAIN_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training text; it appends nothing by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for name in TRAIN_FILES for text in texts(folder / name)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
        model_max_length=SHAPE["max_position_embeddings"],
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, paths: list[Path]) -> np.ndarray:
    """All documents as one uint16 row, each followed by <eos>."""
    rows: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
            rows.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16))
        batch.clear()

    for path in paths:
        for text in texts(path):
            batch.append(text)
            if len(batch) == 256:
                flush()
    flush()
    return np.concatenate(rows)


def cached_stream(path: Path, tokenizer: PreTrainedTokenizerFast, paths: list[Path]) -> np.ndarray:
    """`token_stream`, kept beside the checkpoint."""
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        np.save(partial, token_stream(tokenizer, paths))
        os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def windows(stream: np.ndarray, length: int, batch: int, seed: int, step: int) -> torch.Tensor:
    """The (batch, length) token ids of one step: windows of the stream in a seeded order, new in every pass."""
    per_pass = len(stream) // length
    rows = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, per_pass)
        # An affine permutation of the windows: no array to keep, any step can be reached at once.
        rng = np.random.default_rng([seed, epoch])
        stride = int(rng.integers(per_pass // 3, per_pass))
        while math.gcd(stride, per_pass) != 1:
            stride += 1
        start = (int(rng.integers(per_pass)) + place * stride) % per_pass * length
        rows.append(stream[start : start + length].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def valid_loss(model: LlamaForCausalLM, stream: np.ndarray, length: int, batch: int, limit: int) -> float:
    """Mean nats a token over the first `limit` windows of the validation stream (teacher forced, no overlap)."""
    device = next(model.parameters()).device
    count = min(limit, len(stream) // length)
    total = 0.0
    for first in range(0, count, batch):
        last = min(first + batch, count)
        ids = torch.from_numpy(np.asarray(stream[first * length : last * length], dtype=np.int64)).view(-1, length)
        total += model(ids.to(device), labels=ids.to(device)).loss.float().item() * (last - first)
    return total / count


def optimisers(model: LlamaForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, progress: float) -> float:
    """Factor on the learning rate: 100 steps up, level, linear to zero over the last 40 %."""
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.0, 1.0 - progress) / 0.4)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The model folder in fp16, in place of an older one only when complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = {name: tensor.detach().to(torch.float16) for name, tensor in model.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied to the embeddings
    model.save_pretrained(partial, state_dict=state)
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    (partial / "config.json").write_text(json.dumps({**config, "dtype": "float16"}, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def write_json(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of the training text")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, curve and model")
    parser.add_argument("--init", type=Path, help="model folder to continue from; default: from nothing")
    parser.add_argument("--minutes", type=float, default=math.inf, help="wall clock of training, resumes included")
    parser.add_argument("--tokens", type=float, default=math.inf, help="tokens to train on, e.g. 8e8")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="windows a step (a GPU wants 128)")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    args = parser.parse_args()
    if math.isinf(args.minutes) and math.isinf(args.tokens):
        parser.error("say when to stop: --minutes or --tokens")
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start_folder = args.init or args.out / "start"
    if args.init is None and not start_folder.exists():
        ids = dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True))
        config = LlamaConfig(**SHAPE, **ids, tie_word_embeddings=True)
        save_model(LlamaForCausalLM(config), train_tokenizer(args.text), start_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start_folder)
    model = LlamaForCausalLM.from_pretrained(start_folder, dtype=torch.float32).to(device)
    train = cached_stream(args.out / "train.npy", tokenizer, [args.text / name for name in TRAIN_FILES])
    valid = cached_stream(args.out / "valid.npy", tokenizer, [args.text / VALID_FILE])
    words = sum(len(text.split()) for text in texts(args.text / VALID_FILE))

    optims = optimisers(model, args.muon_lr, args.adam_lr)
    at = {"step": 0, "seconds": 0.0, "best": math.inf}
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optim, state in zip(optims, saved["optimisers"], strict=True):
            optim.load_state_dict(state)
        at = saved["at"]
    curve = args.out / "curve.csv"
    if not curve.exists():
        curve.write_text("step,tokens,seconds,train_loss,valid_loss,rate\n")

    def evaluate_and_save(train_loss: float, factor: float) -> None:
        loss = valid_loss(model, valid, args.length, 32, 64)
        if loss < at["best"]:
            at["best"] = loss
            save_model(model, tokenizer, args.out / "best")
        state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optims], "at": at}
        torch.save(state, checkpoint.with_suffix(".partial"))
        os.replace(checkpoint.with_suffix(".partial"), checkpoint)
        tokens = at["step"] * args.batch * args.length
        with curve.open("a", newline="") as file:
            csv.writer(file).writerow(
                [at["step"], tokens, round(at["seconds"]), f"{train_loss:.4f}", f"{loss:.4f}", f"{factor:.4f}"]
            )
        print(f"step {at['step']} tokens {tokens:,} train {train_loss:.3f} valid {loss:.3f}", file=sys.stderr)

    factor, losses, last_save = 0.0, [math.nan], time.monotonic()
    evaluate_and_save(math.nan, 0.0)
    while True:
        progress = max(at["seconds"] / 60 / args.minutes, at["step"] * args.batch * args.length / args.tokens)
        if progress >= 1:
            break
        began = time.monotonic()
        factor = rate(at["step"], progress)
        for optim, top in zip(optims, (args.muon_lr, args.adam_lr), strict=True):
            for group in optim.param_groups:
                group["lr"] = top * factor
        ids = windows(train, args.length, args.batch, args.seed, at["step"]).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
        model.zero_grad(set_to_none=True)
        losses = [*losses[-99:], loss.item()]
        if math.isnan(losses[-1]):
            raise SystemExit(f"the loss is NaN at step {at['step']}: the last checkpoint stands; lower --muon-lr")
        at["step"] += 1
        at["seconds"] += time.monotonic() - began
        if time.monotonic() - last_save > args.save_minutes * 60:
            evaluate_and_save(float(np.nanmean(losses)), factor)
            last_save = time.monotonic()
    evaluate_and_save(float(np.nanmean(losses)), factor)

    best = LlamaForCausalLM.from_pretrained(args.out / "best", dtype=torch.float32).to(device)
    loss = valid_loss(best, valid, args.length, 32, len(valid))
    summary = {
        "parameters": best.num_parameters(),
        "init": str(args.init.name) if args.init else "random",
        "seed": args.seed,
        "steps": at["step"],
        "tokens": at["step"] * args.batch * args.length,
        "tokens_in_data": len(train),
        "minutes": round(at["seconds"] / 60, 1),
        "data_sha256": data_hash(args.text),
        "wikitext2_valid_nats_a_token": round(loss, 4),
        "wikitext2_valid_perplexity_a_token": round(math.exp(loss), 2),
        "wikitext2_valid_perplexity_a_word": round(math.exp(loss * len(valid) / words), 1),
    }
    write_json(args.out / "summary.json", summary)
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
