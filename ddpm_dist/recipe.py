"""Recipes: YAML files and `section.key=value` overrides to a checked `Config`, and the comparison of two."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ddpm_dist.config import Config
from ddpm_dist.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-4` is a number, as everybody expects, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Config of a YAML file with `section.key=value` overrides; raises ConfigError naming key, value, remedy."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: not a text file (UTF-8)") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}; the recipes are in configs/") from None
    return parse_config(text, overrides, source=str(path))


def parse_config(text: str, overrides: Iterable[str] = (), source: str = "config") -> Config:
    """As `load_config`, of YAML text."""
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected sections such as `run:` and `data:`, found {values!r}")
    for override in (overrides := list(overrides)):
        apply_override(values, override)
    return validate(values, f"{source} and the command line" if overrides else source)


def validate(values: dict[str, Any], source: str) -> Config:
    """Checks plain values, as YAML gives them, against the schema."""
    try:
        return Config.model_validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{source}:\n  " + "\n  ".join(dict.fromkeys(lines))) from None
    except TypeError as error:
        raise ConfigError(f"{source}: {error}") from None


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in place; the value is YAML."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r}: an override looks like section.key=value, as in train.steps=1000")
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    values[key] = parse_yaml(value, override)


def dump_config(cfg: Config) -> str:
    """The resolved configuration as YAML; `parse_config` gives it back."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


def differences(old: Config, new: Config) -> dict[str, list[str]]:
    """Keys that differ, by kind: {"identity": ["train.lr: 0.001 -> 0.0002"], "schedule": […], "free": […]}."""
    found: dict[str, list[str]] = {"identity": [], "schedule": [], "free": []}
    for key, kind, a, b in _walk(old, new, ""):
        if a != b:
            found[kind].append(f"{key}: {a} -> {b}")
    return found


def _walk(old: BaseModel, new: BaseModel, prefix: str) -> Iterable[tuple[str, str, Any, Any]]:
    for name, field in type(old).model_fields.items():
        a, b = getattr(old, name), getattr(new, name)
        if isinstance(a, BaseModel):
            yield from _walk(a, b, f"{prefix}{name}.")
        else:
            kind = next((k for k in ("schedule", "free") if k in field.metadata), "identity")
            yield prefix + name, kind, a, b


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors: the key, the value, the remedy."""
    location = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "tuple[", "constrained-"))]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        if len(location) == 1:
            return f"{key}: this section is missing, and some of its keys have no default; see configs/digits.yaml"
        return f"{key}: missing, and it has no default; give it in the file or as {key}=VALUE"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key}: {error['input']!r}: {message}"


def _known_keys(sections: list[str]) -> list[str]:
    model: Any = Config
    for section in sections:
        field = model.model_fields.get(section)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
