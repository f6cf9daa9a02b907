"""Which checkpoint a run continues from, and whether that is the same run."""

from __future__ import annotations

from pathlib import Path

from . import checkpoint
from .config import ConfigError, DistillConfig, problem
from .track import RunFolder

# What may differ between the two halves of a run: no weight depends on it.
_FREE = frozenset("resume out workers device log_every save_every save_minutes val_data val_images val_every".split())


def checkpoint_to_resume(config: DistillConfig, run: RunFolder) -> Path | None:
    """The checkpoint to start from, None for a new run.

    Raises:
        ConfigError: the run folder already holds a run that must not be continued, or there is nothing to continue.
    """
    here = checkpoint.find(run.root)
    if config.resume == "auto":
        return here
    if here is not None:
        fix = "leave --resume away to continue it, or choose another --out"
        raise ConfigError([problem("out", run.root, f"a folder without a run (--resume {config.resume})", fix)])
    if config.resume == "never":
        return None
    source = checkpoint.find(Path(config.resume))
    if source is None:
        raise ConfigError([problem("resume", config.resume, "a run folder or a checkpoint with train_state.pt")])
    return source


def check_same_run(config: DistillConfig, run: RunFolder) -> None:
    """ConfigError that lists every resolved setting in which `config` differs from the run that it would continue."""
    before, now = run.config(), RunFolder.plain(config.as_dict())
    changed = [k for k in now if k not in _FREE and k in before and now[k] != before[k]]
    if changed:
        fix = f"repeat the run's value, or continue with another one in a new folder: --resume {run.root} --out NEW"
        raise ConfigError([problem(k, now[k], f"{before[k]} as in the run in {run.root}", fix) for k in changed])
