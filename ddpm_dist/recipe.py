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
from ddpm_dist.errors import ConfigError, without_url_secrets

MAX_NODES = 100_000
"""A configuration has a few hundred values."""


class _Loader(yaml.SafeLoader):
    """YAML without the surprises of version 1.1: 010 is not 8, 1:30 not 90, a date not a date; 1e-4 is a number.

    Whole numbers may be written 1e4. A key that stands twice is an error.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [one for one in resolvers if one[0].rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        value = self.construct_yaml_float(node)
        return int(value) if value.is_integer() and "." not in node.value else value


_NUMBER = re.compile(
    r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_WHOLE = re.compile(r"[-+]?(0|[1-9]\d*)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _WHOLE, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader`, or anybody's YAML 1.1, would take for numbers."""


for _tag, _pattern in (("float", _NUMBER), ("int", _WHOLE)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list("-+.0123456789"))


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: of an installed one, or configs/ of a checkout."""
    package = Path(__file__).resolve().parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Config of a recipe with `section.key=value` overrides; raises ConfigError naming key, value, remedy.

    recipe: path of a YAML file, or the name of one that comes with the package, such as cifar10.
    """
    return parse_config(read_recipe(recipe), overrides, source=str(recipe))


def read_recipe(recipe: str | Path) -> str:
    """The text of a recipe, by its path or its name; ConfigError if there is none."""
    named = recipes().get(str(recipe))
    if named is not None and Path(recipe).is_file():
        raise ConfigError(
            f"--config {recipe}: a recipe's name, and a file here; write ./{recipe}, or for the recipe {named}"
        )
    try:
        return (named or Path(recipe)).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"--config {recipe}: not a text file (UTF-8)") from None
    except IsADirectoryError:
        raise ConfigError(f"--config {recipe}: a folder; name a file, or {_shipped()}") from None
    except OSError as error:
        raise ConfigError(f"--config {recipe}: {error.strerror or error}; name a file, or {_shipped(recipe)}") from None


def _shipped(meant: str | Path = "") -> str:
    names = sorted(recipes())
    close = difflib.get_close_matches(Path(meant).stem.lower(), names, n=1)
    return f"one of the recipes {', '.join(names)}" + (f" (did you mean {close[0]}?)" if close else "")


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
    sections = {name for name, field in Config.model_fields.items() if _is_section(field.annotation)}
    values = {key: {} if value is None and key in sections else value for key, value in values.items()}
    try:
        return Config.model_validate_json(json.dumps(values))
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for one in error.errors():
            beginning, message = _explain(one)
            lines.setdefault(beginning, []).append(message)
        text = [beginning + ", or ".join(dict.fromkeys(messages)) for beginning, messages in lines.items()]
        raise ConfigError(without_url_secrets(f"{source}:\n  " + "\n  ".join(text))) from None
    except TypeError as error:
        raise ConfigError(f"{source}: {error}") from None


def parse_yaml(text: str, source: str) -> Any:
    """The value of YAML text, by `_Loader`'s rules; ConfigError with `source` and the line for what is none."""
    try:
        loader = _Loader(text)
        loader.name = source
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise ConfigError(f"{source}: its aliases (*name) stand for more than {MAX_NODES} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of 5,000 digits
        raise error if isinstance(error, ConfigError) else ConfigError(f"{source}: not YAML: {error}") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values below a node, as they would be written without aliases; a few lines can stand for billions."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # while it is looked at: an alias inside itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = [part if isinstance(part, tuple) else (part,) for part in parts]
        known[id(node)] = 1 + sum(_size(part, known) for pair in pairs for part in pair)
    return known[id(node)]


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in place; the value is YAML."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r}: an override looks like section.key=value, as in train.steps=1000")
    *sections, key = path.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    parsed = parse_yaml(value, override)
    # " #" begins a comment in YAML, but not in a URL that was typed on a command line.
    values[key] = value if isinstance(parsed, str) and value.startswith(parsed) else parsed


def dump_config(cfg: Config) -> str:
    """The resolved configuration as YAML; `parse_config` gives it back."""
    return yaml.dump(cfg.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


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


def _explain(error: Any) -> tuple[str, str]:
    """One of pydantic's errors: (the key and the value, what is wrong and the remedy)."""
    inner = ("function-", "tuple[", "constrained-", "dict[", "str", "int", "float")
    location = [str(part) for part in error["loc"] if not str(part).startswith(inner)]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{key}: ", f"unknown key; {_hint(location)}"
    if error["type"] == "missing":
        if location[-1].isdigit():
            return f"{'.'.join(location[:-1])}: ", f"{location[-1]} values are too few"
        if len(location) == 1:
            example = recipes().get("digits", "a recipe")
            return f"{key}: ", f"this section is missing, and some of its keys have no default; see {example}"
        return f"{key}: ", f"missing, and it has no default; give it in the file or as {key}=VALUE"
    message = "Input should be a list such as [1, 4]" if error["type"] == "tuple_type" else error["msg"]
    message = message.removeprefix("Value error, ")
    return (f"{key}: {error['input']!r}: ", message) if key else ("", message)


def _hint(location: list[str]) -> str:
    """For a key that there isn't."""
    *sections, name = location
    elsewhere = [section for section in Config.model_fields if name in _known_keys([section])]
    if elsewhere and not sections:
        return f"did you mean {' or '.join(f'{section}.{name}' for section in elsewhere)}?"
    known = _known_keys(sections)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {'.'.join([*sections, close[0]])}?" if close else f"known here: {', '.join(known)}"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _known_keys(sections: list[str]) -> list[str]:
    model: Any = Config
    for section in sections:
        field = model.model_fields.get(section)
        if field is None or not _is_section(field.annotation):
            return []
        model = field.annotation
    return list(model.model_fields)
