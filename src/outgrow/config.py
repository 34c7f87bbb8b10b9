"""Settings that people write: pydantic models whose mistakes are told all at once, each in one line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from outgrow.errors import OutgrowError, one_line


class Settings(BaseModel):
    """Frozen settings; an unknown key is an error that suggests the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def identity(self) -> str:
        """A short hash of the resolved settings."""
        return hash_of(self.identifying())

    def identifying(self) -> dict[str, Any]:
        """The settings that an identity is made of: all but those that came later and are not used."""
        return {name: _identifying(getattr(self, name)) for name, field in type(self).model_fields.items() if self._counts(name, field)}

    def _counts(self, name: str, field: FieldInfo) -> bool:
        extra = field.json_schema_extra
        return not (isinstance(extra, dict) and extra.get("later") and getattr(self, name) == field.default)


def later(default: Any, description: str, **limits: Any) -> Any:
    """A field that came after runs were made without it: at its default it is no part of an identity, so they stay what they were."""
    return Field(default, description=description, json_schema_extra={"later": True}, **limits)


def _identifying(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.identifying()
    if isinstance(value, (list, tuple)):
        return [_identifying(one) for one in value]
    return value


S = TypeVar("S", bound=Settings)


def load(kind: type[S], path: Path) -> S:
    """Reads settings from a YAML file."""
    return parse(kind, read_yaml(path), where=f"'{path}'")


class _Unique(yaml.SafeLoader):
    """Reads YAML whose keys stand once each in a mapping; which of two values is meant nobody knows."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Unique)
    except FileNotFoundError:
        raise OutgrowError(f"there is no file '{path}'") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OutgrowError(f"'{path}' is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise OutgrowError(f"'{path}' must hold keys and values, such as 'tokens: 1000000'")
    return content


def parse(kind: type[S], content: Mapping[str, Any], where: str) -> S:
    """Validates settings, collecting every problem before raising."""
    with told(kind, where):
        return kind.model_validate(content)


@contextmanager
def told(kind: type[BaseModel], where: str) -> Generator[None, None, None]:
    """Tells all problems of settings that are made inside in one sentence each."""
    try:
        yield
    except ValidationError as error:
        raise OutgrowError(f"{where}: " + "; ".join(_problem(kind, problem) for problem in error.errors())) from None


def hash_of(content: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def suggestion(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """ "; did you mean 'x'?", or, when nothing is near, `otherwise`: the list of what is known if not given."""
    names = sorted(known)
    if near := difflib.get_close_matches(word, names, n=1):
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if otherwise is None else otherwise


def _problem(kind: type[BaseModel], problem: Any) -> str:
    path = [part for part in problem["loc"]]
    name = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{name}'" + suggestion(str(path[-1]), _fields(kind, path[:-1]))
    if problem["type"] == "missing":
        return f"'{name}' is missing"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"'{name}' should be {message}, not {problem['input']!r}" if problem["type"] != "value_error" else message


def _fields(kind: type[BaseModel], path: list[Any]) -> list[str]:
    """The field names of the settings found by following `path` from `kind`."""
    for part in path:
        field = kind.model_fields.get(str(part))
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        inner = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        kind = inner[0] if inner else kind
    return list(kind.model_fields)
