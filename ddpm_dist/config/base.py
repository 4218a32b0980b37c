"""What every section is made of: the kinds of keys, and types with their range and message."""

import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

T = TypeVar("T")
Schedule = Annotated[T, "schedule"]
Free = Annotated[T, "free"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "fp16"]


def check_url(url: str) -> str:
    """The URL itself; ValueError with the remedy for what is none, or holds what must not be stored."""
    protocol, colon, rest = url.partition("://")
    if protocol in ("s3a", "s3n"):
        raise ValueError(f"{protocol}:// is Hadoop's name for it; write s3://BUCKET/FOLDER")
    place = rest if protocol == "file" else url
    if place.lstrip("/").startswith("~") and (protocol == "file" or not colon):
        raise ValueError(f"nobody expands ~ in a URL; write {Path(place.lstrip('/')).expanduser().as_uri()}")
    if variable := re.search(r"\$\{?[A-Za-z_]\w*\}?", url):
        raise ValueError(
            f"nobody expands {variable[0]} in a URL; write what it stands for (a shell does, in double quotes)"
        )
    if not colon or not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) or (protocol == "file" and rest[:1] != "/"):
        here = f"; a folder here is {Path(url).absolute().as_uri()}" if url and ":" not in url else ""
        raise ValueError(f"not an absolute URL; write s3://BUCKET/FOLDER or file:///FOLDER{here}")
    if protocol == "s3" and not rest.partition("/")[0]:
        raise ValueError("names no bucket; write s3://BUCKET/FOLDER")
    if url != url.strip():
        raise ValueError("begins or ends with a space")
    for part in rest.rstrip("/").split("/")[1:]:
        if part in ("..", "."):
            raise ValueError(f"holds {part}, which stores take for a name of its own; write the folder itself")
        if not part:
            raise ValueError("holds //, which stores take for a folder without a name; write one /")
    if protocol != "file" and ("?" in rest or "@" in rest.partition("/")[0]):
        raise ValueError("keys and options don't belong into a URL: it is stored and logged; use the environment")
    return url


Url = Annotated[str, AfterValidator(check_url)]


class Section(BaseModel):
    """Frozen, and strict: no unknown key, no text for a number, neither NaN nor infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def check_span(name: str, span: tuple[float, float] | None) -> None:
    """ValueError where a first lies after its last."""
    if span is not None and span[0] > span[1]:
        raise ValueError(f"{name}: {list(span)} is not [first, last]")
