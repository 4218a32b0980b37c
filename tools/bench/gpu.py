"""How things stand on a GPU: ceilings of the card, training, the whole system, sampling, beside diffusers.

    python -m tools.bench.gpu                              # how things stand: --parts now
    python -m tools.bench.gpu --parts training zero save   # each at most 8 minutes on one H100, and usable alone
    python -m tools.bench.gpu --parts all --device cpu --small    # a rehearsal; its figures mean nothing

Parts:
{parts}

Needs neither Ray nor a bucket, and runs from the folder (PYTHONPATH=.). Sides of one part take turns, in processes of
their own; ratios are medians over the rounds, above 1 in our favour. diffusers is measured where it is installed.
A part that has used up --minutes begins nothing more, and says what it left out. Each part prints a table for NOTES.md;
the last line is one JSON object of all.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ddpm_dist import cli, device as devices
from ddpm_dist.errors import ConfigError
from tools.bench import gpu_jobs, gpu_training
from tools.bench.gpu_network import has_diffusers
from tools.bench.gpu_sides import Setting

Row = dict[str, Any]
PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "now": gpu_training.now,
    "ceilings": gpu_training.ceilings,
    "training": gpu_training.training,
    "system": gpu_jobs.system,
    "zero": gpu_training.zero,
    "determinism": gpu_training.determinism,
    "save": gpu_jobs.save,
    "noise": gpu_jobs.noise,
    "sampling": gpu_jobs.sampling,
    "likelihood": gpu_jobs.likelihood,
    "features": gpu_jobs.features,
    "memory": gpu_training.memory,
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    facts = about(args.device)
    print("; ".join(f"{value}" for value in facts.values()), flush=True)
    found: dict[str, Any] = {"about": facts, "small": args.small}
    for part in args.parts:
        found[part] = measure(part, args)
    print(json.dumps(found))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ConfigError where there is no GPU."""
    assert __doc__ is not None
    parts = "\n".join(f"  {name:12} {(part.__doc__ or '').splitlines()[0]}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.format(parts=parts), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "all"], default=["now"], metavar="PART")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--small", action="store_true", help="a tiny network, small batches, few steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile also in a rehearsal on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="after so long a part begins nothing more")
    args = parser.parse_args(argv)
    if "all" in args.parts:
        args.parts = list(PARTS)
    if args.device == "cuda":
        devices.select(1)
    elif not args.small:
        raise ConfigError("--device cpu is a rehearsal: give --small as well")
    return args


def about(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    found = {"device": platform.processor() or platform.machine(), "torch": f"torch {torch.__version__}"}
    if device == "cuda":
        found["device"] = devices.name(torch.device("cuda", 0))
        found["cuda"] = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        missing = devices.why_no_triton()
        found["triton"] = missing or "Triton works here"
    found["python"] = f"Python {platform.python_version()}"
    if not has_diffusers():
        found["peer"] = "diffusers is not installed here: no peer"
    return found


def measure(part: str, args: argparse.Namespace) -> list[Row]:
    """The rows of a part, printed as they come and as a table at its end."""
    print(f"\n## {part}\n", flush=True)
    began = time.monotonic()
    compiles = devices.why_no_triton() is None if args.device == "cuda" else args.compile
    setting = Setting(args.device, args.small, compiles, began + 60 * args.minutes)
    rows: list[Row] = []
    try:
        for row in PARTS[part](setting):
            rows.append({key: _rounded(value) for key, value in row.items()})
            print("  ", json.dumps(rows[-1], ensure_ascii=False), flush=True)
    except Exception as error:  # the parts that follow are measured all the same
        rows.append({"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"})
        print("  ", json.dumps(rows[-1]), flush=True)
    print(f"\n{table(rows)}\n\n({time.monotonic() - began:.0f} s)", flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown, with the columns of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_shown(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    cli.run(main)
