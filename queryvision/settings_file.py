"""Settings as people write them: a YAML file, or `section.key=value` with the value in YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from queryvision.errors import ConfigError


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings.

    Raises:
        ConfigError: it cannot be read, is no YAML or no mapping, or a key occurs twice; line and column are named.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({_why(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of settings, this is {type(values).__name__}")
    return values


def parse_setting(text: str) -> tuple[str, Any]:
    """`section.key=value` -> key and value.

    Raises:
        ConfigError: there is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: write section.key=value, for example --set train.lr=0.0002")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML ({_why(error)})") from error
    return key.strip(), parsed


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice; YAML's own loader would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' occurs twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads a plain 1e-4 as text; people mean the number. What stands in quotes stays text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _why(error: Exception) -> str:
    """What is wrong and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        hint = "; indent with spaces" if "\\t" in (error.problem or "") else ""
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}{hint}"
    if isinstance(error, OSError):
        return str(error.strerror)
    return str(error).splitlines()[0]
