"""Freed memory stays with the process: a step that repeats itself causes no page faults."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys, threading
import torch
from ddpm_dist.allocator import keep_freed_memory

torch.set_num_threads(1)

def step():
    for _ in range(4):
        [torch.ones(10_000_000) for _ in range(4)]

def main():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "kept":
    keep_freed_memory()
if sys.argv[2] == "main":
    main()
else:  # where Ray Train runs the training
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("thread", ["main", "other"])
def test_a_step_that_repeats_itself_takes_no_new_pages(thread):
    faults = {}
    for how in ("kept", "default"):
        command = [sys.executable, "-c", STEPS, how, thread]
        faults[how] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert faults["kept"] < 100
    assert faults["default"] > 1000
