"""What is wrong in a configuration, in one line: the merged tree is walked against the types that it must fill.

The parser's own message often lacks the path of a nested key, so it is only the last resort.
"""

import collections.abc
import dataclasses
import importlib
import inspect
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse._parameter_resolvers import get_signature_parameters

from lit_posttrain.cli_config import LINK_TARGET, ConfigTree, join, near, one_line

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_NOT_CONFIGURED = ("builtins", "typing", "pathlib", "datetime")


class _Fields(typing.NamedTuple):
    """What one mapping accepts: types by name, those without a default, and the class that says so."""

    types: dict[str, Any]
    required: set[str]
    owner: Any = None


class _Problem(typing.NamedTuple):
    """One sentence; a lower rank is the more likely cause of the others."""

    rank: int
    sentence: str
    empty: bool = False


def explain(message: str, tree: ConfigTree, parser: ArgumentParser) -> str:
    """The first misspelt key, else the first unusable class, value or missing key, else the parser's words.

    Args:
        message: What the parser said.
        tree: What the user gave.
        parser: The parser of the command, whose arguments are the types of the root.
    """
    walk = _Walk(tree)
    problems = sorted(walk.mapping(tree.data, _root(parser), ""), key=lambda problem: problem.rank)  # a stable sort
    return problems[0].sentence if problems else _condense(message)


def ignored(tree: ConfigTree, parser: ArgumentParser) -> str | None:
    """What the parser accepts without a word and drops.

    A misspelt key that holds nothing (``lorra: {}``), and a text like ``"####"`` where null is allowed too, which it
    reads as a YAML comment.

    Args:
        tree: What the user gave, accepted by the parser.
        parser: As in :func:`explain`.
    """
    problems = _Walk(tree).mapping(tree.data, _root(parser), "")
    return next((problem.sentence for problem in problems if problem.empty), None)


def _root(parser: ArgumentParser) -> _Fields:
    """Types by name, a dotted argument such as ``trainer.max_steps`` as a group within a group."""
    names: dict[str, Any] = {}
    for action in parser._actions:
        if hasattr(action, "_typehint") and not action.dest.endswith(".help"):
            group, _, name = action.dest.rpartition(".")
            if group:
                names.setdefault(group, _Fields({}, set())).types[name] = action._typehint  # type: ignore[attr-defined]
            else:
                names[name] = action._typehint  # type: ignore[attr-defined]
    return _Fields(names, {"model", "data"})


class _Walk:
    def __init__(self, tree: ConfigTree):
        self.place = tree.place

    def mapping(self, node: dict[str, Any], fields: _Fields, path: str) -> Iterator[_Problem]:
        """Problems of the keys of ``node``, then those of its values, then what is missing from it."""
        for key, value in node.items():
            here = join(path, str(key))
            if key not in fields.types:
                groups = [g for g, inner in fields.types.items() if isinstance(inner, _Fields) and key in inner.types]
                hint = f"; did you mean '{groups[0]}.{key}'?" if groups else near(str(key), fields.types)
                yield _Problem(0, f"unknown key {here}{self.place(here)}{hint}", empty=value in ({}, []))
            elif isinstance(hint := fields.types[key], _Fields):
                if isinstance(value, dict):
                    yield from self.mapping(value, hint, here)
                else:
                    yield _Problem(1, f"{here}{self.place(here)} must be a mapping of keys, not {value!r}")
            else:
                yield from self.value(value, hint, here, fields.owner)
        for name in fields.types:
            if name in fields.required and name not in node and join(path, name) != LINK_TARGET:
                yield _Problem(2, f"missing key {join(path, name)}{self.place(path)}")

    def value(self, node: Any, hint: Any, path: str, owner: Any) -> Iterator[_Problem]:
        """Problems of one value of type ``hint``, an argument of ``owner``."""
        classes, in_lists = _classes(hint)
        if isinstance(node, str) and node.lstrip().startswith("#") and type(None) in _flat(hint):
            advice = "would be read as a comment, and so as null; begin the text with something else than #"
            yield _Problem(1, f"{path}{self.place(path)} is {node!r}, which {advice}", empty=True)
        elif isinstance(node, list) and in_lists and not (_takes_text(hint) and all(isinstance(i, str) for i in node)):
            for index, item in enumerate(node):
                yield from self.value(item, _item_hint(hint), f"{path}[{index}]", owner)
        elif isinstance(node, dict) and in_lists and not classes:
            yield _Problem(1, f"{path}{self.place(path)} must be a list; begin each item with '- class_path: '")
        elif isinstance(node, str) and not _takes_text(hint) and any(not dataclasses.is_dataclass(c) for c in classes):
            yield from self.instance({"class_path": node}, hint, path, path)
        elif node in ("null", "None") and any(dataclasses.is_dataclass(c) for c in classes):
            advice = "cannot be null on the command line: write null in a file, or give the key above it as JSON"
            yield _Problem(1, f"{path}{self.place(path)} {advice}")
        elif isinstance(node, dict) and "class_path" in node and classes:
            yield from self.instance(node, hint, path, f"{path}.class_path")
        elif isinstance(node, dict) and (described := [c for c in classes if dataclasses.is_dataclass(c)]):
            yield from self.mapping(node, _fields(described[0]), path)
        elif isinstance(node, dict) and (hints := _value_hints(hint)):
            for key, value in node.items():
                yield from self.value(value, hints[0], join(path, str(key)), owner)
        elif isinstance(node, dict) and classes:
            if default := _default_class(owner, path.rpartition(".")[2]):
                yield from self.instance({"class_path": default, **_init_args(node)}, hint, path, path, partial=True)
            else:
                yield _Problem(1, f"{path}{self.place(path)} needs a class_path, and its arguments under init_args")
        elif not _accepts(hint, node):
            yield _Problem(1, _wrong(node, hint, f"{path}{self.place(path)}"))

    def instance(
        self, node: dict[str, Any], hint: Any, path: str, class_key: str, partial: bool = False
    ) -> Iterator[_Problem]:
        """Problems of ``{class_path, init_args}``."""
        target = _resolve(str(node["class_path"]), hint)
        if isinstance(target, str):
            yield _Problem(0, f"{class_key}{self.place(class_key)}: {target}")
            return
        classes = _classes(hint)[0]
        if isinstance(target, type) and not issubclass(target, tuple(classes)):
            bases = " or ".join(c.__name__ for c in classes)
            yield _Problem(1, f"{class_key}{self.place(class_key)}: {node['class_path']} is no subclass of {bases}")
            return
        fields = _fields(target, positional=_positional(hint))
        for key in node:
            here = join(path, str(key))
            if key not in _CLASS_KEYS:
                hint_text = (
                    f"; did you mean '{path}.init_args.{key}'?" if key in fields.types else near(key, _CLASS_KEYS)
                )
                yield _Problem(0, f"unknown key {here}{self.place(here)}{hint_text}")
        arguments = node.get("init_args") or {}
        if not isinstance(arguments, dict):
            yield _Problem(1, f"{path}.init_args{self.place(path)} must be a mapping of keys, not {arguments!r}")
        else:
            shown = path if partial else f"{path}.init_args"
            yield from self.mapping(arguments, fields._replace(required=set()) if partial else fields, shown)


def _init_args(node: dict[str, Any]) -> dict[str, Any]:
    return node if "init_args" in node else {"init_args": node}


def _flat(hint: Any) -> Iterator[Any]:
    """The members of a union, through Annotated; lists stay whole."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _flat(member)
    elif origin is typing.Annotated:
        yield from _flat(typing.get_args(hint)[0])
    else:
        yield hint


def _classes(hint: Any) -> tuple[list[type], list[type]]:
    """The classes whose instances ``hint`` takes, the returns of factories included, and those in its lists."""
    direct: list[type] = []
    in_lists: list[type] = []
    for member in _flat(hint):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if origin is collections.abc.Callable:
            direct += _classes(arguments[-1])[0]
        elif origin in _LISTS:
            in_lists += [c for argument in arguments for c in _classes(argument)[0]]
        elif isinstance(member, type) and origin is None and not issubclass(member, torch.Tensor):
            direct += [member] if member.__module__ not in _NOT_CONFIGURED else []
    return direct, in_lists


def _item_hint(hint: Any) -> Any:
    """The type of the items of the lists in ``hint``."""
    return typing.Union[tuple(a for m in _flat(hint) if typing.get_origin(m) in _LISTS for a in typing.get_args(m))]  # noqa: UP007


def _value_hints(hint: Any) -> list[Any]:
    """The value types of the mappings in ``hint``."""
    mappings = (dict, collections.abc.Mapping)
    return [typing.get_args(m)[1] for m in _flat(hint) if typing.get_origin(m) in mappings and typing.get_args(m)]


def _takes_text(hint: Any) -> bool:
    members = [m for member in _flat(hint) for m in (member, *typing.get_args(member))]
    return any(m is str or typing.get_origin(m) is typing.Literal for m in members)


def _positional(hint: Any) -> int:
    """How many leading arguments a factory is called with, such as the parameters of an optimizer."""
    for member in _flat(hint):
        arguments = typing.get_args(member)
        if typing.get_origin(member) is collections.abc.Callable and arguments and isinstance(arguments[0], list):
            return len(arguments[0])
    return 0


def _fields(target: Any, positional: int = 0) -> _Fields:
    """The arguments of a class or factory, those that it passes on to its base included."""
    parameters = get_signature_parameters(target, None)[positional:]
    required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
    return _Fields({p.name: p.annotation for p in parameters}, required, target)


def _default_class(owner: Any, name: str) -> str | None:
    """The class of a default, such as that of ``lambda params: AdamW(params, lr=1e-6)``."""
    if owner is None:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(owner, fail_untyped=False)
    default = parser.get_defaults().get(name)
    return default.get("class_path") if hasattr(default, "get") else None


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


def _resolve(class_path: str, hint: Any) -> Any:
    """The class or factory of that dotted path, or short name of a subclass; else a sentence that says what is not."""
    module_name, _, name = class_path.rpartition(".")
    known = {c.__name__: c for base in _classes(hint)[0] for c in _subclasses(base)}
    if not module_name:
        return (
            known.get(name)
            or f"no class '{name}'{near(name, (n for n, c in known.items() if not inspect.isabstract(c)))}"
        )
    parts = module_name.split(".")
    for depth in range(len(parts), 0, -1):
        parent = ".".join(parts[:depth])
        try:
            module = importlib.import_module(parent)
        except ModuleNotFoundError as error:
            if error.name and not f"{parent}.".startswith(f"{error.name}."):
                return f"cannot import {parent}: {error}"
            continue
        except Exception as error:  # a user's module may raise anything; the line must still come
            return f"cannot import {parent}: {type(error).__name__}: {error}"
        target: Any = module
        for part in [*parts[depth:], name]:
            if not hasattr(target, part):
                names = [n for n in dir(target) if not n.startswith("_")]
                paths = [f"{c.__module__}.{n}" for n, c in known.items()]
                hints = near(part, names)
                return f"{parent} has no '{part}'{hints if hints.startswith('; did') else near(class_path, paths)}"
            target = getattr(target, part)
        return target
    hints = near(class_path, [f"{c.__module__}.{n}" for n, c in known.items()])
    return f"no module '{parts[0]}' to import for {class_path}{hints if hints.startswith('; did') else ''}"


def _accepts(hint: Any, value: Any) -> bool:
    """Whether the parser would take this value alone."""
    if hint is inspect.Parameter.empty or hint is Any:
        return True
    try:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=hint)
        parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError) as error:
        return "does not have a type" in str(error)
    return True


def _wrong(value: Any, hint: Any, where: str) -> str:
    choices = [str(c) for m in _flat(hint) if typing.get_origin(m) is typing.Literal for c in typing.get_args(m)]
    if choices and isinstance(value, str):
        return f"{where} must be one of {', '.join(choices)}, not {value!r}{near(value, choices)}"
    if any(dataclasses.is_dataclass(c) for c in _classes(hint)[0]):
        return f"{where} must be a mapping of keys, not {_shown(value)}"
    return f"{where} must be {_name(hint)}, not {_shown(value)}"


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _name(hint: Any) -> str:
    """A type as one writes it, without the modules."""
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return hint.__name__
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(member) for member in typing.get_args(hint))
    return re.sub(r"\b[a-z_]\w*\.(?=\w)", "", str(hint))


def _condense(message: str) -> str:
    """The lines of the parser's message that say what was expected, and of which key."""
    keys = re.findall(r'[Pp]arser key "([^"]+)"', message)
    reason = re.search(r"Expected .*?Got value: [^\n]*|required[^\n]*|expects a function[^\n]*|Option '[^\n]*", message)
    text = one_line(reason.group(0) if reason else message)
    text = text if len(text) <= 400 else f"{text[:400]} ..."
    return f"{'.'.join(dict.fromkeys(keys))}: {text}" if keys and reason else text
