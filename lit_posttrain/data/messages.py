"""Conversations as rows hold them: one form of message, whatever the data set called its parts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lit_posttrain.data.columns import as_list, as_text, where
from lit_posttrain.data.sources import Row, nearest

Message = dict[str, Any]
EXTRAS = ("tools", "chat_template_kwargs")  # columns that chat templates read

ASSISTANT = "assistant"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_OWN = ("function", "observation")  # roles that some chat templates have


class Extras(NamedTuple):
    """What a row tells the chat template besides its messages."""

    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = {}


def extras_of(row: Row) -> Extras:
    """The columns ``tools`` (a list, or JSON of one) and ``chat_template_kwargs`` (a mapping) of a row."""
    tools, arguments = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"{where(row, 'tools')} is text, but not JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        raise ValueError(f"{where(row, 'tools')} must be a list of JSON schemas, not {str(tools)[:80]}")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"{where(row, 'chat_template_kwargs')} must be a mapping, not {type(arguments).__name__}")
    return Extras(_without_null(tools) or None, _without_null(arguments or {}))


def as_messages(value: Any, place: str) -> list[Message]:
    """Messages with role and content, from either that or ``from`` and ``value``.

    Args:
        value: What the column holds.
        place: Names it in messages.

    Raises:
        ValueError: It is no list of messages, or a content is no text or empty where it must not be.
    """
    return [_message(m, f"{place}[{i}]") for i, m in enumerate(as_list(value, place))]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} must be a message {{role: text, content: text}}, not {str(value)[:80]}")
    message = _without_null(value)
    if "role" not in message and "from" in message:
        role = message.pop("from")
        if not isinstance(role, str) or role not in _ROLES:
            known = ", ".join(_ROLES)
            raise ValueError(f"{place}.from is {role!r}{nearest(str(role), _ROLES)}; known are {known}")
        message = {"role": _ROLES[role], "content": message.pop("value", None), **message}
    for name in ("role", "content"):
        if name not in message and not ("tool_calls" in message and name == "content"):
            raise ValueError(
                f"{place} has no {name}{nearest(name, message)}; a message is {{role: text, content: text}}"
            )
    role, content = message["role"], message.get("content", "")
    if isinstance(content, list):
        raise ValueError(f"{place}.content is a list of parts, and only text can be trained on; write it as one text")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{place} must be a message {{role: text, content: text}}, not {str(value)[:80]}")
    meant = _ROLES.get(role.strip().lower(), role)
    if role != meant and role not in _OWN:  # most templates would write it as it is
        raise ValueError(f"{place}.role is {role!r}, which chat templates do not know; call it {meant!r}")
    if role in ("user", ASSISTANT) and not message.get("tool_calls"):
        as_text(content, f"{place}.content")
    return {**message, "content": content}


def _without_null(value: Any) -> Any:
    # Arrow fills what only other rows have with nulls, which a template would print.
    if isinstance(value, Mapping):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value


def transcript(messages: Sequence[Message]) -> str:
    """Messages as one text; of a single message its content."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def asked(row: Row) -> str:
    """A row's prompt as text: of a conversation what precedes the last answer; empty where the row has neither."""
    for name in ("prompt", "messages", "conversations"):
        value = row.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            messages = as_messages(value, where(row, name))
            while name != "prompt" and len(messages) > 1 and messages.pop()["role"] != ASSISTANT:
                pass
            return transcript(messages)
    return ""
