"""The loss curves of recorded seeds. A change that alters them is a change of what is trained, and has to say so.

To renew the files: `DDPM_DIST_RENEW_GOLDEN=1 pytest tests/training/test_golden.py`, and give the reason in the commit.

The tolerance is for other processors, whose instructions add in another order. Without AVX-512, and without AVX2 as
well (ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41), these losses differ by up to 6e-8 of themselves; with a
learning rate that is wrong by a hundredth, by 3e-3 or more.
"""

import json
import os
from pathlib import Path

import pytest

from tests.integration import jobs, loop_ranks as loop
from tests.integration.loop_ranks import Faults

GOLDEN = Path(__file__).with_name("golden")
STEPS = 30
RELATIVE = 5e-6
COMMON = (
    f"train.steps={STEPS}",
    "run.seed=20260",
    "precision=fp32",
    "train.lr=1e-3",
    "train.max_micro_batch=16",
    "train.warmup_steps=10",
)
CURVES = {
    "paper": ("diffusion.prediction=eps", "diffusion.schedule=linear", "model.dropout=0", "data.flip=true"),
    "velocity": ("diffusion.prediction=v", "diffusion.schedule=sigmoid_alpha_bar", "model.dropout=0"),
    "learned_variance": (
        "diffusion.prediction=eps", "diffusion.schedule=cosine", "diffusion.variance=learned_range",
        "diffusion.loss=hybrid", "model.dropout=0", "train.optimizer=adamw", "train.weight_decay=0.01",
    ),
    "edm": (
        "diffusion.process=edm", "diffusion.schedule=linear", "diffusion.prediction=edm", "diffusion.times=log_normal",
        "diffusion.t_sampling=stratified", "model.dropout=0", "sampling.spacing=rho",
    ),
    "flow": (
        "diffusion.process=flow", "diffusion.schedule=linear", "diffusion.prediction=velocity",
        "diffusion.times=log_normal", "model.dropout=0",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = (tmp_path_factory.mktemp("digits") / "data").as_uri()
    jobs.make_digits(url)
    return url


@pytest.mark.parametrize("name", CURVES)
def test_the_loss_curve_is_the_recorded_one(name: str, data_url: str, tmp_path: Path) -> None:
    cfg = loop.config((tmp_path / "run").as_uri(), data_url, *COMMON, *CURVES[name])
    loop.finish(cfg, 1, Faults(record=str(tmp_path)))
    steps = loop.steps_of(tmp_path)
    losses = [steps[step]["loss"] for step in range(STEPS)]
    path = GOLDEN / f"{name}.json"
    if os.environ.get("DDPM_DIST_RENEW_GOLDEN") == "1":
        about = {"recipe": "configs/digits.yaml", "overrides": [*loop.TINY, *COMMON, *CURVES[name]]}
        path.write_text(json.dumps({**about, "loss": losses}, indent=1) + "\n")
    recorded = json.loads(path.read_text())
    assert losses == pytest.approx(recorded["loss"], rel=RELATIVE), (
        "what is trained has changed; see the top of this file"
    )
