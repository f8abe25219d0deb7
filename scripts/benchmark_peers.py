#!/usr/bin/env python3
"""Measures how well RecTools' SASRec and eSASRec rank, on the very split, candidates and filter of one of our configs.

A row of the table of results says how well a config of ours ranks; this script says what its strongest peers reach on
the same events. Our data module reads and splits the data; each peer gets the training events of every user, and ranks
what our run ranks: all items, for the same users, with or without the items they touched. Each combination of a small
grid is fitted with early stopping by validation NDCG@10; the best combination on validation is then fitted with the
other seeds, and only its test figures are reported.

SASRec is RecTools' own (softmax over all items); eSASRec is the same with LiGR layers and a sampled softmax of 256
uniform negatives (Tikhonovich et al., RecSys 2025, arXiv:2508.06450). RecTools pins older packages, so it lives in an
environment of its own (about 1.5 GB)::

    python3 -m venv .venv-rectools
    .venv-rectools/bin/pip install torch==2.13.0 "rectools[torch]==0.19.0"
    .venv/bin/python scripts/benchmark_peers.py configs/video/ml100k.yaml \
        --rectools-python .venv-rectools/bin/python -- --data.path DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEERS = ("SASRec", "eSASRec")
WIDTHS, DROPOUTS = (64, 128), (0.2, 0.4)
METRICS = ("ndcg@10", "recall@10", "recall@50")


# ------------------------------------------------------------------------------------------------ our environment


def read_split(config: Path, options: list[str]) -> dict[str, Any]:
    """The split that a config makes, as plain lists.

    Args:
        config: a config of ``lightning-rec fit`` whose data module splits by leave-one-out.
        options: more options of its data module, such as ``--data.path DIR``.

    Returns:
        ``events``: item numbers of each user, oldest first; ``train``: how many of them are trained on; ``validation``
        and ``test``: ``[user, first event to find]`` of each user that is evaluated; ``touched``: items that are to be
        filtered though they are no events; ``filter_seen``, ``max_history``, ``protocol``.
    """
    import yaml
    from jsonargparse import ArgumentParser
    from lightning import LightningDataModule

    from lightning_rec.data.datamodule import RecDataModule

    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    said = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
    data = parser.instantiate(parser.parse_args(["--data", json.dumps(said), *options])).data
    if not isinstance(data, RecDataModule):
        raise SystemExit(f"{config} has no data module whose catalogue is ranked as a whole.")
    data.setup("test")
    histories, split = data.histories, data.split
    if split.name != "leave_one_out":
        raise SystemExit(f"{config} splits by {split.name}; peers are compared on leave-one-out only.")
    bounds = list(zip(histories.indptr[:-1].tolist(), histories.indptr[1:].tolist(), strict=True))
    touched: dict[int, list[int]] = {}
    if data.touched is not None:
        ends = data.touched.indptr.tolist()
        touched = {
            user: data.touched.items[ends[user] : ends[user + 1]].tolist()
            for user in range(len(ends) - 1)
            if ends[user + 1] > ends[user]
        }
    starts = histories.indptr[:-1]
    return {
        "events": [histories.items[begin:end].tolist() for begin, end in bounds],
        "train": (split.train_end - starts).tolist(),
        "validation": [[int(u), int(split.validation_begin[u] - starts[u])] for u in split.validation_users],
        "test": [[int(u), int(split.test_begin[u] - starts[u])] for u in split.test_users],
        "touched": touched,
        "filter_seen": data.filter_seen,
        "max_history": data.max_history,
        "protocol": data.protocol,
    }


# --------------------------------------------------------------------------------------------- RecTools' environment


def figures(ranked: dict[int, list[int]], wanted: list[list[int]], events: list[list[int]]) -> dict[str, float]:
    """NDCG@10 and recall of one target a user; a user without a list counts as a miss."""
    sums = dict.fromkeys(METRICS, 0.0)
    for user, first in wanted:
        found = ranked.get(user, [])
        target = events[user][first]
        if target in found:
            place = found.index(target)
            sums["ndcg@10"] += 1 / math.log2(place + 2) if place < 10 else 0.0
            sums["recall@10"] += place < 10
            sums["recall@50"] += place < 50
    return {name: value / max(1, len(wanted)) for name, value in sums.items()}


def run_peer(split: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """Fits one peer, looks at validation every ``setting["every"]`` epochs, and keeps the test figures of the best."""
    import pandas as pd
    import torch
    from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.transformers.ligr import LiGRLayers

    torch.set_num_threads(setting["threads"])
    seed_everything(setting["seed"], verbose=False)
    events: list[list[int]] = split["events"]

    def data(parts: list[tuple[int, list[int]]]) -> Any:
        rows = [(user, item, 1.0, time) for user, items in parts for time, item in enumerate(items)]
        table = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
        table[Columns.Datetime] = pd.to_datetime(table[Columns.Datetime], unit="s")
        return Dataset.construct(table)

    trained = [(user, items[:end]) for user, (items, end) in enumerate(zip(events, split["train"], strict=True)) if end]
    known = {item for _, items in trained for item in items}
    train = data(trained)
    histories = {
        part: data([(user, events[user][:first]) for user, first in split[part]]) for part in ("validation", "test")
    }
    touched = {int(user): set(items) for user, items in split["touched"].items()}
    best: dict[str, Any] = {"validation": {"ndcg@10": -1.0}, "waited": 0}

    class Look(Callback):
        """Measures validation every few epochs, and stops where it no longer gets better."""

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            epoch = trainer.current_epoch + 1
            if epoch % setting["every"]:
                return
            model.is_fitted = True  # it can rank already
            found = measure("validation")
            best["waited"] += 1
            if found["ndcg@10"] > best["validation"]["ndcg@10"]:
                best.update(validation=found, test=measure("test"), epoch=epoch, waited=0)
            trainer.should_stop = best["waited"] >= setting["patience"]
            pl_module.train()
            print(f"epoch {epoch}: validation NDCG@10 {found['ndcg@10']:.4f}", file=sys.stderr, flush=True)

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=setting["epochs"],
            accelerator="cpu",
            callbacks=[Look()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    more: dict[str, Any] = {}
    if setting["peer"] == "eSASRec":
        more = {"transformer_layers_type": LiGRLayers, "loss": "sampled_softmax", "n_negatives": 256}
    model = SASRecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=setting["width"],
        dropout_rate=setting["dropout"],
        session_max_len=split["max_history"],
        lr=setting["lr"],
        batch_size=setting["batch"],
        get_trainer_func=trainer,
        recommend_n_threads=setting["threads"],
        **more,
    )

    def measure(part: str) -> dict[str, float]:
        wanted = split[part]
        # a user whose whole history is unknown to the model gets no list
        users = [user for user, first in wanted if known.intersection(events[user][:first])]
        spare = max((len(items) for items in touched.values()), default=0) if split["filter_seen"] else 0
        table = model.recommend(users, histories[part], k=50 + spare, filter_viewed=split["filter_seen"])
        ranked = table.sort_values([Columns.User, Columns.Rank]).groupby(Columns.User)[Columns.Item].apply(list)
        if spare:
            return figures(
                {u: [i for i in items if i not in touched.get(u, ())] for u, items in ranked.items()}, wanted, events
            )
        return figures(ranked.to_dict(), wanted, events)

    model.fit(train)
    return best


# ---------------------------------------------------------------------------------------------------- the whole


def turn(python: Path, split: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """One fit of a peer, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [str(python), str(Path(__file__).resolve()), "--split", str(split)]
        command += ["--setting", json.dumps(setting), "--answer", str(answer)]
        threads = str(setting["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{setting['peer']} failed:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Measures how well RecTools' SASRec and eSASRec rank, on the split of one of our configs.",
        epilog="What follows -- goes to the data module, such as -- --data.path DIR.",
    )
    parser.add_argument("config", nargs="?", type=Path, help="a config of lightning-rec fit")
    parser.add_argument("--rectools-python", type=Path, help="python of the environment that holds RecTools 0.19")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"comma-separated (default: {','.join(PEERS)})")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; the grid is fitted with the first")
    parser.add_argument("--epochs", type=int, default=60, help="most epochs of a fit (default: 60)")
    parser.add_argument("--every", type=int, default=2, help="epochs between looks at validation (default: 2)")
    parser.add_argument("--patience", type=int, default=4, help="looks without a better figure (default: 4)")
    parser.add_argument("--batch", type=int, default=128, help="users a step (default: 128)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam (default: 0.001)")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="grid of widths (default: 64,128)")
    parser.add_argument("--dropouts", default=",".join(map(str, DROPOUTS)), help="grid of dropout (default: 0.2,0.4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (default: all cores)")
    for hidden in ("--split", "--setting", "--answer"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    options.more = given[end + 1 :]
    if not options.setting:
        if options.config is None or not options.config.is_file():
            parser.error(f"There is no config {options.config}: name one of lightning-rec fit.")
        if options.rectools_python is None:
            parser.error("--rectools-python is missing: the head of this script says how to make that environment.")
        if unknown := set(options.peers.split(",")) - set(PEERS):
            parser.error(f"There is no peer {sorted(unknown)[0]!r}; the peers are {', '.join(PEERS)}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = parse(arguments)
    if options.setting:
        split = json.loads(Path(options.split).read_text())
        Path(options.answer).write_text(json.dumps(run_peer(split, json.loads(options.setting))))
        return 0
    split = read_split(options.config, options.more)
    print(split["protocol"], flush=True)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    common = {name: getattr(options, name) for name in ("epochs", "every", "patience", "batch", "lr", "threads")}
    python = options.rectools_python.absolute()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "split.json"
        file.write_text(json.dumps(split))
        for peer in options.peers.split(","):
            tried = []
            for width, dropout in itertools.product(options.widths.split(","), options.dropouts.split(",")):
                setting = {**common, "peer": peer, "width": int(width), "dropout": float(dropout), "seed": seeds[0]}
                found = turn(python, file, setting)
                tried.append((found["validation"]["ndcg@10"], setting, found))
                print(
                    f"{peer} width {width}, dropout {dropout}, seed {seeds[0]}: validation NDCG@10 "
                    f"{tried[-1][0]:.4f} at epoch {found['epoch']}",
                    flush=True,
                )
            _, setting, first = max(tried, key=lambda entry: entry[0])
            chosen = [first, *(turn(python, file, {**setting, "seed": seed}) for seed in seeds[1:])]
            cells = []
            for name in METRICS:
                values = [run["test"][name] for run in chosen]
                spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{name} {statistics.mean(values):.4f}{spread}")
            about = f"width {setting['width']}, dropout {setting['dropout']}, seeds {options.seeds}"
            print(f"{peer}, test ({about}): {', '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
