"""Settings for people: the whole resolved configuration as YAML with the documentation of every key."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from queryvision.assembly import resolve
from queryvision.config import load_config
from queryvision.model.builders import BUILDERS, builder
from queryvision.registry import resolve_task


def describe(name: str, task: str | None = None, settings: Sequence[str] = ()) -> str:
    """The resolved settings of a preset as YAML with comments; it can be saved and given to `--config`.

    Args:
        name: of a preset, or a YAML file.
        task: where two tasks have a preset of that name.
        settings: `section.key=value` on top.

    Raises:
        ConfigError: no such preset, unknown key, wrong value.
    """
    chosen = load_config(task, name, settings=settings)
    found = resolve_task(chosen.task)
    config = resolve(chosen, found)
    lines = []
    for key, field in type(config).model_fields.items():
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            lines += ["", f"# {type(value).__doc__}", f"{key}:"]
            lines += [_line(k, getattr(value, k), f.description or "", 1) for k, f in type(value).model_fields.items()]
        elif key == "model":
            build = builder(str(value["name"]))
            texts = {**_family_texts(build), **_argument_texts(build), "name": _first_line(build)}
            lines += ["", f"# {field.description}", "model:", *(_line(k, v, texts.get(k, ""), 1) for k, v in value.items())]
        elif key == "heads":
            lines += ["", f"# {field.description}", "heads:"]
            for head, keywords in value.items():
                lines += _head(head, keywords, found.heads[head].type)
        else:
            lines.append(_line(key, value, field.description or "", 0))
    return "\n".join(lines)


def _family_texts(build: Callable[..., Any]) -> dict[str, str]:
    """{argument: text} of the builders that stand in the same file, of which the first explains all of them."""
    family = [other for other in BUILDERS if other.__module__ == build.__module__]
    return {name: text for other in reversed(family) for name, text in _argument_texts(other).items()}


def _head(name: str, keywords: Mapping[str, Any], kind: type) -> list[str]:
    texts = _argument_texts(kind)
    return [f"  {name}:  # {_first_line(kind)}", *(_line(k, v, texts.get(k, ""), 2) for k, v in keywords.items())]


def _line(key: str, value: Any, text: str, depth: int) -> str:
    shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"{'  ' * depth}{key}: {shown}" + (f"  # {text}" if text else "")


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").splitlines()[0]


def _argument_texts(thing: Callable[..., Any] | type) -> dict[str, str]:
    """{argument: text} of a Google-style docstring."""
    section = (inspect.getdoc(thing) or "").partition("Args:\n")[2].split("\n\n")[0]
    texts: dict[str, str] = {}
    for line in section.splitlines():
        start = re.match(r"^    (\w+): (.*)", line)
        if start:
            texts[start.group(1)] = start.group(2)
        elif texts and line.startswith("     "):
            texts[list(texts)[-1]] += " " + line.strip()
    return texts
