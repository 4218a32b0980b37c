"""What a run is by the configuration that it keeps, and what a recipe leaves to it.

`data.streams` decides the order of the samples, and its default has grown: a run of when files said `null`
keeps the rule of that time, and files of now say the number.
"""

from ddpm_dist import storage
from ddpm_dist.config import Config, default_streams, streams_before_0_2
from ddpm_dist.errors import NotFoundError
from ddpm_dist.recipe import parse_config
from ddpm_dist.state import newest_state, read_manifest


def saved_config(run_url: str) -> Config | None:
    """What the run is, by its config.yaml, or where somebody removed that, by its newest state.

    data.streams is a number. Raises StorageError, or ConfigError for a file that is none.
    """
    url = storage.join(run_url, "config.yaml")
    try:
        found = parse_config(storage.read(url).decode(errors="replace"), source=storage.redact(url))
    except NotFoundError:
        state = newest_state(run_url)
        if state is None:
            return None
        found = parse_config(read_manifest(state).meta["config"], source=state)
    return _with(found, found.data.streams or streams_before_0_2(found.train.global_batch))


def binding_config(run_url: str) -> Config | None:
    """As `saved_config`; None where nobody has trained yet: a configuration that never worked binds nobody."""
    found = saved_config(run_url)
    if found is None or not storage.list_names(storage.join(run_url, "checkpoints", "owner")):
        return None
    return found


def with_streams(cfg: Config, run: Config | None) -> Config:
    """The recipe with a number for data.streams: its own, else that of the run that goes on, else the default."""
    if cfg.data.streams is not None:
        return cfg
    batch = cfg.train.global_batch
    same = run is not None and run.train.global_batch == batch
    return _with(cfg, run.data.streams if run is not None and same else default_streams(batch))


def _with(cfg: Config, streams: int | None) -> Config:
    if cfg.data.streams == streams:
        return cfg
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"streams": streams})})
