"""What is left of a node's memory, and of control groups of either version, read from trees as Linux makes them."""

from pathlib import Path

from ddpm_dist.host_memory import UNKNOWN, available_bytes


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, usage: int, inactive: int, version: int) -> dict[str, str]:
    names = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    return {
        f"{folder}/memory.{names[0]}": f"{limit}\n",
        f"{folder}/memory.{names[1]}": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 1\n{names[2]}inactive_file {inactive}\n{names[2]}active_file 7\n",
    }


NODE = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   500 kB\n"}


def test_without_groups_the_node_decides_and_without_linux_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == UNKNOWN
    assert available_bytes(write(tmp_path, NODE)) == 500 * 1024


def test_version_2_counts_each_group_up_to_the_outermost(tmp_path: Path) -> None:
    write(tmp_path, {**NODE, "proc/self/cgroup": "0::/pod/worker\n"})
    base = "sys/fs/cgroup"
    write(tmp_path, group(f"{base}/pod/worker", "max", 10, 0, 2))
    assert available_bytes(tmp_path) == 500 * 1024
    write(tmp_path, group(f"{base}/pod", "400000", 300000, 50000, 2))
    assert available_bytes(tmp_path) == 150007
    write(tmp_path, group(f"{base}/pod/worker", "1000", 5000, 0, 2))
    assert available_bytes(tmp_path) == 0, "above its limit"


def test_version_1_and_a_container_that_sees_only_its_own_mount(tmp_path: Path) -> None:
    write(tmp_path, {**NODE, "proc/self/cgroup": "4:memory:/of/the/host\n3:cpu,cpuacct:/\n0::/\n"})
    write(tmp_path, group("sys/fs/cgroup/memory", "9000", 5000, 500, 1))
    assert available_bytes(tmp_path) == 4507


def test_here_it_is_a_number_of_bytes() -> None:
    assert 0 < available_bytes() <= UNKNOWN
