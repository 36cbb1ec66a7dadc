"""Shared fixtures: a tiny random Llama and a byte-level tokenizer, written once as a HF folder."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from architectures.zoo import write_architecture
from hypothesis import settings
from tiny import write_tiny_model

torch.set_num_threads(1)
# A deadline of 200 ms fails at random on a busy machine; derandomized, a red suite is red for the next reader too.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama whose tokens are bytes; pad equals eos, as in many chat models."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def architecture_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a name in ``architectures.zoo`` to the folder of its random network, written when first asked for."""
    root, written = tmp_path_factory.mktemp("architectures"), {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = write_architecture(name, root / name)
        return written[name]

    return folder


@pytest.fixture(scope="session")
def reproduce() -> ModuleType:
    """``scripts/reproduce.py`` as a module."""
    spec = importlib.util.spec_from_file_location("reproduce", Path(__file__).parent.parent / "scripts/reproduce.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _fixed_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
