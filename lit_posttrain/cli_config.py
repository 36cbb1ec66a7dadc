"""The command line and its YAML files as one plain tree, with the place of every key.

Needs neither torch nor Lightning, so that what can be refused at once is refused at once.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_CONFIG_FILES = 2
PRECISION = "32-true"
LINK_SOURCE, LINK_TARGET = "model.init_args.policy", "data.init_args.tokenizer"
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_NOT_KEYS = ("help", "print_config", "config")


class UserError(Exception):
    """Something the user can mend; shown as one line, without a traceback.

    Args:
        message: What is wrong, the key that is meant, and the fix.
        code: Exit status of the process.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(one_line(message))
        self.code = code


def one_line(message: str) -> str:
    """The message with every run of white space, line breaks included, made one space."""
    return " ".join(message.split())


def near(word: str, names: Iterable[str]) -> str:
    """The tail of a message: the valid name that is nearest to ``word``, or all of them if none is near."""
    names = list(names)
    if close := difflib.get_close_matches(word, names, n=1) or [name for name in names if name.startswith(word)]:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(names)}" if names else "; there are none here"


@dataclass
class ConfigTree:
    """What was given, before any type is known.

    Attributes:
        data: The nested mapping that the files and the options make together; later ones win.
        places: Where a path of ``data`` was last set, such as ``exp.yaml line 3`` or ``command line``.
        files: The YAML files, in the order given.
    """

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def place(self, path: str) -> str:
        """``" (exp.yaml line 3)"`` for a path that was given, with its ``init_args`` or without, else nothing."""
        place = self.places.get(path) or self.places.get(path.replace(".init_args", ""))
        return f" ({place})" if place else ""

    def get(self, path: str) -> Any:
        """The value at a dotted path, None where there is none; ``init_args`` may be left out."""
        node: Any = self.data
        for key in path.split("."):
            if isinstance(node, dict) and "class_path" in node and key not in _CLASS_KEYS:
                node = node.get("init_args")
            node = node.get(key) if isinstance(node, dict) else None
        return node


def options(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each ``--name value``, ``--name=value`` and ``-c value`` as (name, value); None where no value follows."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("-c"):
            word = "--config" + (f"={rest}" if (rest := word[2:].removeprefix("=")) else "")
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        if equals:
            yield name, value
        elif words and not re.match(r"-[^\d.]", words[0]):
            yield name, words.pop(0)
        else:
            yield name, None


def read(argv: Sequence[str]) -> ConfigTree:
    """Merges files and options in the order given, as the parser will.

    Args:
        argv: The words after the command's name.

    Raises:
        UserError: A third file, a file that is missing, is not YAML, is no mapping or gives one key twice.
    """
    tree = ConfigTree()
    for name, value in options(argv):
        if name == "config":
            if value is None:
                raise UserError("--config needs the path of a YAML file")
            tree.files.append(Path(value))
            if len(tree.files) > MAX_CONFIG_FILES:
                raise UserError(
                    f"--config {value} is file number {len(tree.files)}; give at most {MAX_CONFIG_FILES}: the "
                    "experiment, then the hardware it runs on (configs/hardware/*.yaml)"
                )
            data, places = load(tree.files[-1])
            tree.data = _merge(tree.data, data)
            tree.places |= places
        elif value is not None and name.split(".")[-1] not in _NOT_KEYS:
            _set(tree, name, value)
    return tree


def load(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML mapping, and the line of every path in it.

    Args:
        path: The file.

    Raises:
        UserError: See :func:`read`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(str(path), siblings, n=1)
        raise UserError(f"config file {path} not found" + (f"; did you mean '{close[0]}'?" if close else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from None
    loader = yaml.SafeLoader(text)
    places: dict[str, str] = {}
    try:
        node = loader.get_single_node()
        if node is not None:
            _places(node, "", path, places)
        data = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: a config file holds a mapping of keys (trainer:, model:, data:), not a {type(data).__name__}"
        )
    return data, places


def _places(node: yaml.Node, path: str, file: Path, places: dict[str, str]) -> None:
    """Notes the line of each key, and refuses a key given twice: YAML loaders keep the last without a word."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[f"{path}[{index}]"] = f"{file} line {item.start_mark.line + 1}"
            _places(item, f"{path}[{index}]", file, places)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = join(path, str(key.value))
            if name in seen and key.value != "<<":
                raise UserError(f"{file} line {key.start_mark.line + 1}: key {name} is given twice")
            seen.add(name)
            places[name] = f"{file} line {key.start_mark.line + 1}"
            _places(value, name, file, places)


def join(path: str, key: str) -> str:
    """``path.key``, or ``key`` at the root."""
    return f"{path}.{key}" if path else key


def _merge(old: Any, new: Any) -> Any:
    """Mappings merge, all else is replaced; another class does not keep the arguments of the one before."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if "class_path" in old and new.keys().isdisjoint(_CLASS_KEYS):
        new = {"init_args": new} if new else {}
    if "class_path" in new and "class_path" in old and new["class_path"] != old["class_path"]:
        old = {}
    return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}


def _set(tree: ConfigTree, name: str, text: str) -> None:
    """Sets one ``--a.b=text``, stepping into ``init_args`` and a list's last item as the parser does."""
    append, name = name.endswith("+"), name.removesuffix("+")
    value = yaml.safe_load(text) if re.match(r"\s*[\[{]", text) and _is_yaml(text) else text
    node, path, keys = tree.data, "", name.split(".")
    for depth, key in enumerate(keys):
        if "class_path" in node and key not in _CLASS_KEYS:
            path, node = join(path, "init_args"), _mapping(node, "init_args")
        path = join(path, key)
        tree.places.setdefault(path, "command line")
        if depth == len(keys) - 1:
            break
        if isinstance(node.get(key), list) and node[key]:
            items, last = node[key], len(node[key]) - 1
            items[last] = items[last] if isinstance(items[last], dict) else {"class_path": items[last]}
            node, path = items[last], f"{path}[{last}]"
        else:
            node = _mapping(node, key)
    key, old = keys[-1], node.get(keys[-1])
    if append:
        new = value if isinstance(value, list) else [value]
        value = [*old, *new] if isinstance(old, list) else new
    elif isinstance(old, dict) and "class_path" in old and isinstance(value, str):
        value = old if old["class_path"] == value else {"class_path": value}
        tree.places[f"{path}.class_path"] = "command line"
    else:
        value = _merge(old, value)
    node[key] = value
    tree.places[path] = "command line"


def _is_yaml(text: str) -> bool:
    try:
        yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return True


def _mapping(node: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping at ``node[key]``, made where there is none; a class named alone becomes its ``class_path``."""
    if not isinstance(node.get(key), dict):
        node[key] = {"class_path": node[key]} if isinstance(node.get(key), str) else {}
    return node[key]


def check(tree: ConfigTree) -> None:
    """Refuses what needs no type to be seen wrong.

    Args:
        tree: As read.

    Raises:
        UserError: A ``trainer.precision`` other than full, or a tokenizer given to the data.
    """
    for path in ("trainer", "model.init_args", "data.init_args"):
        if not isinstance(given := tree.get(path), (dict, type(None))):
            raise UserError(f"{path} must be a mapping of keys{tree.place(path)}, not {given!r}")
    precision = tree.get("trainer.precision")
    if precision not in (None, PRECISION, 32, "32", "null"):
        raise UserError(
            f"trainer.precision is {precision}{tree.place('trainer.precision')}, but parameters stay in 32 bits: leave "
            "it out, and set what forward passes compute in by model.init_args.policy.compute_dtype (auto, float32 or "
            "bfloat16)"
        )
    for path in (LINK_TARGET, "data.tokenizer"):
        if (given := tree.get(path)) not in (None, "null"):
            raise UserError(
                f"{path} is {given!r}{tree.place(path)}, but data always uses the policy's tokenizer: remove it, and "
                "set model.init_args.policy.tokenizer if it should differ from the model's own"
            )
