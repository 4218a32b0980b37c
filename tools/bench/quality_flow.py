"""The flow arm of bench/quality.py: flow_matching's own path, network and solver, from a checkout of the library.

    PYTHON tools/bench/quality_flow.py DIR REAL.npy SAMPLES.npy COUNT JSON

REAL.npy: uint8 [N, C, H, W]. Writes COUNT samples in the same form. As its image example trains CIFAR-10: its U-Net cut
to our size, skewed times, AdamW with betas 0.9 and 0.95, an average that rises; sampled by Heun's method on EDM's
times, 25 of them, 50 evaluations (its solver comes from torchdiffeq, which the environment has to have).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(checkout: str, real_path: str, samples_path: str, count: int, settings: dict[str, Any]) -> None:
    sys.path[:0] = [checkout, str(Path(checkout) / "examples" / "image")]
    from flow_matching.path import CondOTProbPath
    from flow_matching.solver.ode_solver import ODESolver
    from models.ema import EMA
    from models.unet import UNetModel
    from training.edm_time_discretization import get_time_discretization

    torch.set_num_threads(1)
    torch.manual_seed(int(settings["seed"]))
    real = torch.from_numpy(np.load(real_path))
    _, channels, size, _ = real.shape
    levels = (1, 2) if size == 8 else (1, 2, 2)
    model = UNetModel(
        in_channels=channels, model_channels=32, out_channels=channels, num_res_blocks=2,
        attention_resolutions=(2 ** (len(levels) - 1),), dropout=0.0, channel_mult=levels, conv_resample=False,
        num_heads=1, use_scale_shift_norm=True, use_new_attention_order=True,
    )  # fmt: skip
    print(f"flow: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    ema, path, batch = EMA(model, decay=float(settings["ema"])), CondOTProbPath(), int(settings["batch"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(settings["lr"]), betas=(0.9, 0.95))
    order = torch.empty(0, dtype=torch.long)
    for _ in range(int(settings["images"]) // batch):
        if len(order) < batch:
            order = torch.cat((order, torch.randperm(len(real))))
        images = real[order[:batch]].float() / 127.5 - 1
        order = order[batch:]
        t = (1 / (1 + (torch.randn(batch) * 1.2 - 1.2).exp())).clip(0.0001, 1.0)  # its skewed_timestep_sample
        sample = path.sample(t=t, x_0=torch.randn_like(images), x_1=images)
        optimizer.zero_grad()
        (ema(sample.x_t, t, extra={}) - sample.dx_t).square().mean().backward()
        optimizer.step()
        ema.update_ema()
    ema.eval()
    solver = ODESolver(velocity_model=lambda x, t: ema(x, t.expand(len(x)).float(), extra={}))
    with torch.no_grad():
        parts = [
            solver.sample(
                x_init=torch.randn(min(256, count - done), channels, size, size), method="heun2", step_size=None,
                time_grid=get_time_discretization(nfes=25).float(),
            )
            for done in range(0, count, 256)
        ]  # fmt: skip
    images = ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    np.save(samples_path, images.numpy())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
