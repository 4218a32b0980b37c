"""The rows as a table, as JSON, and as text to paste where others read it."""

import getpass
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from ddpm_dist import __version__, storage
from ddpm_dist.doctor.examination import Examination
from ddpm_dist.doctor.rows import Row, State

ALL = "all"
ORDER = {State.FAILED: 0, State.REMARK: 1, State.OK: 2}
"""Of the rows that are shown: what nothing here needs stands in the JSON alone."""


def as_table(found: Examination) -> str:
    """One line a row, what failed first, each with its remedy below it; and how many failed."""
    shown = [row for row in _together(found) if row.state in ORDER]
    rows = sorted(shown, key=lambda row: ORDER[row.state])
    widths = [max((len(text) for text in column), default=0) for column in zip(*map(_cells, rows), strict=True)]
    lines = []
    for row in rows:
        cells = "  ".join(text.ljust(width) for text, width in zip(_cells(row), widths, strict=True))
        lines.append(f"{cells}  {row.found}".rstrip())
        if row.remedy:
            lines.append(f"{'':>{widths[0]}}  -> {row.remedy}")
    return "\n".join([*lines, "", _summary(found)])


def as_json(found: Examination) -> str:
    """{"failed": rows that failed, "rows": [{check, node, state, found, remedy}, …], "nodes": [versions, …]}."""
    nodes = [asdict(about) for about in found.nodes]
    return json.dumps({"failed": found.failed, "rows": [asdict(row) for row in found.rows], "nodes": nodes}, indent=2)


def as_report(found: Examination, private: Iterable[str] = ()) -> str:
    """Markdown to paste into an issue: versions and the table, without names of nodes, users, folders and buckets.

    private: further words, such as URLs, that are to be left out.
    """
    hidden = _hidden(found, private)
    versions = [f"- ddpm_dist {__version__}"]
    for about in found.nodes:
        packages = ", ".join(f"{name} {version}" for name, version in about.packages.items())
        cards = "; ".join(sorted(set(about.gpus))) or "no GPU"
        versions.append(
            f"- {about.node}: {about.system}, Python {about.python}, code {about.code}, {cards}; {packages}"
        )
    text = "\n".join(["### ddpm-doctor", "", *versions, "", "```", as_table(found), "```"])
    text = storage.redact(text)
    for word, instead in hidden:
        text = text.replace(word, instead)
    return re.sub(r"\b\d{1,3}(\.\d{1,3}){3}\b", lambda m: m[0] if m[0].startswith("127.") else "ADDRESS", text)


def _hidden(found: Examination, private: Iterable[str]) -> list[tuple[str, str]]:
    """(what is left out, what stands in its place), longest first."""
    names = dict.fromkeys([about.node for about in found.nodes] + [row.node for row in found.rows if row.node])
    hidden = {name: f"node-{at}" for at, name in enumerate(names, 1)}
    host = os.uname().nodename
    hidden.setdefault(host, next(iter(hidden.values()), "node-1"))
    hidden[str(Path.home())] = "~"
    hidden[sys.prefix] = "PREFIX"
    user = getpass.getuser()
    if len(user) > 3 and user != "root":
        hidden[user] = "USER"
    for url in private:
        protocol, _, rest = url.partition("://")
        hidden[url] = f"{protocol}://BUCKET/FOLDER"
        bucket = rest.partition("/")[0]
        if bucket:
            hidden[f"{protocol}://{bucket}"] = f"{protocol}://BUCKET"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    hidden[endpoint.rpartition("://")[2]] = "ENDPOINT"
    return sorted(((word, to) for word, to in hidden.items() if word), key=lambda pair: -len(pair[0]))


def _together(found: Examination) -> list[Row]:
    """Rows that say the same of every node are one."""
    nodes, rows, done = {about.node for about in found.nodes}, found.rows, set()
    together = []
    for row in rows:
        alike = [other.node for other in rows if replace(other, node=row.node) == row]
        if row.node and len(nodes) > 1 and set(alike) == nodes:
            if (key := (row.check, row.found)) not in done:
                done.add(key)
                together.append(replace(row, node=ALL))
        else:
            together.append(row)
    return together


def _cells(row: Row) -> tuple[str, str, str]:
    return row.state.value, row.check, row.node or ALL


def _summary(found: Examination) -> str:
    counts = {state: sum(row.state is state for row in found.rows) for state in State}
    nodes = f"{len(found.nodes)} node{'' if len(found.nodes) == 1 else 's'}"
    rest = f"{counts[State.OK]} ok, {counts[State.REMARK]} remarks, {counts[State.SKIPPED]} not needed here, on {nodes}"
    return (
        f"{found.failed} FAILED, {rest}; what mends each stands below it" if found.failed else f"nothing fails: {rest}"
    )
