"""Items held out as cold: the protocol that asks how well a model ranks what it was never trained on.

Every event of a cold item is taken out of training, wherever it lies: it is no training target, stands in no training
history, is counted nowhere, and the item is no negative and no candidate of a training step. Who is evaluated, and on
what, stays as the split has it, and so do the histories at evaluation, where a cold item is read by its text. A figure
over the warm targets can therefore be laid beside that of a run without cold items over the same targets. What is
known of an item when it is listed, its text and fields, is known of cold items too: the statistics of ``standardise``
and ``whiten`` are those of all texts.

Such a split over items is the one of DropoutNet (Volkovs et al., NIPS 2017) and of CLCRec (Wei et al., MM 2021).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lightning_rec.data.cleaning import did_you_mean
from lightning_rec.data.evaluation import listed_ids
from lightning_rec.data.histories import Histories
from lightning_rec.data.split import Part, Split

ColdItems = float | list[str] | str
Int = NDArray[np.int64]


def check_cold_items(cold_items: ColdItems) -> None:
    """Looks at the option before anything is read.

    Raises:
        ValueError: a share outside ``[0, 1)``.
    """
    if isinstance(cold_items, float | int) and not 0 <= cold_items < 1:
        raise ValueError(
            f"cold_items is {cold_items}; as a number it is the share of the items to hold out of training, at least 0 "
            "and below 1 (0.1: one in ten), since something must be left to train on. A list or a file names items."
        )


def cold_rows(cold_items: ColdItems, seed: int, ids: Sequence[str], histories: Histories) -> Int:
    """The catalogue rows that are held out.

    A share is taken of the items with events. Which of them it is depends on their ids and the seed alone: neither the
    order of rows nor a run's own seed changes it, and a larger share holds out the same items and more.

    Args:
        cold_items: a share (rounded to a number of items, of at least one), or ids, or a text file with one a line.
        seed: another seed takes other items.
        ids: raw id of each catalogue row.
        histories: all events.

    Returns:
        ``(c,)`` rows, ascending; empty for a share of 0.

    Raises:
        ValueError: an id that the catalogue does not have, or no item with events is left to train on.
        FileNotFoundError: the file does not exist.
    """
    check_cold_items(cold_items)
    touched = np.unique(histories.items)
    if isinstance(cold_items, float | int):
        n = max(round(cold_items * len(touched)), 1) if cold_items and len(touched) else 0
        order = sorted(touched.tolist(), key=lambda row: _draw(ids[row], seed))
        rows = np.sort(np.array(order[:n], dtype=np.int64))
    else:
        rows = _listed(listed_ids(cold_items, "cold_items", "item"), ids)
    if len(touched) and np.isin(touched, rows).all():
        raise ValueError(
            f"cold_items holds out all of the {len(touched):,} items with interactions, so that none is left to train "
            "on: name fewer items, or give a smaller share."
        )
    return rows


def _draw(item: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{item}".encode(), digest_size=16).digest()


def _listed(wanted: Sequence[str], ids: Sequence[str]) -> Int:
    rows = {item: row for row, item in enumerate(ids) if row}
    unknown = [item for item in wanted if item not in rows]
    if unknown:
        raise ValueError(
            f"cold_items names {unknown[0]!r}, which is no item of the catalogue ({len(unknown):,} of {len(wanted):,} "
            f"ids are not).{did_you_mean(unknown[0], rows)} Correct the ids, or leave them out."
        )
    return np.unique(np.array([rows[item] for item in wanted], dtype=np.int64))


def hold_out(split: Split, histories: Histories, rows: Int) -> Split:
    """The split with all events of ``rows`` taken out of training; validation and test keep their users and targets.

    Args:
        split: of ``histories``, after :func:`~lightning_rec.data.split.refit` if there is one.
        histories: all events.
        rows: ``(c,)`` catalogue rows.

    Returns:
        The split, whose ``counts`` tell ``cold_items``, ``cold_train_events_left_out`` and the ``cold_`` targets of
        validation and test; the very same split where there are no cold rows.
    """
    if not len(rows):
        return split
    cold = np.isin(histories.items, rows)
    held = replace(split, held_out=cold)
    left_out = int((split.in_part(histories, "train") & cold).sum())
    counts = split.counts | {
        "train_users": len(held.users(histories, "train")),
        "train_events": split.counts["train_events"] - left_out,
        "cold_items": len(rows),
        "cold_events": int(cold.sum()),
        "cold_train_events_left_out": left_out,
        "cold_validation_targets": _targets(split, histories, cold, "validation"),
        "cold_test_targets": _targets(split, histories, cold, "test"),
    }
    told = (
        f"{len(rows):,} cold items, whose {counts['cold_events']:,} events are all kept out of training "
        f"({left_out:,} would have been in it), are {counts['cold_validation_targets']:,} of the validation and "
        f"{counts['cold_test_targets']:,} of the test targets"
    )
    return replace(held, counts=counts, description=f"{split.description.rstrip('.')}; {told}.")


def _targets(split: Split, histories: Histories, cold: NDArray[np.bool_], part: Part) -> int:
    """Events to be found that are of cold items, of the users who are evaluated."""
    evaluated = np.isin(histories.users_of_events(), split.users(histories, part))
    return int((split.in_part(histories, part) & cold & evaluated).sum())
