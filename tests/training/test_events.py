"""What TensorBoard shows of a run: curves that a later attempt overwrites, and a picture of images."""

from pathlib import Path

import torch

from ddpm_dist.training.events import EventLog, image_grid, read_events


def test_a_later_attempt_overwrites_the_steps_that_were_lost(tmp_path: Path) -> None:
    url = tmp_path.as_uri()
    first = EventLog(url, attempt=1, start_step=0)
    for step in range(1, 6):
        first.scalars({"loss/mean": 1.0}, step)
    first.close()
    second = EventLog(url, attempt=2, start_step=3)  # the state of step 3 was the last one
    second.image("samples", torch.zeros(1, 4, 4, dtype=torch.uint8), 4)
    for step in (4, 5):
        second.scalars({"loss/mean": 2.0}, step)
    second.close()
    events = read_events(url)
    assert [value for step, value in events.scalars["loss/mean"] if step > 3] == [2.0, 2.0]
    assert [step for step, _ in events.images["samples"]] == [4]


def test_the_grid_of_five_images() -> None:
    grid = image_grid(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2), columns=3)
    assert grid.shape == (3, 5, 8)
    assert grid[0, 3, 3] == 4
    assert grid[0, 2, 0] == 128
