"""Reads tensors from files without running any code that a file may carry.

`.safetensors` holds nothing but tensors. A `.pth` file is a pickle: it is opened with ``weights_only=True`` and one
more harmless class, `argparse.Namespace`, in which the published MAE checkpoints keep their options.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where a training checkpoint keeps its weights, most specific first.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "teacher")


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a checkpoint file and what else it says.

    Args:
        path: `.safetensors`, or anything that `torch.save` wrote (`.pth`, `.pt`, `.bin`).

    Returns:
        The state dict as stored, and extras: the string metadata of a safetensors file, or the options (``args``) of
        a `.pth` training checkpoint as a dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no checkpoint, or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, expected an existing file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _weights_of(read_pickle(path), path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, error) from error


def read_pickle(path: Path, mapped: bool = True) -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain values. ValueError: damaged, or it asks for code.

    Args:
        path: the file.
        mapped: keep on the disk what is not used (optimiser state, the decoder of a teacher) by a memory map.
    """
    mapped = mapped and zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        names = _unsafe_names(path, str(error))
        if not names:
            raise _damaged(path, error) from error
        raise ValueError(
            f"checkpoint: got {path}, whose pickle asks for {', '.join(names)}, expected tensors and plain values "
            "only; it was not opened, because that can run code. If you trust its author, convert it once: "
            'python -c "import torch, safetensors.torch as s; '
            f"c = torch.load({str(path)!r}, weights_only=False, map_location='cpu'); c = c.get('model', c); "
            "s.save_file({k: v.contiguous() for k, v in c.items()}, 'model.safetensors')\""
        ) from error
    except (RuntimeError, EOFError, KeyError, IndexError, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _unsafe_names(path: Path, message: str) -> list[str]:
    """Classes and functions that the pickle asks for beyond the allowed ones; found without loading it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive: the message of the refusal names the first one
        names = []
    return names or re.findall(r"GLOBAL ([\w.]+)", message)[:1]


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return ValueError(
        f"checkpoint: got {path} ({path.stat().st_size} bytes), which cannot be read ({reason}), expected a complete "
        "file written by torch.save or safetensors; download or copy it again"
    )


def _weights_of(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict inside what `torch.load` returned."""
    if isinstance(content, dict):
        options = content.get("args")
        options = dict(vars(options)) if isinstance(options, argparse.Namespace) else {}
        for candidate in (content, *(content[name] for name in CONTAINERS if isinstance(content.get(name), dict))):
            tensors = {k: v for k, v in candidate.items() if isinstance(k, str) and isinstance(v, Tensor)}
            if tensors and len(tensors) >= len(candidate) - 1:  # DDP and EMA wrappers may add a counter
                return tensors, options
    found = f"a dict with {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
    raise ValueError(
        f"checkpoint: got {path} holding {found[:200]}, expected a state dict, or one under "
        f"{', '.join(map(repr, CONTAINERS))}"
    )


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and ``config.json`` of a model folder as transformers and timm write it (one file or shards)."""
    config = read_json(folder / "config.json")
    if config is None:
        raise FileNotFoundError(f"checkpoint: got folder {folder} without config.json, expected a saved model")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = read_json(folder / f"{name}.index.json")
        shards = sorted(set(index["weight_map"].values())) if index else [name]
        if (folder / shards[0]).is_file():
            state: dict[str, Tensor] = {}
            for shard in shards:
                state.update(read_file(folder / Path(shard).name)[0])
            return state, config
    raise FileNotFoundError(f"checkpoint: got folder {folder} without model.safetensors or pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file, None where there is none."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    return content if isinstance(content, dict) else None
