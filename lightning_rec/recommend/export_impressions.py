"""What an artefact of a run of impressions holds beside towers and items: the log as of its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from lightning_rec.data.cleaning import make_cleaner
from lightning_rec.data.freshness import Lifetimes, lifetimes
from lightning_rec.data.impression_batches import Known
from lightning_rec.data.impression_module import ImpressionDataModule
from lightning_rec.data.impressions import Impressions
from lightning_rec.impression import ImpressionTwoTower
from lightning_rec.recommend.artefact import IMPRESSIONS, UNKNOWN
from lightning_rec.recommend.context import CONTEXT, CONTEXT_FILE
from lightning_rec.recommend.fitted import Fitted
from lightning_rec.recommend.stored_users import users_table

Int = NDArray[np.int64]


@dataclass
class FittedImpressions:
    """A fitted run of impressions.

    Attributes:
        fitted: the run.
        module: its model.
        data: its data.
    """

    fitted: Fitted
    module: ImpressionTwoTower
    data: ImpressionDataModule

    @classmethod
    def of(cls, fitted: Fitted) -> FittedImpressions | None:
        """None for a run of interactions."""
        if isinstance(fitted.module, ImpressionTwoTower) and isinstance(fitted.data, ImpressionDataModule):
            return cls(fitted, fitted.module, fitted.data)
        return None

    # ------------------------------------------------------------------ the manifest

    def lifetimes(self, max_age: float | None) -> Lifetimes | None:
        """When items can be recommended, for answers that are limited to items of ``max_age`` hours; None: always.

        Raises:
            ValueError: a limit that is not positive, or without times.
        """
        if max_age is None:
            return None
        if not max_age > 0:
            raise ValueError(f"max_age is {max_age}: it is a number of hours above 0, or left out for no limit.")
        log = self.data.impressions
        if log.times is None:
            raise ValueError("max_age needs the times of the impressions, and these have none: leave it out.")
        return lifetimes(self.data.catalogue, log.candidates.astype(np.int64), np.repeat(log.times, log.sizes), max_age)

    def protocol(self, alive: Lifetimes | None) -> str:
        """How results were measured, and what of the artefact is not as it was then."""
        sentences = [self.data.protocol]
        times = self.data.impressions.times
        if self.module.popularity is not None and times is not None:
            newest = self._clicks()[1].max(initial=0)
            until = f" the last of {_written(newest)}," if newest else ""
            sentences.append(
                f"Scores of the artefact count the clicks of the log,{until} and none that came after the export."
            )
        if alive is not None:
            sentences.append(
                f"Answers of the artefact are limited to items that are at most {alive.max_age:g} hours old, which the "
                "figures are not."
            )
        return " ".join(sentences)

    # ------------------------------------------------------------------ parts

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Writes what the towers and the users do not say; returns the parts of the manifest."""
        parts: dict[str, dict[str, Any]] = {IMPRESSIONS: {"kind": IMPRESSIONS}}
        unknown = self.unknown()
        if unknown is not None:
            save_file({"vector": unknown}, folder / UNKNOWN)
        if self.module.age is not None or self.module.popularity is not None:
            parts[CONTEXT] = self._write_context(folder)
        return parts

    @torch.no_grad()
    def unknown(self) -> Tensor | None:
        """``(d,)`` the vector of an article that the item table lacks; None where a run leaves such out.

        An item tower with vectors by row has none for an item that comes later: it is left out too.
        """
        tower: Any = self.module.item_tower
        if self.data.unknown_items != "add" or tower.uses_ids:
            return None
        if hasattr(tower, "encode_items"):
            return self._vector(tower.encode_items({tower.fields[0]: [""]}))
        return self._vector(tower.encode_texts([""])) if hasattr(tower, "encode_texts") else None

    @staticmethod
    def _vector(vectors: Tensor) -> Tensor:
        return vectors[0].detach().float().cpu().clone().contiguous()

    @cached_property
    def _known(self) -> Known:
        """What is known at the end of the log."""
        return self.data.known("predict")

    def _clicks(self) -> tuple[Int, Int]:
        """Row and time of each click that popularity counts at the end of the log."""
        known = self._known.popularity
        assert known is not None
        return known.rows, known.times

    def _write_context(self, folder: Path) -> dict[str, Any]:
        module, data = self.module, self.data
        tensors: dict[str, Tensor] = {}
        for name, bias in (("age", module.age), ("popularity", module.popularity)):
            if bias is not None:
                tensors |= {f"{name}.{key}": value for key, value in bias.state_dict().items()}
        ages = self._known.ages
        born = np.full(module.n_rows, np.inf) if ages is None else ages.born
        tensors["born"] = torch.from_numpy(born)
        if ages is not None:
            # clicks are counted where popularity is a part of the score
            rows, times = self._clicks() if module.popularity is not None else (np.zeros(0, np.int64),) * 2
            tensors["click_rows"] = torch.from_numpy(rows.astype(np.int32))
            tensors["click_times"] = torch.from_numpy(times.astype(np.int64))
        else:
            rank_zero_info("The impressions have no times: what the run learned of age and popularity is one number.")
        written = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        save_file(written, folder / CONTEXT_FILE)
        return {
            "kind": CONTEXT,
            "age": None if module.age is None else self.fitted.spec("age"),
            "popularity": None if module.popularity is None else self.fitted.spec("popularity"),
            "timed": ages is not None,
            "half_life": data.popularity_half_life,
        }

    # ------------------------------------------------------------------ users

    def until(self) -> dict[str, int]:
        """What the manifest says of users: the log's last moment, where the events of their histories have no times."""
        log = self.data.impressions
        if log.times is None or log.history_times is not None or not len(log):
            return {}
        return {"until": int(log.times.max())}

    def users(self, strangers: Mapping[str, Mapping[str, Any]]) -> pa.Table:
        """The table of the users, see :func:`lightning_rec.recommend.stored_users.users_table`."""
        data = self.data
        ids = data.user_ids[1:]
        (indptr, items), times = newest_histories(data)
        profiles = None if data.user_texts is None else self._profiles(ids)
        table = users_table(ids, (indptr, items), times, None, profiles, None, strangers)
        trained = np.zeros(len(data.user_ids), dtype=bool)
        trained[data.known_users] = True
        if trained[1:].all():
            return table
        return table.append_column("trained", pa.array([*trained[1:].tolist(), *[None] * len(strangers)], pa.bool_()))

    def _profiles(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        maker = self.data.user_texts
        assert maker is not None
        profiles = [dict(maker._profiles.get(user, {})) for user in ids]
        written = self.data.impressions.feedback
        if "feedback" not in maker.template.fields or written is None:
            return profiles
        cleaner = make_cleaner(self.data.cleaning)
        found: dict[int, list[str]] = {}
        for number in in_order(self.data).tolist():
            if written[number].strip():
                found.setdefault(int(self.data.impressions.users[number]), []).append(cleaner(written[number]))
        for user, texts in found.items():
            newest = texts[max(0, len(texts) - maker.limit) :]
            profiles[user - 1]["feedback"] = " ".join(reversed(newest))
        return profiles

    def strangers(self) -> dict[str, Mapping[str, Any]]:
        """The profiles of the user table's users without any impression, where they tell something."""
        maker = self.data.user_texts
        if maker is None:
            return {}
        known = set(self.data.user_ids)
        return {
            user: profile
            for user, profile in maker._profiles.items()
            if user not in known and maker.template.render(profile).strip()
        }


def in_order(data: ImpressionDataModule) -> Int:
    """``(n,)`` the impressions in the order of time, or of parts where the log has no times; then of the files."""
    log, numbers = data.impressions, np.arange(len(data.impressions))
    return np.lexsort((numbers, data.parts if log.times is None else log.times))


def newest_histories(data: ImpressionDataModule) -> tuple[tuple[Int, Int], Int | None]:
    """What each user had read when the log ends.

    Where histories are made of the clicks of the log, that is all of them. Else it is the history that the user's
    newest impression came with, and the clicks of the user's impressions that it does not hold: after it those of
    impressions that came with the same one (the newest, and all of them where the log tells a history once for many
    impressions, as MIND does), before it those of others, which fell out of a history of the last few events.

    Returns:
        Offsets ``(n_users,)`` of each user row from 1, and catalogue rows; the time of each event, or None where the
        log does not tell those of its histories.
    """
    log = data.impressions
    order = in_order(data)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    clicks, owner = log.clicks()
    by_user: dict[int, list[int]] = {}
    for event in np.lexsort((clicks, place[owner])).tolist():
        by_user.setdefault(int(log.users[owner[event]]), []).append(event)
    newest = np.full(len(data.user_ids), -1, dtype=np.int64)
    newest[log.users[order]] = order  # the last one counts
    made_of_clicks = log.history_times is not None  # no log tells the times of the histories that it brings
    rows: list[int] = []
    times: list[int] = []
    offsets = [0]
    for user, number in enumerate(newest.tolist()[1:], start=1):
        held: list[int] = []
        if number >= 0 and not made_of_clicks:
            held = _history(log, number)
        old = set(held)
        earlier: list[int] = []
        later: list[int] = []
        for event in by_user.get(user, ()):
            row = int(log.candidates[clicks[event]])
            if row not in old:
                came_with = _history(log, int(owner[event])) if not made_of_clicks else held
                (later if came_with == held else earlier).append(row)
                if made_of_clicks and log.times is not None:
                    times.append(int(log.times[owner[event]]))
        rows += [*earlier, *held, *later]
        offsets.append(len(rows))
    return (
        (np.array(offsets, dtype=np.int64), np.array(rows, dtype=np.int64)),
        np.array(times, dtype=np.int64) if made_of_clicks else None,
    )


def _history(log: Impressions, number: int) -> list[int]:
    return log.history[log.history_starts[number] : log.history_ends[number]].tolist()


def _written(moment: int) -> str:
    return datetime.fromtimestamp(int(moment), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
