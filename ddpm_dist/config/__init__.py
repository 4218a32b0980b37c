"""The typed configuration of a run: every key, its unit, its default, and what it may be combined with.

A module for each theme holds its sections and, below them, what is refused; run.py puts them together. A key is one of
three kinds, which decides what happens when a run folder is used again: identity (the default): a difference is
refused; `Schedule`: may change between attempts, and the change is announced; `Free`: says where and how fast, never
what. The room never reads a file, and never looks at a machine.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.config.base import (
        Below1 as Below1,
        Positive as Positive,
        Precision as Precision,
        check_url as check_url,
    )
    from ddpm_dist.config.cluster import ClusterConfig as ClusterConfig, LoggingConfig as LoggingConfig
    from ddpm_dist.config.data import (
        DataConfig as DataConfig,
        default_streams as default_streams,
        streams_before_0_2 as streams_before_0_2,
    )
    from ddpm_dist.config.diffusion import DiffusionConfig as DiffusionConfig
    from ddpm_dist.config.model import ModelConfig as ModelConfig
    from ddpm_dist.config.run import Config as Config, RunConfig as RunConfig
    from ddpm_dist.config.sampling import EvaluationConfig as EvaluationConfig, SamplingConfig as SamplingConfig
    from ddpm_dist.config.training import (
        CheckpointConfig as CheckpointConfig,
        EmaConfig as EmaConfig,
        TrainConfig as TrainConfig,
        ZeroConfig as ZeroConfig,
    )

__all__, _asked = lazily(
    __name__,
    run="Config RunConfig",
    data="DataConfig default_streams streams_before_0_2",
    model="ModelConfig",
    diffusion="DiffusionConfig",
    training="TrainConfig EmaConfig ZeroConfig CheckpointConfig",
    sampling="SamplingConfig EvaluationConfig",
    cluster="ClusterConfig LoggingConfig",
    base="Below1 Positive Precision check_url",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
