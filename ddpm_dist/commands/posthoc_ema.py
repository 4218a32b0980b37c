"""An average of any width, after the run, from the power averages that the run kept (ema.power).

    ddpm-posthoc-ema s3://bucket/runs/digits 0.08 s3://bucket/averages/digits-0.08
    ddpm-posthoc-ema RUN 0.08 OUT --step 40000

RUN/averages/power-<std>/<step>/ holds the stored averages as snapshots; OUT becomes one, to be sampled from
and evaluated as any other.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_dist import cli, storage
from ddpm_dist.errors import ConfigError, SnapshotError
from ddpm_dist.snapshot import load_info, load_snapshot, save_snapshot
from ddpm_dist.training import Profile, coefficients, distance, power_label

WARN_DISTANCE = 0.1
"""Relative distance of profiles from which on the result is called rough."""


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the average as a snapshot, and prints how near it is to the one wanted."""
    args = _parser().parse_args(argv)
    if not 0 < args.std < 0.28:
        raise ConfigError(f"std: {args.std} is not a relative width between 0 and 0.28")
    stored = stored_averages(args.run)
    newest = max(stored, key=lambda profile: profile.time)
    clock = clock_of(stored[newest])
    wanted = Profile(float(args.step + clock if args.step else newest.time), args.std)
    if wanted.time > newest.time:
        raise ConfigError(f"--step {args.step}: the run's last stored average is of step {newest.time - clock:.0f}")
    rough = reconstruct(stored, wanted, args.out)
    note = "; rough, since too few averages are stored near it" if rough > WARN_DISTANCE else ""
    print(
        f"{storage.redact(args.out)}: std {args.std} at step {wanted.time - clock:.0f}, "
        f"profile off by {rough:.1%}{note}"
    )


def stored_averages(run_url: str) -> dict[Profile, str]:
    """Profile -> URL of each power average that a run has published."""
    folder = storage.join(run_url, "averages")
    found = {}
    for label in storage.list_names(folder):
        std = label.removeprefix("power-")
        for name in storage.list_names(storage.join(folder, label)) if std != label else []:
            url = storage.join(folder, label, name)
            try:
                info = load_info(url)
                found[Profile(float(info.get("ema_steps", info["step"])), float(std))] = url
            except SnapshotError:
                continue  # not whole yet
    if not found:
        raise SnapshotError(
            f"{storage.redact(folder)}: no power averages; set ema.power, such as [0.05, 0.1], before the run"
        )
    return found


def clock_of(url: str) -> int:
    """Steps that a stored average had seen before its run's first: of a branch, those of its origin."""
    info = load_info(url)
    return int(info.get("ema_steps", info["step"]) - info["step"])


def reconstruct(stored: dict[Profile, str], wanted: Profile, out_url: str) -> float:
    """Publishes the combination of stored averages that is nearest to the wanted one; returns how near it is.

    One stored average is in memory at a time, beside the float64 sum.
    """
    profiles = sorted(stored, key=lambda profile: (profile.time, profile.std))
    shares = coefficients(profiles, wanted)
    total: dict[str, Tensor] = {}
    for profile, share in zip(profiles, shares, strict=True):
        network, diffusion = load_snapshot(stored[profile])
        for name, tensor in network.state_dict().items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + float(share) * tensor.double()
    near = distance(profiles, wanted, shares)
    info = {
        key: value
        for key, value in load_info(stored[profiles[-1]]).items()
        if key in ("config", "images_seen", "step", "null_label")
    }
    per_step = info["images_seen"] / info["step"] if info.get("images_seen") else None
    step = int(wanted.time) - clock_of(stored[profiles[-1]])
    info |= {"step": step, "images_seen": per_step and int(per_step * step)}
    info |= {"kind": f"{power_label(wanted.std)} after the run", "profile_distance": near}
    save_snapshot(out_url, total, network.config, diffusion, info)
    return near


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=cli.url, help="URL of the run's folder")
    parser.add_argument("std", type=float, help="relative width of the wanted average, such as 0.08")
    parser.add_argument("out", type=cli.url, help="URL of the snapshot to write")
    parser.add_argument(
        "--step", type=cli.positive, help="step at which the average ends; the last stored one by default"
    )
    return parser
