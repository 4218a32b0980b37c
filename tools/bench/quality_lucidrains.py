"""The lucidrains arm of bench/quality.py; runs in an environment of its own, which has torchvision.

    PYTHON tools/bench/quality_lucidrains.py REAL.npy SAMPLES.npy COUNT JSON

REAL.npy: uint8 [N, C, H, W]. Writes COUNT samples in the same form. The library's network, v-prediction, sigmoid
schedule and Adam betas are its defaults; the loop is its Trainer's, without its files.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from ema_pytorch import EMA


def main(real_path: str, samples_path: str, count: int, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(int(settings["seed"]))
    real = torch.from_numpy(np.load(real_path))
    _, channels, size, _ = real.shape
    network = Unet(dim=32, dim_mults=(1, 2) if size == 8 else (1, 2, 2), channels=channels, flash_attn=False)
    print(f"lucidrains: {sum(p.numel() for p in network.parameters()):,} parameters", flush=True)
    diffusion = GaussianDiffusion(
        network,
        image_size=size,
        timesteps=1000,
        sampling_timesteps=50,
        ddim_sampling_eta=0.0,
        objective=settings.get("objective", "pred_v"),
        beta_schedule=settings.get("beta_schedule", "sigmoid"),
    )
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=float(settings["lr"]), betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=float(settings["ema"]), update_every=1, update_after_step=0)
    batch = int(settings["batch"])
    order = torch.empty(0, dtype=torch.long)
    for _ in range(int(settings["images"]) // batch):
        if len(order) < batch:
            order = torch.cat((order, torch.randperm(len(real))))
        loss = diffusion(real[order[:batch]].float() / 255)
        order = order[batch:]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    ema.ema_model.eval()
    parts = [ema.ema_model.sample(batch_size=min(256, count - done)) for done in range(0, count, 256)]
    images = (torch.cat(parts) * 255).round().clamp(0, 255).to(torch.uint8)
    np.save(samples_path, images.numpy())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
