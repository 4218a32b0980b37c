"""`run:`, and the whole: the sections side by side, and what one says that another must fit."""

from typing import Annotated

from pydantic import Field, model_validator

from ddpm_dist.config.base import Free, Precision, Section, Url, check_span
from ddpm_dist.config.cluster import ClusterConfig, LoggingConfig, check_cluster
from ddpm_dist.config.data import DataConfig, check_streams, default_streams
from ddpm_dist.config.diffusion import DiffusionConfig, check_diffusion
from ddpm_dist.config.model import ModelConfig, check_model
from ddpm_dist.config.sampling import EvaluationConfig, SamplingConfig, check_sampling
from ddpm_dist.config.training import (
    CheckpointConfig,
    EmaConfig,
    TrainConfig,
    ZeroConfig,
    check_ema,
    check_train,
    check_zero,
)

MOST_LOADERS = 4
"""Loader processes of a rank on a GPU, where nobody says how many."""


class RunConfig(Section):
    """Which run this is."""

    url: Free[Url]
    """Folder of the run (any fsspec URL): state, snapshots, TensorBoard, samples. The same URL resumes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes the weights, the order of the data, t, eps, flips and dropout."""
    init_from: Url | None = None
    """URL of another run's folder, state or snapshot whose weights this run starts from. What the recipe leaves open
    in model and diffusion is taken from there."""
    init_changes: tuple[str, ...] = ()
    """Keys that are meant to differ from run.init_from's, such as diffusion.prediction; others are refused."""


def check_folders(run_url: str, data_url: str | dict[str, float]) -> None:
    """ValueError where the run would write into the folder of its data set."""
    for url in [data_url] if isinstance(data_url, str) else data_url:
        if url.rstrip("/") == run_url.rstrip("/"):
            raise ValueError(f"run.url: {run_url} is data.url; give the run a folder of its own")


class Config(Section):
    """A run as a whole; one that exists can be trained. Made of YAML by `recipe.load_config`, and frozen."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig
    ema: EmaConfig = EmaConfig()
    precision: Precision = "bf16"
    """Of forward and backward; masters, moments and gradient accumulation stay float32."""
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        batch = self.train.global_batch
        if self.cluster.gpus_per_worker and "workers" not in self.data.model_fields_set:
            number = max(1, min(MOST_LOADERS, self.threads - 1))  # written down with the run, as if it had been given
            object.__setattr__(self, "data", self.data.model_copy(update={"workers": number}))
        check_folders(self.run.url, self.data.url)
        check_model(self.model, self.data.image_size)
        check_diffusion(self.diffusion, self.model.num_classes)
        check_sampling(self.sampling, self.diffusion)
        check_streams(self.streams, batch)
        check_train(self.train)
        check_span("logging.profile_steps", self.logging.profile_steps)
        check_ema(self.ema)
        check_zero(self.zero, self.precision, on_gpu=self.cluster.gpus_per_worker > 0)
        check_cluster(self.cluster, self.worker_range, batch)
        return self

    @property
    def streams(self) -> int:
        """Canonical streams S."""
        return self.data.streams or default_streams(self.train.global_batch)

    @property
    def threads(self) -> int:
        """Threads of torch in a worker."""
        return max(1, int(self.cluster.cpus_per_worker))

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most training processes."""
        workers = self.cluster.workers
        return workers if isinstance(workers, tuple) else (workers, workers)
