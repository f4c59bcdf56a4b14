"""The field's file formats, each turned into the columns that TRL takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from holdfast.data.files import named_type
from holdfast.data.templates import fill_template, missing_column, template_columns
from holdfast.errors import UserError, did_you_mean

Example = dict[str, Any]  # prompt + completion, or messages, or text
Convert = Callable[[Mapping[str, Any], str], list[Example]]  # a row and where it is -> its examples
Turns = Literal["each", "last", "keep"]

FORMATS = ("alpaca", "sharegpt", "messages", "prompt_completion", "text")
ALIASES = {"openai": "messages", "chatml": "messages"}
ANSWERS = ("output", "response", "completion", "answer")  # Alpaca's answer column and its relatives
TURNS = ("each", "last", "keep")
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def detect(row: Mapping[str, Any], where: str) -> str:
    """The format that a row's columns show. Raises UserError that lists them if none fits."""
    if isinstance(row.get("messages"), list):
        return "messages"
    if isinstance(row.get("conversations", row.get("conversation")), list):
        return "sharegpt"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "instruction" in row and any(name in row for name in ANSWERS):
        return "alpaca"
    if "text" in row:
        return "text"
    raise UserError(
        f"{where}: the columns {', '.join(row) or '(none)'} fit no known format ({', '.join(FORMATS)}). Name them "
        "(columns: {prompt: …, completion: …}) or give templates (prompt: 'Question: {question}\\nAnswer:', "
        "completion: ' {answer}')."
    )


def converter(
    format: str,
    first: Mapping[str, Any],
    where: str,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    chat: bool = False,
    turns: Turns = "each",
) -> Convert:
    """The function that turns a row into examples; ``first`` is the row that ``auto`` looks at."""
    if turns not in TURNS:
        raise UserError(f"turns: '{turns}' is unknown.{did_you_mean(str(turns), TURNS)}")
    if prompt is not None or completion is not None:
        return _templates(prompt, completion, first, where, chat)
    if format == "auto":
        format = detect(first, where)
    format = ALIASES.get(format, format.replace("-", "_"))
    if format == "alpaca":
        return lambda row, at: [_pair(*_alpaca(row, at, chat), chat)]
    if format == "prompt_completion":
        return lambda row, at: [_prompt_completion(row, at, chat)]
    if format == "text":
        return lambda row, at: [{"text": _text(row, "text", at)}]
    if format in ("messages", "sharegpt"):
        return lambda row, at: _conversation(_turns_of(row, at), at, turns)
    raise UserError(f"format: '{format}' is unknown.{did_you_mean(format, ('auto', *FORMATS))}")


def rename(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row with the user's columns under holdfast's names as well: ``{"prompt": "question"}``."""
    renamed = dict(row)
    for name, column in columns.items():
        if column not in row:
            hint = f" `columns` maps a role to the file's column: {{{column}: {name}}}." if name in row else ""
            raise UserError(missing_column(column, row, where) + hint)
        renamed[name] = row[column]
    return renamed


def _templates(prompt: str | None, completion: str | None, first: Mapping[str, Any], where: str, chat: bool) -> Convert:
    """A template that isn't given falls back on the column of that name."""
    for name, template in (("prompt", prompt), ("completion", completion)):
        if template is None and name not in first:
            raise UserError(
                f"{where}: a template for the {'completion' if name == 'prompt' else 'prompt'} alone needs a column "
                f"'{name}'; there are: {', '.join(first)}. Give `{name}` too."
            )
    question, answer = prompt or "{prompt}", completion or "{completion}"
    if not template_columns(answer):
        raise UserError(f"completion {answer!r}: uses no column, so every answer would be the same")
    return lambda row, at: [_pair(fill_template(question, row, at), fill_template(answer, row, at), chat)]


def _pair(prompt: str, completion: str, chat: bool, system: str = "") -> Example:
    if not chat:
        return {"prompt": prompt, "completion": completion}
    before = [{"role": "system", "content": system}] if system else []
    return {
        "prompt": [*before, {"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion.strip()}],
    }


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise UserError(missing_column(name, row, where))
    value = row[name]
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column '{name}' is {named_type(value)}, expected text; a template turns other values into text"
        )
    return value


def _alpaca(row: Mapping[str, Any], where: str, chat: bool) -> tuple[str, str]:
    """Instruction, optional input, answer; as plain text under headings, so that it suits a base model."""
    instruction = _text(row, "instruction", where)
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise UserError(f"{where}: column 'input' is {named_type(given)}, expected text")
    present = [name for name in ANSWERS if name in row]
    answer = _text(row, present[0] if present else ANSWERS[0], where)
    if chat:
        return f"{instruction}\n\n{given}" if given else instruction, answer
    middle = f"\n\n### Input:\n{given}" if given else ""
    return f"### Instruction:\n{instruction}{middle}\n\n### Response:\n", answer


def _prompt_completion(row: Mapping[str, Any], where: str, chat: bool) -> Example:
    if not isinstance(row.get("prompt"), list):
        return _pair(_text(row, "prompt", where), _text(row, "completion", where), chat)
    prompt, completion = (_messages(row.get(name), name, where) for name in ("prompt", "completion"))
    if not any(message["role"] == "assistant" for message in completion):
        raise UserError(f"{where}: column 'completion' has no assistant message, nothing to learn")
    return {"prompt": prompt, "completion": completion}


# ---------------------------------------------------------------- conversations


def _turns_of(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    for name in ("messages", "conversations", "conversation"):
        if name in row:
            break
    else:
        raise UserError(missing_column("messages", row, where))
    messages = _messages(row[name], name, where)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    """``role``/``content`` or ShareGPT's ``from``/``value``, as the roles that chat templates know."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: column '{column}' is {named_type(value)}, expected a list of messages")
    return [_message(message, f"{where}: {column}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is {named_type(message)}, expected a message (role and content)")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        known = ", ".join(sorted(set(ROLES)))
        raise UserError(f"{where} has the role {role!r}; known: {known}")
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise UserError(f"{where} has {named_type(content)} as its content, expected text")
    return {"role": ROLES[role.lower()], "content": content}


def _joined(parts: Iterable[Any], where: str) -> str:
    """Content given as parts: texts are joined, anything else can't be trained on here."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else named_type(part)
            raise UserError(f"{where} has a part that is not text ({kind})")
        texts.append(part["text"])
    return "".join(texts)


def _conversation(messages: list[dict[str, str]], where: str, turns: Turns) -> list[Example]:
    """Each answer with the conversation before it, so that the loss is on answers only, whatever the chat template.

    ``last`` takes the last answer alone; ``keep`` leaves ``messages`` whole, for TRL's own ``assistant_only_loss``.
    """
    if turns == "keep":
        return [{"messages": messages}]
    answers = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and any(before["role"] != "system" for before in messages[:i])
    ]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{where}: no assistant message that answers another, nothing to learn (roles: {roles})")
    return [
        {"prompt": messages[:i], "completion": [messages[i]]} for i in (answers[-1:] if turns == "last" else answers)
    ]
