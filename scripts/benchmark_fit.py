#!/usr/bin/env python3
"""Measures the speed of fit beside RecTools' SASRec: the same data, architecture, loss, batch and threads.

The two sides take turns, each in a process of its own, and every epoch is timed from its first to its last step, so
that loading and building count on neither side. The figure is supervised positions a second: the steps of the
training histories that have a next item to predict. Users with leave-one-out's last two events taken off and at
least two left are trained on, on both sides.

RecTools pins older packages, so it lives in an environment of its own (about 1.5 GB)::

    python3 -m venv .venv-rectools
    .venv-rectools/bin/pip install torch==2.13.0 "rectools[torch]==0.19.0"

Then, with the folder of the data at hand::

    .venv/bin/python scripts/benchmark_fit.py scientific --data DIR --rectools-python .venv-rectools/bin/python
    .venv/bin/python scripts/benchmark_fit.py ml100k --data DIR --rectools-python .venv-rectools/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    width: int
    length: int
    batch: int
    blocks: int = 2
    heads: int = 2
    dropout: float = 0.2
    lr: float = 1e-3
    epochs: int = 2
    threads: int = 2
    seed: int = 0


SETTINGS = {
    "scientific": Setting(width=128, length=20, batch=256),
    "ml100k": Setting(width=64, length=100, batch=128),
}


def read_histories(folder: Path) -> dict[str, list[str]]:
    """Reads whole histories, oldest first, from MovieLens-100K's tables or from a ``.inter.json``."""
    histories: dict[str, list[str]] = defaultdict(list)
    inter = folder / "ml-100k.inter"
    if inter.is_file():
        rows = [line.split("\t") for line in inter.read_text().splitlines()[1:]]
        for user, item, _, _ in sorted(rows, key=lambda row: float(row[3])):
            histories[user].append(item)
        return dict(histories)
    files = sorted(folder.glob("*.inter.json"))
    if len(files) != 1:
        raise SystemExit(f"{folder} holds neither ml-100k.inter nor exactly one *.inter.json.")
    return {user: [str(item) for item in items] for user, items in json.loads(files[0].read_text()).items()}


def training_part(histories: dict[str, list[str]]) -> dict[str, list[str]]:
    """Leave-one-out: the last event is for the test, the one before for validation."""
    return {user: items[:-2] for user, items in histories.items() if len(items) >= 4}


def run_rectools(histories: dict[str, list[str]], setting: Setting) -> dict[str, Any]:
    """Fits RecTools' SASRec; runs in RecTools' own environment."""
    import pandas as pd
    import torch
    from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    torch.set_num_threads(setting.threads)
    seed_everything(setting.seed, verbose=False)

    class Clock(Callback):
        """Times every epoch and counts the positions that have a target."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.positions: list[int] = []

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.positions.append(0)
            self.begun = time.perf_counter()

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            self.positions[-1] += int((batch["y"] != 0).sum())

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.seconds.append(time.perf_counter() - self.begun)

    rows = [(user, item, 1.0, time) for user, items in histories.items() for time, item in enumerate(items)]
    table = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
    table[Columns.Datetime] = pd.to_datetime(table[Columns.Datetime], unit="s")

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=setting.epochs,
            accelerator="cpu",
            callbacks=[Clock()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    model = SASRecModel(
        n_blocks=setting.blocks,
        n_heads=setting.heads,
        n_factors=setting.width,
        dropout_rate=setting.dropout,
        session_max_len=setting.length,
        loss="softmax",
        lr=setting.lr,
        batch_size=setting.batch,
        epochs=setting.epochs,
        get_trainer_func=trainer,
    )
    model.fit(Dataset.construct(table))
    # RecTools fits with a copy of the trainer that it was given.
    clock = next(callback for callback in model.fit_trainer.callbacks if isinstance(callback, Clock))
    loss = float(model.fit_trainer.callback_metrics["train_loss"])
    return {"seconds": clock.seconds, "positions": clock.positions, "loss": loss}


def run_ours(data: Path, setting: Setting) -> dict[str, Any]:
    """Fits an id item tower and a causal sequence user tower by this package, through ``Trainer.fit``."""
    import torch
    from lightning import Callback, LightningModule, Trainer, seed_everything

    from lightning_rec import EcommerceDataModule, TwoTower, VideoDataModule
    from lightning_rec.towers import IdItemTower, SequenceUserTower

    torch.set_num_threads(setting.threads)
    seed_everything(setting.seed, verbose=False)

    class Clock(Callback):
        """Times every epoch, counts the positions that have a target and remembers the loss of every step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.positions: list[int] = []
            self.losses: list[float] = []

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.positions.append(0)
            self.losses = []
            self.begun = time.perf_counter()

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.positions[-1] += int((batch.targets > 0).sum())
            self.losses.append(float(outputs["loss"]))

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.seconds.append(time.perf_counter() - self.begun)

    domain = VideoDataModule if (data / "ml-100k.inter").is_file() else EcommerceDataModule
    module = TwoTower(
        IdItemTower(dim=setting.width),
        SequenceUserTower(
            blocks=setting.blocks, heads=setting.heads, max_length=setting.length, dropout=setting.dropout
        ),
        lr=setting.lr,
    )
    clock = Clock()
    trainer = Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, domain(path=str(data), max_history=setting.length, batch_size=setting.batch))
    return {"seconds": clock.seconds, "positions": clock.positions, "loss": sum(clock.losses) / len(clock.losses)}


def work(side: str, options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """One turn of one side, in this process."""
    if side == "ours":
        return run_ours(options.data, setting)
    return run_rectools(training_part(read_histories(options.data)), setting)


def turn(side: str, options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """One turn of one side, in a process of its own with the environment that the side needs."""
    python = sys.executable if side == "ours" else str(options.rectools_python)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [python, str(Path(__file__).resolve()), options.dataset, "--data", str(options.data)]
        command += ["--side", side, "--setting", json.dumps(asdict(setting)), "--answer", str(answer)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
        # In a folder of its own: neither side finds files of the other, and what Lightning writes is thrown away.
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"The side {side} failed:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measures the speed of fit beside RecTools' SASRec.")
    parser.add_argument("dataset", choices=sorted(SETTINGS))
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--rectools-python", type=Path, help="python of the environment that holds RecTools 0.19")
    parser.add_argument("--only", choices=["ours", "rectools"], help="measure one side only")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default: 2)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs a turn (default: 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (default: all cores)")
    for hidden in ("--side", "--setting", "--answer"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.data = options.data.resolve()
    if options.rectools_python is None and not options.side and options.only != "ours":
        parser.error("--rectools-python is missing: the head of this script says how to make that environment.")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = parse(arguments)
    if options.side:
        answer = work(options.side, options, Setting(**json.loads(options.setting)))
        Path(options.answer).write_text(json.dumps(answer))
        return 0
    setting = replace(SETTINGS[options.dataset], epochs=options.epochs, threads=options.threads)
    print(f"{options.dataset}: {setting}", flush=True)
    sides = [options.only] if options.only else ["rectools", "ours"]
    speeds: dict[str, list[float]] = defaultdict(list)
    for number in range(1, options.rounds + 1):
        for side in sides:
            found = turn(side, options, setting)
            for epoch, (seconds, positions) in enumerate(zip(found["seconds"], found["positions"], strict=True), 1):
                speeds[side].append(positions / seconds)
                print(
                    f"turn {number} {side:8} epoch {epoch}: {positions} positions in {seconds:.2f} s, "
                    f"{positions / seconds:.0f} a second",
                    flush=True,
                )
            print(f"turn {number} {side:8} training loss of the last epoch: {found['loss']:.3f}", flush=True)
    middle = {side: median(values) for side, values in speeds.items()}
    print("\nmedian: " + ", ".join(f"{side} {speed:.0f} positions a second" for side, speed in middle.items()))
    if len(middle) == 2:
        print(f"ratio: {middle['ours'] / middle['rectools']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
