"""``fastkd eval``: features once, then every probe on them, as a table and as JSON."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastkd.data import open_images
from fastkd.train.build import AMP, EXPECTED, choose_amp, choose_workers, weights_of
from fastkd.train.config import ConfigError, problem
from fastkd.train.configs._classifier import not_in_classes
from fastkd.train.track import versions

from .config import EvalConfig
from .encoders import HeadEncoder, TokenEncoder, load_encoder
from .extract import CenterCrops, Extracted, extract
from .knn import knn
from .linear import sweep
from .scores import ranking, score, write_json

FORMAT, VERSION = "fastkd-eval", 1
logger = logging.getLogger("fastkd")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """All scores of a source on class folders; docs/evaluation.md explains each key. Prints a table, writes JSON.

    Raises:
        ConfigError: wrong arguments, folders without classes or with classes that differ, as many as can be found.
    """
    config.validate()
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError([problem("device", config.device, "cpu or auto: torch sees no CUDA device here")])
    cuda = torch.cuda.is_available() if config.device == "auto" else config.device.startswith("cuda")
    device = torch.device(config.device if config.device != "auto" else "cuda" if cuda else "cpu")
    folders, encoder = _open(config)
    classes = folders["data"].classes
    amp = choose_amp(config.amp, device)
    console, seconds, start = Console(stderr=True), {}, time.perf_counter()

    encoder.to(device)
    own = _own_head(encoder, classes)
    data = {}
    with Progress(console=console, disable=not console.is_terminal) as bar:
        for name, folder in folders.items():
            crops = CenterCrops(
                folder, encoder.img_size, config.batch_size, channels=encoder.in_chans, pin=cuda,
                workers=choose_workers(config.workers, cuda),
            )  # fmt: skip
            labels = torch.tensor([classes.index(folder.classes[label]) for label in folder.labels])
            task = bar.add_task(f"features of --{name.replace('_', '-')}", total=len(crops))
            rank = ranking if own and name == "val_data" else None
            try:
                data[name] = extract(
                    encoder, crops, labels, device, AMP[amp], rank, lambda n, task=task: bar.advance(task, n)
                )
            except ValueError as error:
                raise ConfigError([f"--{name.replace('_', '-')}: {error}"]) from error
    seconds["features"] = time.perf_counter() - start
    train, val = data["data"], data["val_data"]

    results: dict[str, Any] = dict(
        format=FORMAT, version=VERSION, source=config.source, features=encoder.features,
        dimensions=train.features.shape[1], img_size=list(encoder.img_size), data=str(config.data),
        val_data=str(config.val_data), classes=classes, train_images=len(train.labels), val_images=len(val.labels),
        unreadable=dict(train=train.unreadable, val=val.unreadable), seed=config.seed, amp=amp, device=str(device),
    )  # fmt: skip
    train = train._replace(features=_resident(train.features, device))
    begin = time.perf_counter()
    results["knn"] = _nearest(config, train, val, classes, device)
    seconds["knn"] = time.perf_counter() - begin
    begin = time.perf_counter()
    results["linear"] = _linear(config, train, val, classes, device) if config.linear else None
    seconds["linear"] = time.perf_counter() - begin
    results["head"] = score(val.ranked, val.labels, classes).as_dict() if own else None
    results["seconds"] = seconds | dict(total=time.perf_counter() - start)
    results["versions"] = versions()
    if config.out is not None:
        write_json(results, config.out.expanduser())
    Console().print(table(results))
    return results


def _open(config: EvalConfig) -> tuple[dict[str, Any], TokenEncoder | HeadEncoder]:
    """Both folders and the encoder; all that is wrong with them at once."""
    found: list[str] = []
    folders: dict[str, Any] = {}
    for name in ("data", "val_data"):
        try:
            folder = folders[name] = open_images(getattr(config, name))
        except (OSError, ValueError) as error:
            found.append(f"--{name.replace('_', '-')}: {error}")
            continue
        found += not_in_classes(name, folder, 2 if name == "data" else 1)
    if len(folders) == 2 and not found:
        known = folders["data"].classes
        unknown = sorted(set(folders["val_data"].classes) - set(known))
        if unknown:
            found.append(problem("val_data", f"classes {_some(unknown)}", f"those of --data: {_some(known)}"))
    try:
        encoder = load_encoder(weights_of(config.source), config.features, config.img_size)
    except EXPECTED as error:
        found.append(f"SOURCE: {error}")
    if found:
        raise ConfigError(found)
    return folders, encoder


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _own_head(encoder: TokenEncoder | HeadEncoder, classes: list[str]) -> bool:
    """Whether the source is a classifier of these classes: by name, or by number where it does not tell names."""
    if not encoder.num_classes:
        return False
    same = encoder.classes == classes if encoder.classes else encoder.num_classes == len(classes)
    if not same:
        logger.warning("the source's own head is not judged: it has %d other classes", encoder.num_classes)
    return same


def _resident(features: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The features on the device where they leave half of its memory free; else where they are."""
    if device.type == "cuda" and 2 * features.nbytes < torch.cuda.mem_get_info(device)[0]:
        return features.to(device)
    return features


def _nearest(config: EvalConfig, train: Extracted, val: Extracted, classes: list[str], device) -> list[dict]:
    ks = sorted({k for k in config.knn_k if k <= len(train.labels)})
    if not ks:
        raise ConfigError([problem("knn_k", config.knn_k, f"1 to {len(train.labels)}, the number of training images")])
    ranked = knn(
        train.features, train.labels, val.features, len(classes), ks, ranking, temperature=config.knn_temperature,
        device=device,
    )  # fmt: skip
    return [dict(k=k, vote=vote, **score(best, val.labels, classes).as_dict()) for (k, vote), best in ranked.items()]


def _linear(config: EvalConfig, train: Extracted, val: Extracted, classes: list[str], device) -> dict[str, Any]:
    try:
        found = sweep(
            train.features, train.labels, len(classes), lrs=config.linear_lr,
            weight_decays=config.linear_weight_decay, epochs=config.linear_epochs, seed=config.seed, device=device,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError([f"--data: {error}; --no-linear leaves the probe out"]) from error
    if len(config.linear_lr) > 1 and found.best.lr in (min(config.linear_lr), max(config.linear_lr)):
        logger.warning("the best learning rate %g is at the edge of the grid: try a wider --linear-lr", found.best.lr)
    ranked = torch.cat([ranking(found.probe.logits(rows)[:, 0]) for rows in val.features.split(1024)])
    heads = [dict(**head._asdict(), accuracy=accuracy) for head, accuracy in zip(found.heads, found.accuracies)]
    return dict(
        **score(ranked, val.labels, classes).as_dict(), chosen=found.best._asdict(), heads=heads,
        epochs=config.linear_epochs, batch_size=found.batch_size,
    )  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    """The scores as a table, in per cent."""
    unread = sum(results["unreadable"].values())
    height, width = results["img_size"]
    shown = Table(
        title=f"{results['source']}: {results['features']} features ({results['dimensions']}), {height} x {width}",
        caption=f"{results['train_images']} training and {results['val_images']} held-out images of "
        f"{len(results['classes'])} classes" + (f", {unread} unreadable" if unread else "")
        + f"; 95 % Wilson intervals; {results['seconds']['total']:.0f} s",
    )  # fmt: skip
    for name in ("probe", "top-1 %", "interval", "top-5 %"):
        shown.add_column(name, justify="left" if name == "probe" else "right")
    rows = [(f"kNN, k = {row['k']}, {row['vote']}", row) for row in results["knn"]]
    if results["linear"]:
        chosen = results["linear"]["chosen"]
        rows.append((
            f"linear, lr {chosen['lr']:g}, weight decay {chosen['weight_decay']:g}, {chosen['scaling']}",
            results["linear"],
        ))  # fmt: skip
    if results["head"]:
        rows.append(("its own head", results["head"]))
    for name, row in rows:
        low, high = row["interval"]
        top5 = "" if row["top5"] is None else f"{100 * row['top5']:.2f}"
        shown.add_row(name, f"{100 * row['top1']:.2f}", f"{100 * low:.2f} to {100 * high:.2f}", top5)
    return shown
