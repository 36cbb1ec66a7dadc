"""Where a model lies: a local folder, or a hub repository fetched once; with readable errors and within seconds."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
# In a configuration, but not of what the network computes.
_INCIDENTAL = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def model_folder(name: str, key: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of ``name``, downloaded first where it is a hub repository.

    Args:
        name: A folder, or a hub name such as ``Qwen/Qwen2.5-0.5B``.
        key: The YAML key that holds it, for messages.
        revision: Commit, branch or tag on the hub.
        weights: Whether weights must be there (a tokenizer's folder needs none).

    Raises:
        ValueError: No such folder, no config or weights in it, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not _REPOSITORY.fullmatch(name) or name.startswith("."):
            raise ValueError(f"{key}: there is no folder {name!r}, and it is not a hub name either")
        folder = _download(name, key, revision)
    if weights and not (folder / "config.json").is_file():
        raise ValueError(f"{key}: {folder} has no config.json; it must be a folder written by save_pretrained")
    if weights and not any(p for pattern in _WEIGHTS for p in folder.glob(pattern)):
        raise ValueError(f"{key}: {folder} holds no weights (model.safetensors); was the download interrupted?")
    return folder


def _download(name: str, key: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # from_pretrained would retry for a minute and a half when the hub is unreachable; this fails at once.
        return Path(
            snapshot_download(
                name,
                revision=revision,
                etag_timeout=3,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            )
        )
    except HFValidationError as error:
        raise ValueError(f"{key}: there is no folder {name!r}, and it is not a hub name either") from error
    except GatedRepoError as error:
        raise ValueError(f"{key}: the hub gives {name!r} only to accounts that accepted its terms; log in") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{key}: {name!r} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{key}: no folder and no hub repository is called {name!r}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{key}: there is no folder {name!r}, and the hub cannot be reached to look for a repository of that name"
        ) from error


def configuration_hash(config: Any) -> str:
    """Of what a configuration says about how weights are used: norms, positions, end tokens; not of who wrote it.

    Args:
        config: A Hugging Face configuration.
    """
    said = {k: v for k, v in config.to_diff_dict().items() if k not in _INCIDENTAL and not k.startswith("_")}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
