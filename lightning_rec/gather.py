"""The candidates of a step: which of them a user knows, and those of several devices put together."""

from __future__ import annotations

from typing import cast

import torch
from lightning import LightningModule
from torch import Tensor


def _all(module: LightningModule, tensor: Tensor, sync_grads: bool = False) -> Tensor:
    """``(world, ...)`` the tensors of all devices."""
    return cast(Tensor, module.all_gather(tensor, sync_grads=sync_grads))


def across_ranks(module: LightningModule, loss: Tensor, count: float) -> Tensor:
    """Scales a mean over this device's steps so that the mean over devices is the mean over all steps.

    Args:
        module: gives the collective calls.
        loss: mean over ``count`` steps.
        count: supervised steps on this device, or the sum of their weights.

    Returns:
        The scaled loss.
    """
    counts = _all(module, torch.tensor(float(count), device=loss.device))
    return loss * (count * module.trainer.world_size / counts.sum().clamp(min=1e-9))


def gather_candidates(
    module: LightningModule, candidates: Tensor, rows: Tensor, target: Tensor, log_q: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The distinct candidates of all devices, with gradients to the device that encoded each.

    Args:
        module: gives the collective calls.
        candidates: ``(c,)`` vectors ``(c, d)`` of this device's candidates.
        rows: ``(c,)`` their catalogue rows.
        target: ``(p,)`` columns of ``candidates``.
        log_q: ``(c,)`` log of the chance that each is a candidate on this device.
        count: supervised steps on this device.

    Returns:
        Vectors ``(C, d)``, rows ``(C,)``, targets ``(p,)`` and log-q ``(C,)`` of the union. The chance to be in the
        union is that of one device with the steps of all of them.
    """
    world = module.trainer.world_size
    sizes = _all(module, torch.tensor([len(rows), count], device=rows.device)).view(world, 2)
    width = int(sizes[:, 0].max())
    vectors = candidates.new_zeros(width, candidates.shape[1])
    vectors = torch.cat([candidates, vectors[len(candidates) :]])
    all_vectors = _all(module, vectors, sync_grads=True).reshape(world * width, -1)
    padded = rows.new_zeros(width)
    padded[: len(rows)] = rows
    all_rows = _all(module, padded).reshape(-1)
    union, inverse = torch.unique(all_rows, return_inverse=True)
    # each item stands in the union once, encoded by the first device that has it
    places = torch.arange(len(all_rows), device=rows.device)
    first = torch.full_like(union, len(all_rows)).scatter_reduce(0, inverse, places, "amin")
    shift = int(union[0] == 0)  # padding sorts first
    own = inverse.view(world, width)[module.trainer.global_rank, : len(rows)] - shift
    union_log_q = None
    if log_q is not None:
        shares = sizes[:, 1].sum() / sizes[:, 1].clamp(min=1)
        missed = log_q.new_zeros(width)
        missed[: len(rows)] = torch.log1p(-log_q.exp().clamp(max=1 - 1e-7))
        all_missed = (_all(module, missed).view(world, width) * shares[:, None]).reshape(-1)
        union_log_q = torch.log(-torch.expm1(all_missed[first[shift:]]).clamp(max=-1e-30))
    return all_vectors[first[shift:]], union[shift:], own[target], union_log_q


def known_columns(known: Tensor, rows: Tensor, n_rows: int, whole: bool) -> Tensor:
    """Candidate columns of known items.

    Args:
        known: ``(b, k)`` catalogue rows, padded with 0.
        rows: ``(c,)`` catalogue rows of the candidates.
        n_rows: rows of the catalogue.
        whole: the candidates are all rows from 1 on.

    Returns:
        ``(b, k')`` columns, padded with -1; ``k'`` is the largest number of known candidates of a user.
    """
    if whole:
        return known - 1
    column = torch.full((n_rows,), -1, dtype=torch.int64, device=known.device)
    column[rows] = torch.arange(len(rows), device=known.device)
    columns = column[known].sort(dim=1, descending=True).values
    return columns[:, : int((columns >= 0).sum(1).max()) if columns.numel() else 0]


def history_columns(history: Tensor, table: Tensor, rows: Tensor, n_rows: int, whole: bool) -> Tensor:
    """Candidate columns of the events of histories.

    Args:
        history: ``(b, t)`` positions in the step's item table, padded with 0.
        table: ``(n,)`` catalogue rows of the item table.
        rows: ``(c,)`` catalogue rows of the candidates.
        n_rows: rows of the catalogue.
        whole: the candidates are all rows from 1 on.

    Returns:
        ``(b, t)`` columns, -1 for padding and for what is no candidate.
    """
    if whole:
        return history - 1
    column = torch.full((n_rows,), -1, dtype=torch.int64, device=history.device)
    column[rows] = torch.arange(len(rows), device=history.device)
    return column[table[history]]
