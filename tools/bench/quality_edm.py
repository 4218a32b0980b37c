"""The edm arm of bench/quality.py: NVlabs' own network, loss and sampler, from a checkout of NVlabs/edm.

    PYTHON tools/bench/quality_edm.py DIR REAL.npy SAMPLES.npy COUNT JSON

REAL.npy: uint8 [N, C, H, W]. Writes COUNT samples in the same form. The network is DDPM++ (their SongUNet) cut to our
size, without augmentation; the optimizer and the removal of what isn't finite are their training loop's; sampled by
their 18 steps of Heun's method, 35 evaluations.
"""

import copy
import json
import sys
from typing import Any

import numpy as np
import torch


def main(checkout: str, real_path: str, samples_path: str, count: int, settings: dict[str, Any]) -> None:
    sys.path.insert(0, checkout)
    from generate import edm_sampler
    from training.loss import EDMLoss
    from training.networks import EDMPrecond

    torch.set_num_threads(1)
    torch.manual_seed(int(settings["seed"]))
    real = torch.from_numpy(np.load(real_path))
    _, channels, size, _ = real.shape
    levels = [1, 2] if size == 8 else [1, 2, 2]
    network = EDMPrecond(
        img_resolution=size, img_channels=channels, model_type="SongUNet", model_channels=32, channel_mult=levels,
        num_blocks=2, attn_resolutions=[size >> (len(levels) - 1)], dropout=0.0,
    )  # fmt: skip
    print(f"edm: {sum(p.numel() for p in network.parameters()):,} parameters", flush=True)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=float(settings["lr"]), betas=(0.9, 0.999), eps=1e-8)
    loss_of, batch, decay = EDMLoss(), int(settings["batch"]), float(settings["ema"])
    order = torch.empty(0, dtype=torch.long)
    for _ in range(int(settings["images"]) // batch):
        if len(order) < batch:
            order = torch.cat((order, torch.randperm(len(real))))
        images = real[order[:batch]].float() / 127.5 - 1
        order = order[batch:]
        optimizer.zero_grad()
        loss_of(network, images).sum().mul(1 / batch).backward()
        for parameter in network.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                kept.copy_(new.detach().lerp(kept, decay))
    with torch.no_grad():
        noise = [torch.randn(min(256, count - done), channels, size, size) for done in range(0, count, 256)]
        parts = [edm_sampler(average, latents, num_steps=18) for latents in noise]
    images = (torch.cat(parts) * 127.5 + 128).clip(0, 255).to(torch.uint8)
    np.save(samples_path, images.numpy())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
