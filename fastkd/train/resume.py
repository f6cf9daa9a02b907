"""Which checkpoint a run continues from, and whether that is the same run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from fastkd.data import ImageLoader

from . import checkpoint
from .config import ConfigError, RunConfig, problem
from .track import RunFolder

logger = logging.getLogger("fastkd")
_NONE = checkpoint.Found(None, ())
# What may differ between the two halves of a run: no weight of a healthy step depends on it.
_FREE = frozenset(
    "resume out workers device cuda_graph activation_checkpointing skip_nonfinite log_every save_every save_minutes "
    "keep_checkpoints trackers val_data val_images val_every shard_teacher timeout_minutes".split()
)


def checkpoint_to_resume(config: RunConfig, run: RunFolder) -> checkpoint.Found:
    """The checkpoint to start from (none for a new run) and the newer ones that are damaged.

    Raises:
        ConfigError: the run folder already holds a run that must not be continued, there is nothing to continue, or
            all of its checkpoints are damaged.
    """
    here = checkpoint.look(run.root)
    if config.resume == "auto":
        fix = "bring one back from a copy, or start anew in another --out"
        _need_a_good_one(here, "out", run.root, fix)
        return here
    if here != _NONE:
        fix = "leave --resume away to continue it, or choose another --out"
        raise ConfigError([problem("out", run.root, f"a folder without a run (--resume {config.resume})", fix)])
    if config.resume == "never":
        return _NONE
    found = checkpoint.look(config.resume)
    if found == _NONE:
        raise ConfigError([problem("resume", config.resume, "a run folder or a checkpoint with train_state.pt")])
    _need_a_good_one(found, "resume", config.resume, "bring one back from a copy")
    return found


def _need_a_good_one(found: checkpoint.Found, argument: str, source: object, fix: str) -> None:
    if found.good is None and found.damaged:
        got = f"{source}, where all checkpoints are damaged: {checkpoint.reasons(found)}"
        raise ConfigError([problem(argument, got, "a good one", fix)])


def warn_of_damage(found: checkpoint.Found, step: int) -> None:
    """Says which checkpoints are passed over, and what going on from the one of `step` costs."""
    for folder, reason in found.damaged:
        newer = checkpoint.step_of(folder)
        lost = "" if newer is None else f"; {newer - step} steps are trained again"
        logger.warning("the checkpoint %s is damaged and left aside: %s%s", folder, reason, lost)


def how_to_go_on(out: Path) -> str:
    """What a message says at the end of a run that broke off."""
    good = checkpoint.find(out)
    if good is None:
        return "no checkpoint was written yet; the same command starts again"
    return f"the last checkpoint is {good}; the same command continues from there"


def check_same_run(config: RunConfig, given: dict, run: RunFolder) -> None:
    """ConfigError that lists every setting in which a config differs from the run that it would continue.

    Args:
        config: resolved.
        given: the same before it was resolved: what merely follows from a changed setting is not listed.
        run: the folder with the run's own config.yaml.
    """
    before, facts = run.config(), run.facts().get("given", {})
    now, given = RunFolder.plain(config.as_dict()), RunFolder.plain(given)
    changed = [
        name for name in now
        if name not in _FREE and now[name] != before.get(name, now[name])
        and (name == "amp" or given[name] != facts.get(name))
    ]  # fmt: skip
    if changed:
        fix = f"repeat the run's value, or continue with another one in a new folder: --resume {run.root} --out NEW"
        raise ConfigError([problem(k, now[k], f"{before.get(k)} as in the run in {run.root}", fix) for k in changed])


def restore(
    source: Path, method: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loader: ImageLoader
) -> dict:
    """Puts everything back to where the checkpoint was taken; returns its state (step, history, seconds ...).

    Weight decay, betas and momentum stay those of `optimizer`, for a run continued into a new folder may change them,
    and so does the form of its learning rate (a number, or the tensor that a CUDA graph reads).

    Raises:
        ConfigError: the checkpoint belongs to another model, is no file of fastkd, or the images changed.
    """
    kept = ("weight_decay", "betas", "momentum", "lr", "lr_scale", "capturable")
    options = [{name: group[name] for name in kept if name in group} for group in optimizer.param_groups]
    try:
        state = checkpoint.load_state(source)
        checkpoint.load_student(source, method.student)
        method.load_training_state(state["heads"])
        if state.get("kind", kind := type(optimizer).__name__) != kind:
            raise ValueError(f"optimizer: got {kind}, expected {state['kind']} as in the checkpoint")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        loader.load_state_dict(state["loader"])
    except (ValueError, RuntimeError) as error:
        raise ConfigError([f"--resume: the checkpoint {source} does not fit: {error}"]) from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ConfigError([f"--resume: {source / checkpoint.STATE} is not what fastkd writes ({found})"]) from error
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)
    return state
