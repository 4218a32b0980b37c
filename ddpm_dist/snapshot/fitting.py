"""Weights of one task for the network of another: classes, a learned variance, another size of images.

What is new begins so that the network computes what it did: a new class is as no class, and a variance that is going to
be learned is the fixed one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_dist.diffusion import Process
from ddpm_dist.errors import ConfigError
from ddpm_dist.models import UNet, UNetConfig

CLASSES = "class_embedding.weight"
TIME_BIAS = "time_embedding.linear_2.bias"


@dataclass(frozen=True)
class Task:
    """What a network does, beside what it is."""

    network: UNetConfig
    diffusion: Process
    null_label: int | None
    """The row of the null class; none: there are no classes, or all rows are classes."""

    @property
    def classes(self) -> int | None:
        """How many there are, without the null class; None: the network is unconditional."""
        return self.network.num_class_embeds if self.null_label is None else self.null_label


def changes(theirs: Task, ours: Task) -> list[str]:
    """What `fit` would do, in sentences; ConfigError for what can't be done."""
    found = []
    if theirs.network.sample_size != ours.network.sample_size:
        found.append(f"images of {ours.network.sample_size} px instead of {theirs.network.sample_size}")
    before, after = theirs.classes, ours.classes
    if before is None and after is not None:
        found.append(f"{after} classes and the null class are new; each begins as no class")
    elif before is not None and after is None:
        if theirs.null_label is None:
            raise ConfigError(
                f"model.num_classes: null, but run.init_from's network has {before} classes and none that means no "
                f"class, so it isn't known what it computes without one; use model.num_classes={before}"
            )
        found.append(f"without classes: what the {before} classes' null class gave stays")
    elif before is not None and after is not None:
        if theirs.null_label is None:
            found.append(f"of {before} classes none is known to be the null class; a new last row is their mean")
        if after < before:
            found.append(f"{after} classes instead of {before}: which stayed isn't known, each begins as no class")
        elif after > before:
            found.append(f"{after} classes instead of {before}: the first {before} stay, the others begin as no class")
    learned = [task.diffusion.learns_variance for task in (theirs, ours)]
    if learned == [False, True]:
        if ours.diffusion.variance == "learned":
            raise ConfigError(
                f"diffusion.variance: learned can't begin from {theirs.diffusion.variance}, which depends on t; use "
                "learned_range"
            )
        found.append(f"the variance is going to be learned; it begins as {theirs.diffusion.variance}")
    elif learned == [True, False]:
        found.append(f"the learned variance is left out for {ours.diffusion.variance}")
    return found


def fit(weights: Mapping[str, Tensor], theirs: Task, ours: Task) -> dict[str, Tensor]:
    """Weights (float32) of `theirs` as those of `ours`: what `changes` says; ConfigError if the shapes don't agree."""
    found = dict(weights)
    if ours.classes is not None:
        found[CLASSES] = _classes(found, theirs, ours.classes, ours.network.time_embed_dim)
    elif CLASSES in found:
        rows = found.pop(CLASSES)
        found[TIME_BIAS] = found[TIME_BIAS] + rows[theirs.null_label]
    if theirs.diffusion.learns_variance != ours.diffusion.learns_variance:
        _refit_outputs(found, theirs, ours)
    check_shapes(found, ours.network)
    return found


def check_shapes(weights: Mapping[str, Tensor], network: UNetConfig) -> None:
    """ConfigError naming the first parameter that the network has otherwise."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in UNet(network).named_parameters()}
    there = {name: tuple(value.shape) for name, value in weights.items()}
    apart = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if apart:
        first = apart[0]
        raise ConfigError(
            f"run.init_from: its network is another one than model.* describes: {len(apart)} parameters differ, the "
            f"first is {first} ({there.get(first, 'absent')} there, {wanted.get(first, 'absent')} here)"
        )


def _classes(weights: Mapping[str, Tensor], theirs: Task, after: int, width: int) -> Tensor:
    """[after + 1, width]: the null class is last."""
    if theirs.classes is None:
        return torch.zeros(after + 1, width)
    rows, before = weights[CLASSES], theirs.classes
    null = rows[:before].mean(dim=0) if theirs.null_label is None else rows[theirs.null_label]
    new = null.repeat(after + 1, 1)
    if after >= before:
        new[:before] = rows[:before]
    return new


def _refit_outputs(weights: dict[str, Tensor], theirs: Task, ours: Task) -> None:
    channels = ours.network.in_channels
    for name in ("conv_out.weight", "conv_out.bias"):
        value = weights[name][:channels]
        if ours.diffusion.learns_variance:
            # The share of log beta in log-variance is (v + 1) / 2: 1 is fixedlarge, and -1 fixedsmall.
            begin = 1.0 if theirs.diffusion.variance == "fixedlarge" else -1.0
            value = torch.cat([value, torch.full_like(value, begin if name.endswith("bias") else 0.0)])
        weights[name] = value
