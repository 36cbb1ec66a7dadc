"""What is said when a model cannot be found: one sentence that names the key, and within seconds."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_posttrain.model_files import model_folder

KEY = "model.init_args.policy.model"
ASK = (
    "from lit_posttrain.model_files import model_folder\n"
    "try:\n    model_folder('somebody/some-model', 'the.key')\nexcept ValueError as error:\n    print(error)\n"
)


def test_a_folder_is_taken_as_it_is(tiny_model: Path) -> None:
    assert model_folder(str(tiny_model), KEY) == tiny_model


def test_home_is_expanded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert model_folder(f"~/{tiny_model.name}", KEY) == tiny_model


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "../no", "a/b/c", "no such model"])
def test_what_is_neither_folder_nor_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{KEY}: there is no folder '{name}'.*not a hub name"):
        model_folder(name, KEY)


@pytest.mark.parametrize("name", ["a--b/c", "somebody/model.", "x..y"])
def test_names_the_hub_client_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{KEY}: there is no folder"):
        model_folder(name, KEY)


def test_a_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^{KEY}: .* has no config\.json"):
        model_folder(str(tmp_path), KEY)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"^{KEY}: .* holds no weights"):
        model_folder(str(tmp_path), KEY)
    assert model_folder(str(tmp_path), KEY, weights=False) == tmp_path


@pytest.mark.parametrize("file", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_files_that_are_weights(tmp_path: Path, file: str) -> None:
    for name in ("config.json", file):
        (tmp_path / name).write_text("{}")
    assert model_folder(str(tmp_path), KEY) == tmp_path


@pytest.mark.parametrize("setting", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_an_unreachable_hub_is_said_at_once(tmp_path: Path, setting: dict[str, str]) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | setting
    environment |= {"HF_HOME": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("the.key: there is no folder 'somebody/some-model', and the hub cannot be reached")
    assert done.stderr == ""
    assert time.monotonic() - started < 45  # a few on an idle machine; HF would retry for 90


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("RepositoryNotFoundError", "no folder and no hub repository is called 'somebody/model'"),
        ("GatedRepoError", "accepted its terms"),
        ("RevisionNotFoundError", "'somebody/model' has no revision 'v9'"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
    ],
)
def test_what_the_hub_answers_is_told_apart(monkeypatch: pytest.MonkeyPatch, error: str, said: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_, **__):
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=said) as caught:
        model_folder("somebody/model", KEY, revision="v9")
    assert str(caught.value).startswith(KEY)
