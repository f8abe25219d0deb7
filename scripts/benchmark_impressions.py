"""Impressions a second in test, beside a plain loop that encodes each impression by itself.

    python scripts/benchmark_impressions.py                        # a simulated log
    python scripts/benchmark_impressions.py --data FOLDER          # your own in MIND's format

Both score the same impressions with the same towers: frozen MiniLM over titles and abstracts, NRMS over the history.
The loop is what a first script does: for every impression it encodes the articles of the history and the candidates,
and scores them. The framework encodes each distinct article once. Nothing is read from a cache on either side.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path

import torch
from lightning import Trainer
from simulate_impressions import write

from lightning_rec import ImpressionTwoTower
from lightning_rec.data import NewsImpressionDataModule
from lightning_rec.data.batch import UserBatch
from lightning_rec.data.impressions import PARTS
from lightning_rec.metrics import ImpressionRanking, ImpressionResult
from lightning_rec.towers import NewsItemTower, NRMSUserTower


@torch.inference_mode()
def plain_loop(model: ImpressionTwoTower, data: NewsImpressionDataModule, count: int) -> tuple[float, dict[str, float]]:
    """Seconds and figures of the first ``count`` impressions of the test, one at a time."""
    tower = model.item_tower
    assert isinstance(tower, NewsItemTower)
    log, fields = data.impressions, data.view.fields
    numbers = [number for number in data.numbers("test").tolist() if log.labelled[number]][:count]
    metric = ImpressionRanking()
    start = time.perf_counter()
    for number in numbers:
        history = log.history[log.history_starts[number] : log.history_ends[number]][-data.max_history :].tolist()
        part = slice(log.starts[number], log.starts[number + 1])
        candidates = log.candidates[part].tolist()
        rows = [*history, *candidates]
        vectors = tower.encode_items({name: [fields[name][row] for row in rows] for name in ("title", "abstract")})
        users = UserBatch(
            torch.arange(len(history))[None], torch.tensor([len(history)]), torch.zeros(1, dtype=torch.int64)
        )
        interest = model.user_tower(users, vectors)[0, 0]
        scores = (vectors[len(history) :] @ interest)[None]
        labels = torch.from_numpy(log.labels[part]).float()[None]
        metric.update(ImpressionResult(scores, labels, torch.tensor([len(candidates)]), torch.tensor([candidates])))
    seconds = time.perf_counter() - start
    return seconds, {name: float(value) for name, value in metric.compute().items()}


def whole_test(
    model: ImpressionTwoTower, data: NewsImpressionDataModule, folder: Path
) -> tuple[float, dict[str, float]]:
    """Seconds and figures of the framework's test: encoding every distinct article, all impressions, all metrics."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder)
    start = time.perf_counter()
    found = trainer.test(model, data, verbose=False)[0]
    return time.perf_counter() - start, {name.removeprefix("test/"): value for name, value in found.items()}


def main() -> None:
    """Runs both on the same impressions and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in MIND's format; default: a simulated log")
    parser.add_argument("--impressions", type=int, default=100, help="test impressions that both score")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LIGHTNING_REC_CACHE"] = str(folder / "cache")
        source = options.data
        if source is None:
            source = folder / "log"
            write(source, impressions=max(100, round(options.impressions / 0.15)))
        data = NewsImpressionDataModule(path=str(source))
        data.setup()
        kept = data.numbers("test")[: options.impressions]
        data.parts[data.numbers("test")] = PARTS.index("predict")
        data.parts[kept] = PARTS.index("test")
        torch.manual_seed(0)
        model = ImpressionTwoTower(
            NewsItemTower(language_model="minilm", dim=64, categories=(), entities=None), NRMSUserTower()
        )
        model.build(data.view)
        ours_seconds, ours = whole_test(model, data, folder)
        loop_seconds, theirs = plain_loop(model.eval(), data, len(kept))
    print(f"{len(kept)} impressions, {len(data.catalogue) - 1:,} articles; {options.threads} threads")
    print("|               |  seconds | impressions/s |    auc |")
    print("| ------------- | -------: | ------------: | -----: |")
    for label, seconds, figures in (("plain loop", loop_seconds, theirs), ("lightning_rec", ours_seconds, ours)):
        print(f"| {label:<13} | {seconds:8.1f} | {len(kept) / seconds:13.1f} | {figures['auc']:.4f} |")
    print(f"ratio {loop_seconds / ours_seconds:.1f}, difference of AUC {abs(ours['auc'] - theirs['auc']):.1e}")


if __name__ == "__main__":
    main()
