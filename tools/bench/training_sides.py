"""The sides of tools/bench/training.py: processes on given cores that train so many steps when they are told to.

All of them train the same network on batches of the same size. Each rank of a side is a process; the parent tells all
ranks of one side to go on and waits for them, so two sides never compute at the same time.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported, here and in every process started from here
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ddpm_dist import snapshot, storage  # noqa: E402
from ddpm_dist.cluster.memory import Memory  # noqa: E402
from ddpm_dist.config import Config  # noqa: E402
from ddpm_dist.engine.engine import Engine  # noqa: E402
from ddpm_dist.engine.world import World, broadcast_object, init_world  # noqa: E402
from ddpm_dist.training import run_folder  # noqa: E402
from ddpm_dist.training.entry import finished  # noqa: E402
from ddpm_dist.training.loop import Training  # noqa: E402
from ddpm_dist.training.step import BatchPlan, to_model_range  # noqa: E402
from tools.local.s3_server import free_port  # noqa: E402

IMAGES = 2048
"""Images in memory, for the sides that take them from there."""
Turn = dict[str, Any]
"""What rank 0 tells of its turn: at least `seconds`."""
Train = Callable[[World, Config, int, "Turns"], None]


class Turns:
    """A rank's side of taking turns."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._began: float | None = None

    def wait(self, **told: Any) -> None:
        """Ends this rank's turn, tells of it, and waits for the next one."""
        if self._began is not None:
            self._pipe.send({"seconds": time.perf_counter() - self._began, **told})
        self._pipe.recv()
        self._began = time.perf_counter()


class Side:
    """`size` processes that train in one way, on `cores` in turn."""

    def __init__(self, train: Train, size: int, cores: Sequence[int], cfg: Config, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._images = steps * cfg.train.global_batch
        self._pipes, self._processes = [], []
        port = free_port()
        for rank in range(size):
            mine, theirs = context.Pipe()
            arguments = (theirs, train, rank, size, port, cores[rank % len(cores)], cfg, steps)
            self._processes.append(context.Process(target=_main, args=arguments))
            self._pipes.append(mine)

    def __enter__(self) -> "Side":
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def turn(self) -> Turn:
        """What rank 0 tells of its next turn; `rate`: images/s of all ranks together."""
        for pipe in self._pipes:
            pipe.send("go")
        while waiting := [pipe for pipe in self._pipes if not pipe.poll(0.1)]:
            if not all(process.is_alive() for process in self._processes):
                raise SystemExit(f"a process of the benchmark ended, {len(waiting)} others wait; its words are above")
        told = [pipe.recv() for pipe in self._pipes]
        return {**told[0], "rate": self._images / max(turn["seconds"] for turn in told)}


def _main(pipe: Any, train: Train, rank: int, size: int, port: int, core: int, cfg: Config, steps: int) -> None:
    os.sched_setaffinity(0, {core})
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    train(init_world(), cfg, steps, Turns(pipe))


# Ours


def ours(world: World, cfg: Config, steps: int, turns: Turns, kind: "type[InTurns] | None" = None) -> None:
    """The whole system: stream from S3, DeepSpeed, averages, logging, checkpoints."""
    token = run_folder.new_token()
    if world.is_first:
        finished(cfg, token)
    (kind or InTurns)(cfg, world, broadcast_object(world, token), steps, turns).run()


class InTurns(Training):
    """Training in turns of so many steps, each with its checkpoints in the middle.

    A turn ends when all in the background is done, so that none of it is left to the other side's.
    """

    def __init__(
        self, cfg: Config, world: World, token: str, steps: int, turns: Turns, memory: Memory | None = None
    ) -> None:
        super().__init__(cfg, world, token, memory=memory)
        self._turns, self._steps, self._length = turns, steps, 0
        self._starts: list[float] = []
        self._ema_s: list[float] = []
        update = self.ema.update

        def timed(step: int, batch: int) -> None:
            start = time.perf_counter()
            update(step, batch)
            self._ema_s.append(time.perf_counter() - start)

        self.ema.update = timed  # type: ignore[method-assign]

    def _one_step(self, batch: Any) -> Any:
        if not self._starts or len(self._starts) == self._length:
            self._end_turn()
        self._starts.append(time.perf_counter())
        return super()._one_step(batch)

    def _end_turn(self) -> None:
        ends = [*self._starts[1:], time.perf_counter()]
        step_s = [end - start for start, end in zip(self._starts, ends, strict=False)]
        first, every = self.step - len(self._starts), self.cfg.checkpoint.every_steps
        saving = [(first + i + 1) % every == 0 for i in range(len(self._starts))]
        self.store.finish()
        self._turns.wait(step_s=step_s, saving=saving, ema_s=self._ema_s, **self._about_turn())
        # The first turn is half a turn longer, so that checkpoints lie in the middle of all others.
        self._length = self._steps if self._starts else self._steps + self._steps // 2
        self._starts, self._ema_s = [], []

    def _about_turn(self) -> dict[str, Any]:
        """What else is told of a turn that has ended."""
        return {}


def engine_saving(world: World, cfg: Config, steps: int, turns: Turns) -> None:
    """Our engine on images in memory, with DeepSpeed's own save_checkpoint and an upload once in a turn."""
    plan = BatchPlan.of(cfg.train.global_batch, world.size, cfg.train.max_micro_batch)
    engine = Engine(snapshot.build(cfg)[0], cfg, world, plan.micro_batch, plan.accumulation)
    batches = _Memory(cfg, world)
    turns.wait()
    turn = 0
    while True:
        step_s, turn = [], turn + 1
        for i in range(steps):
            start = time.perf_counter()
            for x, t, eps in batches.micro(plan.micro_batch):
                engine.backward((engine(x, t) - eps).square().mean())
            engine.step(cfg.train.lr)
            if i == steps // 2:
                with tempfile.TemporaryDirectory() as folder:
                    engine._ds.save_checkpoint(folder, tag="state")
                    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                        storage.upload(file, storage.join(cfg.run.url, f"deepspeed/{turn}", file.name))
            step_s.append(time.perf_counter() - start)
        turns.wait(step_s=step_s, saving=[i == steps // 2 for i in range(steps)])


# The others


class _Memory:
    """Random images in memory, and what a training step needs of the forward process."""

    def __init__(self, cfg: Config, world: World) -> None:
        shape = (IMAGES, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8)
        alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0).float()
        self._signal, self._noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self._share = cfg.train.global_batch // world.size

    def micro(self, size: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """(x_t, t, eps) of each micro-batch of a step."""
        for _ in range(self._share // size):
            x = to_model_range(self.images[torch.randint(0, IMAGES, (size,))])
            t, eps = torch.randint(0, 1000, (size,)), torch.randn_like(x)
            yield self._signal[t].view(-1, 1, 1, 1) * x + self._noise[t].view(-1, 1, 1, 1) * eps, t, eps


def bare(world: World, cfg: Config, steps: int, turns: Turns) -> None:
    """A bare PyTorch loop on tensors in memory, under DDP where there are several ranks: forward, backward, clip, Adam.

    bf16 as in our engine: bf16 weights and activations, float32 masters. No averages, no log, no checkpoint.
    """
    plan = BatchPlan.of(cfg.train.global_batch, world.size, cfg.train.max_micro_batch)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision]
    network: nn.Module = snapshot.build(cfg)[0].to(dtype)
    weights: list[Any] = list(network.parameters())
    masters: list[Any] = weights if dtype == torch.float32 else [w.detach().float().requires_grad_() for w in weights]
    adam = torch.optim.Adam(masters, lr=cfg.train.lr, fused=True)
    if world.size > 1:
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    batches = _Memory(cfg, world)
    while True:
        turns.wait()
        for _ in range(steps):
            for x, t, eps in batches.micro(plan.micro_batch):
                loss = (network(x.to(dtype), t).float() - eps).square().mean() / plan.accumulation
                loss.backward()
            if masters is not weights:
                for master, weight in zip(masters, weights, strict=True):
                    assert weight.grad is not None
                    master.grad = weight.grad.float()
            nn.utils.clip_grad_norm_(masters, cfg.train.grad_clip, foreach=True)
            adam.step()
            if masters is not weights:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            for weight in weights:
                weight.grad = None


def diffusers(world: World, cfg: Config, steps: int, turns: Turns) -> None:
    """The loop of diffusers' examples/unconditional_image_generation/train_unconditional.py, with accelerate and EMA.

    Its images come from memory here, and it neither logs to a tracker nor checkpoints.
    """
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    plan = BatchPlan.of(cfg.train.global_batch, world.size, cfg.train.max_micro_batch)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="no" if cfg.precision == "fp32" else "bf16",
        gradient_accumulation_steps=plan.accumulation,
    )
    settings = snapshot.build(cfg)[0].config.to_diffusers()
    settings.pop("_class_name")
    model = UNet2DModel(**settings)
    ema_model = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, model_cls=UNet2DModel,
        model_config=model.config,
    )  # fmt: skip
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    images = to_model_range(_Memory(cfg, world).images)
    loader: Any = torch.utils.data.DataLoader(images, batch_size=plan.micro_batch, shuffle=True)  # type: ignore[arg-type]
    lr_scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10**6)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    done = 0
    turns.wait()
    while True:
        for clean_images in loader:
            noise = torch.randn(clean_images.shape, dtype=clean_images.dtype)
            timesteps = torch.randint(0, 1000, (clean_images.shape[0],)).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                model_output = model(noisy_images, timesteps).sample
                loss = torch.nn.functional.mse_loss(model_output.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema_model.step(model.parameters())
                done += 1
                loss.detach().item()  # it logs each step's loss
                if done % steps == 0:
                    turns.wait()
