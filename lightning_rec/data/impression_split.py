"""Which impressions are for training, validation, test and prediction."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_rec.data.impressions import PARTS, Impressions
from lightning_rec.data.split import Moment, iso_time, read_moment

ImpressionSplit = Literal["auto", "time", "order"]
Parts = NDArray[np.int8]
_TRAIN, _VALIDATION, _TEST, _PREDICT = range(len(PARTS))


def split_impressions(
    impressions: Impressions,
    split: ImpressionSplit = "auto",
    validation_start: Moment = 0.8,
    test_start: Moment = 0.9,
    validation_share: float = 0.1,
) -> tuple[Parts, str]:
    """The part of each impression.

    Args:
        impressions: the log.
        split: ``auto``: the parts of the files where they have some, else by time; ``time``: two moments cut the log,
            and what happens at the very instant of a cut belongs to the later part; ``order``: by the order of the
            files.
        validation_start: a fraction of the labelled impressions (0.8), seconds since 1970 or an ISO date. By order: a
            fraction.
        test_start: likewise.
        validation_share: the newest share of the training impressions that is cut off for validation where the files
            have parts and none for validation.

    Returns:
        ``(n,)`` places in ``PARTS``, and one sentence on the split. Impressions without any label belong to the part
        in which they fall, and are neither learned from nor evaluated; where none is labelled, all are for prediction.

    Raises:
        ValueError: there are no times to cut, a moment cannot be read, or training, validation or test is left empty.
    """
    if split == "auto" and impressions.parts is not None:
        return _by_files(impressions, impressions.parts, validation_share)
    labelled = impressions.labelled
    parts = np.full(len(impressions), _TRAIN, dtype=np.int8)
    if not labelled.any():
        return np.full_like(parts, _PREDICT), "No impression is labelled: all are for prediction."
    if split == "order":
        text, late = _by_order(parts, labelled, validation_start, test_start)
    else:
        text, late = _by_time(impressions, parts, labelled, validation_start, test_start)
    for part in (_TRAIN, _VALIDATION, _TEST):
        if not (labelled & (parts == part)).any():
            raise ValueError(
                f"The split leaves no labelled impression for {PARTS[part]}: {text} {late} Move validation_start and "
                "test_start."
            )
    return parts, text


def _by_time(
    impressions: Impressions, parts: Parts, labelled: NDArray[np.bool_], validation_start: Moment, test_start: Moment
) -> tuple[str, str]:
    if impressions.times is None:
        raise ValueError(
            "A split by time needs times, and the impressions have none. Map a column to timestamp, or set split: "
            "order, which goes by the order of the files."
        )
    times = np.sort(impressions.times[labelled])
    first = read_moment(validation_start, times, "validation_start")
    second = read_moment(test_start, times, "test_start")
    parts[impressions.times >= first] = _VALIDATION
    parts[impressions.times >= second] = _TEST
    text = f"Global time: training before {iso_time(first)}, validation from then on, test from {iso_time(second)} on."
    return text, f"The times go from {iso_time(int(times[0]))} to {iso_time(int(times[-1]))}."


def _by_order(
    parts: Parts, labelled: NDArray[np.bool_], validation_start: Moment, test_start: Moment
) -> tuple[str, str]:
    shares = []
    for name, value in (("validation_start", validation_start), ("test_start", test_start)):
        try:
            share = float(value)  # type: ignore[arg-type]  # a date is refused just below
        except (TypeError, ValueError):
            share = -1.0
        if not 0 < share < 1:
            raise ValueError(
                f"{name} is {value!r}; with split: order it is a fraction of the impressions, such as 0.8."
            )
        shares.append(share)
    numbers = np.flatnonzero(labelled)
    first, second = (int(share * len(numbers)) for share in shares)
    parts[numbers[first] :] = _VALIDATION
    parts[numbers[second] :] = _TEST
    text = (
        f"Order of the files: the first {shares[0]:.0%} of the impressions are for training, those from "
        f"{shares[1]:.0%} on for test, those between for validation."
    )
    return text, f"There are {len(numbers):,} labelled impressions."


def _by_files(impressions: Impressions, given: Parts, share: float) -> tuple[Parts, str]:
    parts = given.copy()
    text = "Parts of the files."
    if (parts == _TRAIN).any() and not (parts == _VALIDATION).any():
        if not 0 < share < 1:
            raise ValueError(f"validation_share is {share}; it is a share between 0 and 1.")
        numbers = np.flatnonzero(parts == _TRAIN)
        if impressions.times is not None:
            times = impressions.times[numbers]
            cut = int(np.sort(times)[min(int((1 - share) * len(times)), len(times) - 1)])
            newest = times >= cut
            text = (
                f"Parts of the files; validation is the training part from {iso_time(cut)} on, its newest {share:.0%}."
            )
        else:
            newest = np.arange(len(numbers)) >= int((1 - share) * len(numbers))
            text = f"Parts of the files; validation is the last {share:.0%} of the training part."
        if newest.all() or not newest.any():
            raise ValueError(
                "The files have no validation part, and the training part is too short (or of one time) to cut the "
                f"newest {share:.0%} off: give a validation part, or change validation_share."
            )
        parts[numbers[newest]] = _VALIDATION
    return parts, text
