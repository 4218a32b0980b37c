"""Which interface and address a process takes, and agreements between ranks."""

import os
import socket
from typing import Any

import psutil
import pytest
import torch

from ddpm_dist.engine import world as world_module
from ddpm_dist.engine.pieces import gather_full, shares
from ddpm_dist.engine.world import (
    World,
    broadcast_object,
    gather_objects,
    gather_tensor,
    interface_of,
    own_address,
)
from ddpm_dist.errors import ClusterError
from tests.engine.worker_group import run_ranks


def own_interfaces() -> list[tuple[str, str]]:
    """(name, IPv4 address) of this machine's interfaces but loopback."""
    return [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]


def test_the_interface_is_the_one_that_holds_the_address() -> None:
    for name, address in own_interfaces():
        assert interface_of(address) == name
        assert own_address(address) == address
    assert interface_of("127.0.0.1") is None
    assert interface_of("::1") is None
    assert interface_of("203.0.113.9") is None
    assert own_address("127.0.0.1") == "127.0.0.1"


def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(world_module, "own_address", lambda peer: "10.1.2.3")
    monkeypatch.setattr(world_module, "interface_of", lambda address: {"10.1.2.3": "eth7"}[address])
    world_module.use_interface_of("head.cluster")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7"


def test_errors_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ClusterError, match="WORLD_SIZE='two'"):
        world_module.init_world()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ClusterError, match=r"WORLD_SIZE is 2, but MASTER_ADDR"):
        world_module.init_world()
    with pytest.raises(ClusterError, match=r"MASTER_ADDR no\.such\.host\.invalid: no route"):
        own_address("no.such.host.invalid")


def agree(world: World) -> Any:
    return world, broadcast_object(world, f"from {world.rank}"), gather_objects(world, world.rank**2)


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_agree(size: int) -> None:
    for rank, (world, broadcast, gathered) in enumerate(run_ranks(agree, size)):
        assert world == World(rank, size, rank, torch.device("cpu"), "gloo")
        assert broadcast == "from 0"
        assert gathered == [i**2 for i in range(size)]


NUMBERS = [torch.tensor([-0.0, float("nan"), 1e-45]), torch.tensor([7.5, -0.0]), torch.tensor([float("inf")])]


def gather_unevenly(world: World) -> Any:
    """Three ranks own a parameter of 6 elements in uneven pieces, rank 1 alone another."""
    mine = [("a", [0, 3, 5][world.rank], len(NUMBERS[world.rank]))]
    tensors = [NUMBERS[world.rank]]
    if world.rank == 1:
        mine, tensors = [("b", 0, 1), *mine], [torch.tensor([3.0]), *tensors]
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([1])}
    times = torch.arange(2) + 10 * world.rank
    on_all, on_first = (dict(gather_full(tensors, mine, shapes, world, everywhere)) for everywhere in (True, False))
    return on_all, on_first, gather_tensor(world, times), gather_tensor(world, times / 3)


def test_what_ranks_own_comes_together_bit_for_bit() -> None:
    wanted = torch.cat(NUMBERS).view(2, 3)
    for rank, (found, on_first, times, thirds) in enumerate(run_ranks(gather_unevenly, 3)):
        assert on_first.keys() == (found.keys() if rank == 0 else set())
        for name, tensor in on_first.items():
            assert torch.equal(tensor.view(torch.int32), found[name].view(torch.int32))
        assert torch.equal(found["a"].view(torch.int32), wanted.view(torch.int32)), (
            "the sign of zero and NaN's bits, too"
        )
        assert found["b"] == 3.0
        assert times.tolist() == [0, 1, 10, 11, 20, 21]
        assert torch.equal(thirds, torch.tensor([0, 1, 10, 11, 20, 21]) / 3)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_shares_partition_the_parameters_evenly(size: int) -> None:
    numels = {"a": 5, "b": 1, "c": 17, "d": 40}
    parts = [shares(numels, rank, size) for rank in range(size)]
    elements = [(name, i) for part in parts for name, offset, numel in part for i in range(offset, offset + numel)]
    assert elements == [(name, i) for name, numel in numels.items() for i in range(numel)]
    sizes = [sum(numel for _, _, numel in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
