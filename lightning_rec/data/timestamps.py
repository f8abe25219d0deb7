"""Times as people write them, told apart for a whole column, as seconds since 1970."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

#: Below this, a number is no plausible stamp of today in any unit (1e8 s is March 1973): a step counter, or a slip.
_SMALL = 1e8
_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_NUMBER = r"^\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\s*$"

#: Name of a way to write dates -> pattern, and the formats tried in turn (None: pandas' ISO 8601 parser).
_DATES: dict[str, tuple[str, list[str]]] = {
    "ISO 8601 dates": (r"^\d{4}-\d{1,2}-\d{1,2}([T ].*)?$", []),
    "dates like 2019/11/12": (
        r"^\d{4}/\d{1,2}/\d{1,2}",
        ["%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%Y/%m/%d %H:%M:%S.%f"],
    ),
    "dates like 11/12/2019": (r"^\d{1,2}/\d{1,2}/\d{4}", []),
    "dates like 12.11.2019": (
        r"^\d{1,2}\.\d{1,2}\.\d{4}",
        ["%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%d.%m.%Y, %H:%M:%S", "%d.%m.%Y, %H:%M"],
    ),
    "dates like 20191112": (
        r"^(19|20)\d{6}([T ]?\d{6}Z?)?$",
        ["%Y%m%d", "%Y%m%d%H%M%S", "%Y%m%dT%H%M%S", "%Y%m%d %H%M%S"],
    ),
    "dates like 11 12, 2019": (r"^\d{1,2} \d{1,2}, \d{4}$", ["%m %d, %Y"]),
    "dates with a month's name": (
        r"[A-Za-z]{3}",
        [
            "%b %d, %Y", "%B %d, %Y", "%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%b %d %Y", "%B %d %Y",
            "%a %b %d %H:%M:%S %Y", "%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z", "%a, %d %b %Y %H:%M:%S %Z",
            "%b %d, %Y %H:%M:%S", "%b %d, %Y %I:%M:%S %p", "%d %b %Y %H:%M:%S", "%d-%b-%Y %H:%M:%S",
            "%d/%b/%Y:%H:%M:%S %z",
        ],
    ),
}  # fmt: skip
_FIRST, _LAST = pd.Timestamp("1678-01-01", tz="UTC"), pd.Timestamp("2261-12-31", tz="UTC")
_SLASHED = ["", " %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p"]


@dataclass
class Times:
    """A column of times.

    Attributes:
        seconds: ``(n,)`` seconds since 1970; 0 where ``bad``.
        nanoseconds: ``(n,)`` the part below a second.
        bad: row -> why its time cannot be used.
        notes: what was assumed, in sentences.
        mixture: other writings than the column's own that fill more than 1 % of the rows: writing -> example rows.
        writing: how the column is written (``seconds``, ``ISO 8601 dates``, ...); empty when no row has a time.
    """

    seconds: NDArray[np.int64]
    nanoseconds: NDArray[np.int64]
    bad: dict[int, str]
    notes: list[str]
    mixture: dict[str, list[int]]
    writing: str = ""


def parse_times(column: pa.ChunkedArray) -> Times:
    """Reads a column of times; one writing holds for the whole column.

    Numbers are seconds, milliseconds, microseconds or nanoseconds by their size; dates are ISO 8601 or one of the
    common writings, in UTC where they name no zone. What is most frequent is the column's writing. Text that is no time
    is a bad row; so is a time in another writing while such rows are rare (at most 1 %); otherwise they are a mixture.

    Args:
        column: strings.
    """
    n = len(column)
    # A log has few distinct texts beside its rows or many; parsing the distinct ones alone is never slower.
    encoded = column.combine_chunks().dictionary_encode()
    codes = np.asarray(pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False))
    texts = pc.utf8_trim_whitespace(encoded.dictionary)
    size = len(texts)
    counts = np.bincount(codes[codes >= 0], minlength=size)

    seconds = np.zeros(size, np.int64)
    nanoseconds = np.zeros(size, np.int64)
    writing = np.full(size, "", dtype=object)
    notes: list[str] = []
    _parse_numbers(texts, seconds, nanoseconds, writing)
    _parse_dates(texts, counts, seconds, nanoseconds, writing, notes)

    totals = {name: int(counts[writing == name].sum()) for name in set(writing) - {""}}
    times = Times(np.zeros(n, np.int64), np.zeros(n, np.int64), {}, notes, {})
    if not totals:
        values = texts.to_pylist()
        times.bad = {row: _not_a_time(values[code] if code >= 0 else None) for row, code in enumerate(codes)}
        return times
    main = max(sorted(totals), key=lambda name: (totals[name], name != "small"))
    if main == "small":  # step counters beside a few larger ones, or nothing but small numbers: seconds
        main = "seconds" if "seconds" in totals or len(totals) == 1 else main
    times.writing = "seconds" if main == "small" else main
    good = writing == times.writing
    if times.writing in _UNITS:
        zero = (writing == "small") & (seconds == 0) & (nanoseconds == 0)
        good |= writing == "small" if times.writing == "seconds" else zero
    known = np.append(good, False)[codes]
    times.seconds[known] = seconds[codes[known]]
    times.nanoseconds[known] = nanoseconds[codes[known]]
    _explain(times, np.flatnonzero(~known), codes, texts, writing, n)
    return times


def _explain(
    times: Times,
    rows: NDArray[np.int64],
    codes: NDArray[np.int64],
    texts: pa.Array,
    writing: NDArray[np.object_],
    n: int,
) -> None:
    """Sorts the rows without a usable time into bad rows and mixtures."""
    others: dict[str, list[int]] = {}
    for row in rows.tolist():
        code = int(codes[row])
        text = texts[code].as_py() if code >= 0 else None
        other = str(writing[code]) if code >= 0 else ""
        if other in ("", "small"):
            times.bad[row] = _not_a_time(text)
        else:
            others.setdefault(other, []).append(row)
            times.bad[row] = f"the timestamp {text!r} is in {other}, but the column is in {times.writing}"
    times.mixture = {name: found[:3] for name, found in others.items() if len(found) > n / 100}


def _not_a_time(text: str | None) -> str:
    if not text:
        return "the timestamp is empty"
    return f"{text[:80]!r} is no timestamp"


def _parse_numbers(
    texts: pa.Array, seconds: NDArray[np.int64], nanoseconds: NDArray[np.int64], writing: NDArray[np.object_]
) -> None:
    numeric = np.asarray(pc.fill_null(pc.match_substring_regex(texts, _NUMBER), False).to_numpy(zero_copy_only=False))
    if not numeric.any():
        return
    rows = np.flatnonzero(numeric)
    strings = texts.take(pa.array(rows))
    sizes = np.abs(np.asarray(strings.cast(pa.float64()).to_numpy(zero_copy_only=False)))
    try:
        integers = np.asarray(strings.cast(pa.int64()).to_numpy(zero_copy_only=False))
        fractions = np.zeros(len(rows))
    except pa.ArrowInvalid:
        values = np.asarray(strings.cast(pa.float64()).to_numpy(zero_copy_only=False))
        sizes = np.where(np.isfinite(values) & (np.abs(values) < 9e18), sizes, np.inf)
        values = np.where(np.isfinite(sizes), values, 0.0)
        integers = np.floor(values).astype(np.int64)
        fractions = values - integers
    bounds = [("small", 0.0, _SMALL), ("seconds", _SMALL, 1e11), ("milliseconds", 1e11, 1e14)]
    bounds += [("microseconds", 1e14, 1e17), ("nanoseconds", 1e17, 1e20)]
    for name, low, high in bounds:
        inside = (sizes >= low) & (sizes < high)
        unit = _UNITS.get(name, 1)
        whole, part = np.divmod(integers[inside], unit)
        seconds[rows[inside]] = whole
        nanoseconds[rows[inside]] = part * (10**9 // unit) + (fractions[inside] * (10**9 // unit)).astype(np.int64)
        writing[rows[inside]] = name


def _parse_dates(
    texts: pa.Array,
    counts: NDArray[np.int64],
    seconds: NDArray[np.int64],
    nanoseconds: NDArray[np.int64],
    writing: NDArray[np.object_],
    notes: list[str],
) -> None:
    compact = "dates like 20191112"
    numbers = (writing == "small") | (writing == "milliseconds")
    for name, (pattern, formats) in _DATES.items():
        matches = np.asarray(
            pc.fill_null(pc.match_substring_regex(texts, pattern), False).to_numpy(zero_copy_only=False)
        )
        if name == compact:
            # Only when every number of the column reads as such a date: one stamp may look like a date by chance.
            numeric = (writing != "") & np.isin(writing, [*_UNITS, "small"])
            if not matches.any() or (numeric & ~matches).any():
                continue
            matches &= numbers | (writing == "")
        else:
            matches &= writing == ""
        rows = np.flatnonzero(matches)
        if not len(rows):
            continue
        strings = pd.Series(texts.take(pa.array(rows)).to_pylist(), dtype=object)
        if name == "dates like 11/12/2019":
            formats = _slash_formats(strings, notes)
        parsed = _try_formats(strings, formats)
        known = parsed.notna().to_numpy()
        if name == compact and not known.all() and writing[rows].astype(bool).any():
            continue
        stamps = parsed[known].astype("datetime64[ns, UTC]").astype("int64").to_numpy()
        seconds[rows[known]], nanoseconds[rows[known]] = np.divmod(stamps, 10**9)
        writing[rows[known]] = name


def _try_formats(strings: pd.Series, formats: list[str]) -> pd.Series:
    if not formats:
        return _in_nanoseconds(pd.to_datetime(strings, format="ISO8601", utc=True, errors="coerce"))
    parsed = pd.Series(pd.NaT, index=strings.index, dtype="datetime64[ns, UTC]")
    for form in formats:
        left = parsed.isna()
        if not left.any():
            break
        found = pd.to_datetime(strings[left], format=form, utc=True, errors="coerce")
        parsed[left] = _in_nanoseconds(found)
    return parsed


def _in_nanoseconds(found: pd.Series) -> pd.Series:
    """The same times; what nanoseconds in 64 bits cannot hold, before 1678 or after 2261, is none."""
    known = (found >= _FIRST) & (found <= _LAST)
    return found.where(known, pd.NaT).astype("datetime64[ns, UTC]")


def _slash_formats(strings: pd.Series, notes: list[str]) -> list[str]:
    """Month first or day first, told by the whole column."""
    pairs = [re.match(r"(\d+)/(\d+)/", text) for text in strings]
    firsts = [int(pair[1]) for pair in pairs if pair]
    seconds = [int(pair[2]) for pair in pairs if pair]
    day_first = sum(first > 12 for first in firsts) > sum(second > 12 for second in seconds)
    if max(firsts) <= 12 and max(seconds) <= 12:
        notes.append(f"Timestamps like {strings.iloc[0]!r} were read month first; the column does not tell.")
    order = "%d/%m/%Y" if day_first else "%m/%d/%Y"
    return [order + rest for rest in _SLASHED]
