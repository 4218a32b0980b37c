"""What the texts name is there: links, files, modules, make targets, headings."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").glob("*.yaml")])
SOURCES = sorted(path for folder in ("ddpm_dist", "launch", "tools", "tests") for path in (ROOT / folder).rglob("*.py"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(
    r"(?<![\w/.:-])((?:tools|launch|configs|ddpm_dist|tests|docs|deploy)/[\w/.-]*\w\.(?:py|md|yaml|txt|sh))\b"
)
ROOMS = sorted(path.parent.name for path in (ROOT / "ddpm_dist").glob("*/__init__.py"))
SHORT = re.compile(rf"`((?:{'|'.join(ROOMS)})/[\w/]*\w\.py)`")
MODULE = re.compile(r"python -m (tools[a-z_.]*[a-z_])(?![A-Z])")
TARGET = re.compile(r"\bmake ((?:test|demo|check|clean|chaos|docs)[a-z-]*)\b")
HEADING = re.compile(r'NOTES\.md, "([^"]+)"')


def anchors(path: Path) -> set[str]:
    """The anchors of a text's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name}: the link {target} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{path.name}: {target}: no such heading"


@pytest.mark.parametrize("path", [*TEXTS, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in SHORT.findall(text) if not (ROOT / "ddpm_dist" / name).exists()]
    missing += [
        name for name in MODULE.findall(text) if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
    ]
    missing += [f"make {name}" for name in TARGET.findall(text) if name not in targets]
    if path != ROOT / "NOTES.md":
        notes = (ROOT / "NOTES.md").read_text()
        missing += [f"NOTES.md, {name}" for name in HEADING.findall(" ".join(text.split())) if f"# {name}" not in notes]
    assert not missing, f"{path.relative_to(ROOT)} names what is not there"
