"""The typed configuration of a run: every key, its unit, its default, and what it may be combined with.

A key is one of three kinds, which decides what happens when a run folder is used again:
identity (the default): a difference is refused; `Schedule`: may change between attempts, and the change
is announced; `Free`: says where and how fast, never what.
"""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")
Schedule = Annotated[T, "schedule"]
Free = Annotated[T, "free"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "fp16"]


def check_url(url: str) -> str:
    """The URL itself; ValueError with the remedy for what is none, or holds what must not be stored."""
    protocol, colon, rest = url.partition("://")
    if not colon or not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) or (protocol == "file" and rest[:1] != "/"):
        raise ValueError("not an absolute URL; write s3://BUCKET/FOLDER or file:///FOLDER")
    if protocol != "file" and ("?" in rest or "@" in rest.partition("/")[0]):
        raise ValueError("keys and options don't belong into a URL: it is stored and logged; use the environment")
    return url


Url = Annotated[str, AfterValidator(check_url)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class RunConfig(Section):
    url: Free[Url]
    """Folder of the run (any fsspec URL): state, snapshots, TensorBoard, samples. The same URL resumes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes the weights, the order of the data, t, eps, flips and dropout."""
    init_from: Url | None = None
    """URL of another run's folder, state or snapshot whose weights this run starts from."""


class DataConfig(Section):
    url: Free[Url | Annotated[dict[Url, Annotated[float, Field(gt=0)]], Field(min_length=1)]]
    """Folder with shards and index, or a mapping of such folders to mixing weights."""
    image_size: Positive
    """Height and width in pixels that the network sees; other sizes are resized and centre-cropped."""
    channels: Literal[1, 3] = 3
    """Grey or RGB, to which all images are converted."""
    flip: bool = False
    """Random horizontal flips, by (seed, epoch, sample)."""
    streams: Positive | None = None
    """Canonical streams S that the shards are dealt to; divides the global batch. Default: the largest
    divisor of the global batch up to 32."""
    shuffle_block: Positive = 4096
    """Samples of a stream that are permuted together."""
    workers: Free[Count] = 0
    """Loader processes per rank; 0 decodes in a thread."""
    read_ahead: Free[Positive] = 4
    """Objects fetched at once by a rank."""
    buffer_bytes: Free[Positive] = 2**31
    """Most memory of a rank for shuffle blocks: one of each of its streams and one more have to fit (checked at the
    start, at the smallest number of workers); what is left is used to read ahead."""
    cache_dir: Free[str | None] = None
    """Local folder for fetched shards; none by default."""
    cache_bytes: Free[Positive] = 2**36
    max_bad_fraction: Free[Fraction] = 0.0
    """Share of samples that may fail to decode before the run stops."""
    exclude_shards: Schedule[tuple[str, ...]] = ()
    """Names of shards to leave out; this makes a new content id, recorded with its step."""


class ModelConfig(Section):
    channels: Annotated[int, Field(ge=4)] = 128
    """Channels of the first level (ch)."""
    channel_mult: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 2, 2)
    num_res_blocks: Positive = 2
    attention_resolutions: tuple[Positive, ...] = (16,)
    """Heights of the feature maps that get self-attention after every block."""
    dropout: Below1 = 0.0
    head_channels: Positive | None = None
    """Channels of an attention head; none: one head (the paper)."""
    norm_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    scale_shift: bool = False
    """The time embedding scales and shifts the second normalisation (ADM), instead of being added."""
    resample: Literal["conv", "resblock"] = "conv"
    """Strided convolution (the paper) or residual blocks (ADM, BigGAN) between the levels."""
    num_classes: Positive | None = None
    """Classes of a conditional network; the null class of guidance is an extra last row."""
    checkpoint_levels: Free[tuple[Count, ...]] = ()
    """Levels whose activations are recomputed in the backward pass (0 is the full resolution)."""
    channels_last: Free[bool] = False
    """Memory layout of the activations: for GPUs with tensor cores; on CPUs it is slower (NOTES.md, "The network")."""
    compile: Free[bool] = False
    """torch.compile of the network in training, for GPUs: it costs the first step minutes, and on CPUs the others, too
    (NOTES.md, "Compiling")."""


class DiffusionConfig(Section):
    timesteps: Annotated[int, Field(ge=1, le=10**6)] = 1000
    schedule: Literal["linear", "scaled_linear", "quadratic", "cosine", "sigmoid", "sigmoid_alpha_bar", "given"] = (
        "linear"
    )
    """Shape of beta (sigmoid: diffusers' one) or of alpha_bar (cosine, and sigmoid_alpha_bar of Jabri et al. 2022).
    scaled_linear and quadratic are two names of one shape."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 2e-2
    betas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """The betas themselves, for schedule: given."""
    zero_terminal_snr: bool = False
    prediction: Literal["eps", "x_start", "v", "x_prev"] = "eps"
    variance: Literal["fixedsmall", "fixedlarge", "learned", "learned_range"] = "fixedlarge"
    loss: Literal["simple", "vlb", "hybrid"] = "simple"
    vlb_weight: Annotated[float, Field(gt=0)] = 1e-3
    """Weight of the variational bound in the hybrid loss (Improved DDPM's lambda)."""
    weighting: Literal["none", "min_snr", "p2"] = "none"
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    p2_gamma: Annotated[float, Field(ge=0)] = 1.0
    p2_k: Annotated[float, Field(gt=0)] = 1.0
    t_sampling: Literal["uniform", "stratified", "loss_second_moment"] = "uniform"
    label_dropout: Fraction = 0.0
    """Probability that a training sample's class is replaced by the null class (for guidance)."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last x_t holds no signal at all."""
        return self.zero_terminal_snr or (self.betas is not None and self.betas[-1] == 1)


class TrainConfig(Section):
    steps: Schedule[Annotated[int, Field(ge=1, le=10**12)]]
    """Optimizer steps of the whole run; may grow later."""
    global_batch: Positive
    """Images in an optimizer step, over all ranks (B)."""
    max_micro_batch: Free[Positive] = 128
    """Most images in one forward pass of a rank; the micro-batch is the largest divisor of B/W up to it."""
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Below1, Below1] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    warmup_steps: Count = 5000
    """Steps in which the rate rises linearly from 0."""
    decay_steps: Positive | None = None
    """Step at which the cosine reaches 0."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest L2 norm of the gradient of the global batch."""
    max_nonfinite_steps: Free[Positive] = 20
    """Skipped steps in a row (loss or gradient not finite) after which the run stops."""


class EmaConfig(Section):
    decay: Fraction | None = 0.9999
    """Constant decay per step (the paper); exclusive with halflife_Mimg."""
    halflife_Mimg: Annotated[float, Field(gt=0)] | None = None
    """Half-life in millions of images, independent of the batch size."""
    warmup: bool = False
    """Decay min(decay, (1 + step) / (10 + step)), so that early steps don't weigh on the average."""
    power: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = ()
    """Relative widths of further power-function averages (EDM2), for tools/posthoc_ema.py."""


class ZeroConfig(Section):
    stage: Free[Literal[0, 1, 2, 3]] = 1
    offload_optimizer: Free[bool] = False
    """Moments and masters in host memory, with DeepSpeedCPUAdam."""


class CheckpointConfig(Section):
    every_steps: Free[Positive] = 1000
    keep_last: Free[Positive] = 2
    """Newest states that are kept; at least two, so that a damaged one has a predecessor. That of the best evaluated
    snapshot stays as well."""
    keep_every_steps: Free[Positive | None] = None
    """States at multiples of this are kept for ever."""
    snapshot_every_steps: Schedule[Positive] = 10000
    """EMA weights to sample from, as a diffusers folder; snapshots are kept."""


class SamplingConfig(Section):
    sampler: Free[Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc"]] = "ddpm"
    steps: Free[Positive | None] = None
    """Times visited by the sampler; none: all of them."""
    spacing: Free[Literal["uniform", "quadratic", "trailing", "log_snr"]] = "uniform"
    """How the visited times are spread, where they are not all; log_snr suits dpmpp_2m, unipc and heun."""
    eta: Free[Fraction | None] = None
    """DDIM's eta: 0 deterministic (the default), 1 as ancestral sampling."""
    clip: Free[Literal["none", "static", "dynamic"]] = "static"
    """What happens to x_start before each step: nothing, clip to [-1, 1], or dynamic thresholding."""
    dynamic_quantile: Free[Fraction] = 0.995
    guidance_scale: Free[Annotated[float, Field(ge=0)]] = 1.0
    """Classifier-free guidance: 1 is none, larger is stronger."""
    guidance_interval: Free[tuple[Count, Count] | None] = None
    """First and last t in which guidance is active; none: always."""
    batch_size: Free[Positive | None] = None
    """Images in one forward pass; none: found by memory once and fixed in the job's manifest."""
    precision: Free[Precision] = "fp32"
    unit_size: Free[Positive] = 256
    """Consecutive images in one output shard, the unit of work."""
    format: Free[Literal["png", "raw"]] = "png"


class EvaluationConfig(Section):
    every: Free[Positive | None] = None
    """Evaluate each snapshot at a multiple of so many steps, in a Ray job of its own; none: never."""
    num_samples: Free[Positive] = 10000
    metrics: Free[Annotated[tuple[str, ...], Field(min_length=1)]] = ("frechet_pixel", "frechet_lite0")
    networks: Free[dict[str, Url]] = {}
    """Weights of feature networks by name, as `--network` of launch/evaluate.py: inception, or a TorchScript module."""


class ClusterConfig(Section):
    workers: Free[Positive | tuple[Positive, Positive]] = 1
    """Training processes, or [min, max] for an elastic run."""
    cpus_per_worker: Free[Annotated[float, Field(gt=0)]] = 1
    gpus_per_worker: Free[Annotated[float, Field(ge=0)]] = 0
    max_failures: Free[Annotated[int, Field(ge=-1)]] = 10
    """Attempts that may fail before the run is given up; -1: no limit."""
    wait_seconds: Free[Annotated[float, Field(gt=0)]] = 60
    """How long to wait for the resources of the smallest admissible size."""
    hang_seconds: Free[Annotated[float, Field(gt=0)]] = 300
    """Floor of the heartbeat's limit for one step."""


class LoggingConfig(Section):
    every_steps: Free[Positive] = 50
    grid_images: Free[Count] = 16
    """Images of the EMA sample grid written to TensorBoard with each snapshot; 0: none."""
    grid_steps: Free[Positive] = 50
    """Network evaluations for such a grid, by deterministic DDIM."""
    peak_tflops: Free[Annotated[float, Field(gt=0)] | None] = None
    """Peak of one worker's device in the run's precision, in 10^12 FLOP/s, for the model FLOPs utilisation."""
    profile_steps: Free[tuple[Count, Count] | None] = None
    """First and last step of a torch profiler trace."""


class Config(Section):
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
        for check in (_check_model, _check_diffusion, _check_sampling, _check_train, _check_cluster):
            check(self)
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


def default_streams(global_batch: int) -> int:
    """The largest divisor of the global batch up to 32."""
    return max(s for s in range(1, min(global_batch, 32) + 1) if global_batch % s == 0)


def _check_model(cfg: Config) -> None:
    model, size = cfg.model, cfg.data.image_size
    halvings = len(model.channel_mult) - 1
    if size % 2**halvings:
        raise ValueError(
            f"data.image_size: {size} can't be halved {halvings} times, as the {halvings + 1} levels of "
            f"model.channel_mult want; use a multiple of {2**halvings} or fewer levels"
        )
    for level, mult in enumerate(model.channel_mult):
        if model.channels * mult % model.norm_groups:
            raise ValueError(
                f"model.norm_groups: {model.norm_groups} doesn't divide the {model.channels * mult} channels "
                f"of level {level}"
            )
        attends = level == halvings or size >> level in model.attention_resolutions
        if model.head_channels and attends and model.channels * mult % model.head_channels:
            raise ValueError(
                f"model.head_channels: {model.head_channels} doesn't divide the {model.channels * mult} "
                f"channels of level {level}"
            )
    for level in model.checkpoint_levels:
        if level > halvings:
            raise ValueError(f"model.checkpoint_levels: {level}: the network has the levels 0 to {halvings}")
    resolutions = [size >> level for level in range(halvings + 1)]
    for resolution in model.attention_resolutions:
        if resolution not in resolutions:
            raise ValueError(
                f"model.attention_resolutions: {resolution} is not among the resolutions {resolutions} of the levels"
            )


def _check_diffusion(cfg: Config) -> None:
    d = cfg.diffusion
    if d.beta_start > d.beta_end:
        raise ValueError(f"diffusion.beta_start: {d.beta_start} is more than diffusion.beta_end: {d.beta_end}")
    if (d.schedule == "given") != (d.betas is not None):
        raise ValueError("diffusion.betas: needed with diffusion.schedule: given, and with nothing else")
    if d.betas is not None and len(d.betas) != d.timesteps:
        raise ValueError(f"diffusion.betas: {len(d.betas)} values for {d.timesteps} diffusion.timesteps")
    if d.betas is not None and 1 in d.betas[:-1]:
        raise ValueError(
            f"diffusion.betas: beta[{d.betas.index(1)}] is 1, after which no image is left; only the last may"
        )
    if d.variance in ("learned", "learned_range") and d.loss == "simple":
        raise ValueError(
            f"diffusion.loss: simple gives diffusion.variance: {d.variance} no gradient; use hybrid or vlb"
        )
    if d.loss == "hybrid" and d.variance not in ("learned", "learned_range"):
        raise ValueError(
            f"diffusion.loss: hybrid adds a term that trains the variance alone, and diffusion.variance: {d.variance} "
            "is fixed; use loss: simple or vlb, or variance: learned_range"
        )
    if d.weighting != "none" and d.loss == "vlb":
        raise ValueError(f"diffusion.weighting: {d.weighting} weighs the squared error, which loss: vlb doesn't have")
    if d.weighting != "none" and d.ends_in_noise:
        raise ValueError(
            f"diffusion.weighting: {d.weighting} gives the last t, whose SNR is 0 (zero_terminal_snr, or a last beta "
            "of 1), no weight; use weighting: none"
        )
    if d.label_dropout and not cfg.model.num_classes:
        raise ValueError("diffusion.label_dropout: needs model.num_classes")
    if d.ends_in_noise and d.prediction == "eps":
        raise ValueError(
            "diffusion.prediction: eps says nothing about x_start at the last t, whose SNR is 0 (zero_terminal_snr, or "
            "a last beta of 1); use v or x_start"
        )
    if d.zero_terminal_snr and d.timesteps == 1:
        raise ValueError("diffusion.zero_terminal_snr: needs at least 2 diffusion.timesteps")


def _check_sampling(cfg: Config) -> None:
    d, sampling = cfg.diffusion, cfg.sampling
    if sampling.steps and sampling.steps > d.timesteps:
        raise ValueError(
            f"sampling.steps: {sampling.steps} can't be taken out of {d.timesteps} diffusion.timesteps; "
            f"use 1 to {d.timesteps}"
        )
    if sampling.eta is not None and sampling.sampler != "ddim":
        raise ValueError(
            f"sampling.eta: {sampling.eta} has no meaning for sampling.sampler: {sampling.sampler}; only ddim has eta, "
            "leave it out"
        )
    if sampling.guidance_interval and sampling.guidance_interval[1] >= d.timesteps:
        raise ValueError(
            f"sampling.guidance_interval: {list(sampling.guidance_interval)} reaches beyond the last t, "
            f"{d.timesteps - 1}; give first and last t"
        )
    if d.ends_in_noise and sampling.steps and sampling.spacing == "quadratic":
        raise ValueError(
            "sampling.spacing: quadratic doesn't start at the last t, as a process needs whose last SNR is 0 "
            "(zero_terminal_snr, or a last beta of 1); use uniform, trailing or log_snr"
        )
    if d.variance == "learned" and sampling.sampler == "ddpm" and (sampling.steps or d.timesteps) < d.timesteps:
        raise ValueError(
            f"sampling.steps: {sampling.steps}; diffusion.variance: learned is that of single steps, not of longer "
            "ones; use all steps, another sampler, or learned_range"
        )


def _check_train(cfg: Config) -> None:
    t, batch = cfg.train, cfg.train.global_batch
    if batch % cfg.streams:
        raise ValueError(f"data.streams: {cfg.streams} doesn't divide train.global_batch: {batch}")
    if t.lr_schedule == "cosine" and t.decay_steps is None:
        raise ValueError("train.decay_steps: needed with train.lr_schedule: cosine")
    if t.lr_schedule != "cosine" and t.decay_steps is not None:
        raise ValueError(f"train.decay_steps: train.lr_schedule: {t.lr_schedule} doesn't use it; leave it out")
    if t.decay_steps is not None and t.decay_steps <= t.warmup_steps:
        raise ValueError(f"train.decay_steps: {t.decay_steps} lies within train.warmup_steps: {t.warmup_steps}")
    for name, span in (("logging.profile_steps", cfg.logging.profile_steps),
                       ("sampling.guidance_interval", cfg.sampling.guidance_interval)):  # fmt: skip
        if span is not None and span[0] > span[1]:
            raise ValueError(f"{name}: {list(span)} is not [first, last]")
    if (cfg.ema.decay is None) == (cfg.ema.halflife_Mimg is None):
        raise ValueError("ema: give one of ema.decay and ema.halflife_Mimg, and null for the other")
    if len({f"{std:.3f}" for std in cfg.ema.power}) < len(cfg.ema.power):
        raise ValueError(f"ema.power: {list(cfg.ema.power)} are too near to one another; widths are told by 3 decimals")
    if cfg.zero.offload_optimizer and cfg.zero.stage == 0:
        raise ValueError("zero.offload_optimizer: has nothing to move at zero.stage: 0; use zero.stage: 1, 2 or 3")
    if cfg.precision == "bf16" and cfg.zero.stage == 0:
        raise ValueError("zero.stage: 0 works in fp32 only; use zero.stage: 1 for bf16 and fp16")
    if cfg.precision == "fp16" and (cfg.zero.stage == 0 or not cfg.cluster.gpus_per_worker):
        raise ValueError("precision: fp16 needs zero.stage 1-3 and CUDA (cluster.gpus_per_worker: 1); use bf16")


def _check_cluster(cfg: Config) -> None:
    low, high = cfg.worker_range
    if low > high:
        raise ValueError(f"cluster.workers: [{low}, {high}] is not [min, max]")
    if high > cfg.train.global_batch:
        raise ValueError(
            f"cluster.workers: {high} are more than train.global_batch: {cfg.train.global_batch} has images"
        )
    admissible = [w for w in range(1, high + 1) if cfg.train.global_batch % w == 0]
    if low not in admissible or high not in admissible:
        raise ValueError(
            f"cluster.workers: {cfg.cluster.workers} must divide train.global_batch: {cfg.train.global_batch}; "
            f"admissible up to {high}: {admissible}"
        )
