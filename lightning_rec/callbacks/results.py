"""What a run leaves in its folder: test metrics with their protocol, and predictions with raw ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_rec.callbacks.impression_results import impression_table, submission, without_padding, write_submission


def run_folder(trainer: Trainer, ckpt_path: str | None = None) -> Path:
    """The folder of the run: above its checkpoints, else that of the logger, else ``default_root_dir``.

    A fit's checkpoints are those that it writes, any other command's the one that it reads. Call it on every rank: they
    agree on the logger's folder by a broadcast.

    Args:
        trainer: the trainer of the run.
        ckpt_path: the checkpoint, where the trainer has not been told it yet.
    """
    logged = trainer.log_dir or trainer.default_root_dir
    written = getattr(trainer.checkpoint_callback, "dirpath", None) if trainer.state.fn == "fit" else None
    path = ckpt_path or trainer.ckpt_path
    if written is None and path is None:
        return Path(logged)
    folder = Path(written) if written is not None else Path(str(path)).resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


class ResultWriter(Callback):
    """Writes ``validate_metrics.json`` and ``test_metrics.json``: metrics, protocol and checkpoint."""

    def _write(self, trainer: Trainer, stage: str) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        protocol = getattr(trainer.datamodule, "protocol", "")  # type: ignore[attr-defined]  # set by Lightning
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stage}_metrics.json"
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        content = {"metrics": metrics, "protocol": protocol, "checkpoint": str(trainer.ckpt_path or "")}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        rank_zero_info(f"{protocol}\nMetrics written to {path}.")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the test metrics."""
        self._write(trainer, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the validation metrics of the ``validate`` command."""
        if trainer.state.fn == "validate":
            self._write(trainer, "validate")


class PredictionWriter(Callback):
    """Writes what ``predict`` answers, in the order asked for and with raw ids.

    Recommendations: one group of rows for every user, with the columns ``user_id``, ``rank`` (from 1), ``item_id``,
    ``score``, ``source`` (``towers``, or ``popularity`` for a user that the towers know nothing of). A user who has
    touched everything has no rows.

    Impressions: one group of rows for every impression, with ``impression_id`` before these columns, the candidates
    from the best to the worst.

    Args:
        path: the file; None writes ``predictions.parquet``, ``predictions.jsonl`` or ``prediction.txt`` into the run's
            folder.
        format: ``parquet``; ``jsonl``: JSON Lines; ``mind``: the submission format of MIND for impressions, a line
            an impression in the order of the file with the rank of each of its candidates in the order shown.
    """

    def __init__(self, path: str | None = None, format: Literal["parquet", "jsonl", "mind"] = "parquet") -> None:
        self.path = path
        self.format = format
        self._parts: list[dict[str, torch.Tensor]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier prediction.

        Raises:
            ValueError: when MIND's format is asked for and there are no impressions.
        """
        self._parts = []
        if self.format == "mind" and not _of_impressions(pl_module):
            raise ValueError(
                "predictions.format: mind ranks the candidates of impressions, and this run recommends items to users: "
                "use parquet or jsonl, or lightning_rec.ImpressionTwoTower with a data module of impressions."
            )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps rows and scores of a batch, on the CPU."""
        impressions = _of_impressions(pl_module)
        self._parts.append(
            without_padding(outputs) if impressions else {name: value.cpu() for name, value in outputs.items()}
        )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the answers of all devices in order and writes them."""
        joined = _joined(self._parts)
        self._parts = []
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, joined)
            joined = _joined([part for part in gathered if part])
        name = "prediction.txt" if self.format == "mind" else f"predictions.{self.format}"
        path = Path(self.path) if self.path else run_folder(trainer) / name
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning
        if not _of_impressions(pl_module):
            assert self.format != "mind"
            table = prediction_table(joined, data.asked_users, data.catalogue.ids)
            write_table(table, path, self.format)
            left = len(set(data.asked_users)) - len(pc.unique(table.column("user_id")))
            none = f", {left:,} of whom have touched every item and have no row" if left else ""
            rank_zero_info(
                f"{len(data.asked_users):,} users{none}: {table.num_rows:,} recommendations written to {path}."
            )
            return
        asked = data.asked_impressions
        if self.format == "mind":
            write_submission(submission(joined, asked), path)
        else:
            write_table(impression_table(joined, asked, data.asked_users, data.catalogue.ids), path, self.format)
        rank_zero_info(f"The ranked candidates of {len(asked):,} impressions were written to {path}.")


def _of_impressions(module: LightningModule | None) -> bool:
    return bool(getattr(module, "answers_impressions", False))


def _joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def prediction_table(found: dict[str, torch.Tensor], users: Sequence[str], item_ids: Sequence[str]) -> pa.Table:
    """Predictions as a table with raw ids.

    Args:
        found: ``index`` ``(n,)``, ``rows`` ``(n, k)``, ``scores`` ``(n, k)``, ``fallback`` ``(n,)``, in any order.
        users: the users asked for.
        item_ids: raw id of each catalogue row.
    """
    if not found:
        return pa.table({name: pa.array([], kind) for name, kind in _COLUMNS.items()}, schema=pa.schema(_COLUMNS))
    order = torch.argsort(found["index"])
    rows, scores = found["rows"][order].numpy(), found["scores"][order].numpy()
    index, fallback = found["index"][order].numpy(), found["fallback"][order].numpy()
    real = rows > 0
    owner, column = np.nonzero(real)
    sources = pa.array(["towers", "popularity"])
    return pa.table(
        {
            "user_id": pa.array(list(users), pa.string()).take(pa.array(index[owner])),
            "rank": pa.array((np.cumsum(real, axis=1)[owner, column]).astype(np.int32)),
            "item_id": pa.array(list(item_ids), pa.string()).take(pa.array(rows[owner, column])),
            "score": pa.array(scores[owner, column].astype(np.float32)),
            "source": sources.take(pa.array(fallback[owner].astype(np.int64))),
        }
    )


_COLUMNS = {
    "user_id": pa.string(),
    "rank": pa.int32(),
    "item_id": pa.string(),
    "score": pa.float32(),
    "source": pa.string(),
}


def write_table(table: pa.Table, path: Path, format: Literal["parquet", "jsonl"]) -> None:
    """Writes a table in one piece: to a temporary file beside ``path``, which then takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    if format == "parquet":
        pq.write_table(table, temporary)
    else:
        with temporary.open("w", encoding="utf-8") as file:
            for batch in table.to_batches(max_chunksize=65_536):
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())
    temporary.replace(path)
