"""Fixed 2-D sine-cosine position tables (MAE) and their resizing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_table(dim: int, grid: tuple[int, int], num_prefix: int = 0) -> Tensor:
    """2-D sine-cosine positions as in MAE (He et al. 2022).

    Channels are [sin(x w), cos(x w), sin(y w), cos(y w)], each dim / 4 wide, with x the column, y the row and
    w_i = 10000^(-i / (dim / 4)); computed in float64, returned in float64.

    Args:
        dim: width, a multiple of 4.
        grid: patches (rows, columns).
        num_prefix: rows of zeros in front, for the CLS token.

    Returns:
        [num_prefix + rows * columns, dim] float64.
    """
    if dim % 4:
        raise ValueError(f"sincos_table: dim: got {dim}, expected a multiple of 4")
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (x, y)]
    table = torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(num_prefix, dim), table])


def resize_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int) -> Tensor:
    """Position table for another grid: prefix rows kept, patch rows resized (bicubic, antialiased, as in timm).

    Args:
        table: [1, num_prefix + rows * columns, D].
        old_grid, new_grid: patches (rows, columns).
        num_prefix: leading rows that are not patches.

    Returns:
        [1, num_prefix + new rows * new columns, D] in the dtype of `table`.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    patches = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=tuple(new_grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
