"""Files of weights: .safetensors (whole, in shards, of half precision) and torch.save's, by name -> tensor.

Nothing in a file is ever executed: pickles are read with `weights_only`, and what that refuses is refused here.
"""

import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ddpm_dist import storage
from ddpm_dist.errors import NotFoundError, SnapshotError

STEM = "diffusion_pytorch_model"
LAYOUTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".fp16.safetensors", ".fp16.bin",
           ".bf16.safetensors", ".non_ema.safetensors", ".non_ema.bin")  # fmt: skip
"""Endings of a network's file in a folder of diffusers, in the order in which they are looked for."""

Read = Callable[[str], bytes]
"""Name below the folder -> bytes; NotFoundError if there is none."""


def read_weights(url: str, folders: tuple[str, ...], read: Read) -> tuple[str, dict[str, Tensor]]:
    """(name, tensors) of the network in the first of the folders (with their slashes) that has one."""
    place = storage.redact(url)
    for folder in folders:
        for ending in LAYOUTS:
            name = f"{folder}{STEM}{ending}"
            try:
                data = read(name)
            except NotFoundError:
                continue
            if not ending.endswith(".index.json"):
                return name, parse_weights(data, f"{place}/{name}")
            return name, _read_shards(data, folder, name, place, read)
    inside = next((folder for folder in folders if storage.list_names(storage.join(url, folder))), "")
    raise SnapshotError(
        f"{place}/{inside}: has no weights ({STEM}.safetensors or .bin); {what_is_in(storage.join(url, inside))}"
    )


def what_is_in(url: str) -> str:
    """For messages: the first names of a folder."""
    names = storage.list_names(url)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it has {', '.join(names[:8])}{more}" if names else "there is nothing"


def _read_shards(index: bytes, folder: str, name: str, place: str, read: Read) -> dict[str, Tensor]:
    try:
        shards = sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise SnapshotError(f"{place}/{name}: not the index of a sharded file (weight_map)") from None
    found: dict[str, Tensor] = {}
    for shard in shards:
        try:
            found |= parse_weights(read(f"{folder}{shard}"), f"{place}/{folder}{shard}")
        except NotFoundError:
            raise SnapshotError(f"{place}/{folder}{shard}: missing, and {name} names it") from None
    return found


def parse_weights(data: bytes, source: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch.save file's bytes, by name; SnapshotError for anything else."""
    found = parse_file(data, source)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise SnapshotError(f"{source}: not a state dict: it holds other things than tensors by name")
    return found


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise SnapshotError(f"{source}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SnapshotError(f"{source}: expected a JSON object")
    return value


def parse_file(data: bytes, source: str) -> Any:
    """What a .safetensors or torch.save file holds; SnapshotError if it is neither, or wants code to be run."""
    if data.startswith(b"version https://git-lfs"):
        raise SnapshotError(f"{source}: a Git LFS pointer and not the file itself; fetch it by `git lfs pull`")
    if data.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise SnapshotError(f"{source}: an HTML page, not weights; was it behind a login?")
    try:
        if source.endswith(".safetensors"):
            return dict(safetensors.torch.load(data))
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error) and "Unsupported class" not in str(error):
            raise SnapshotError(
                f"{source}: no weights can be read from it: it is cut off, or of another kind"
            ) from None
        raise SnapshotError(
            f"{source}: no weights can be read from it without running code that it names.\n{ANEW}"
        ) from None
    except Exception as error:  # both parsers raise what they like on foreign bytes
        why = str(error).partition("\n")[0]
        raise SnapshotError(f"{source}: no weights can be read from it: {why}") from None


ANEW = """If you trust where it comes from, save its weights anew where it was made, and convert those:
  import torch
  found = torch.load("FILE", map_location="cpu", weights_only=False)
  torch.save(found.get("state_dict", found), "weights.pt")"""
"""Lightning's hyper-parameters are the usual reason."""
