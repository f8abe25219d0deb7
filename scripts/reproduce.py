#!/usr/bin/env python3
"""Trains and tests a row of the table of results, with several seeds, and prints it with its mean and spread.

    python scripts/reproduce.py --list
    python scripts/reproduce.py scientific --data DIR
    python scripts/reproduce.py scientific --data DIR --grid         # choose the row's options on validation first
    python scripts/reproduce.py ml100k --seeds 0,1 -- --trainer.max_epochs 5

The rows stand in ``configs/reproduce.yaml``; a row may add options to its config, and may test the ensemble of its
seeds, alone (``ensemble``) and with another row's run (``beside``, with a weight chosen on validation). Options are
chosen by validation NDCG@10 alone: with ``--grid`` every combination is fitted once and validated, the table of that
is printed, and only the best one is tested. What follows ``--`` goes to every command. A run whose figures lie in the
folder already is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "configs" / "reproduce.yaml"
CHOOSE_BY = "val/ndcg@10"
METRICS = ("test/ndcg@10", "test/recall@10", "test/recall@50")


def read_rows() -> dict[str, dict[str, Any]]:
    """The named rows."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    return rows


def combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of a grid; one empty combination for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def options_of(chosen: dict[str, Any]) -> list[str]:
    """A combination as options of a command; booleans and null as YAML writes them."""
    return [text for name, value in chosen.items() for text in (f"--{name}", json.dumps(value).strip('"'))]


def label_of(chosen: dict[str, Any], seed: int) -> str:
    """Name of a run's folder."""
    parts = [f"{name.rsplit('.', 1)[-1]}={value}" for name, value in chosen.items()]
    return "_".join([*parts, f"seed={seed}"]).replace("/", "-")


class Runner:
    """Runs commands for one row, and reads the figures that they leave.

    Args:
        config: the row's config.
        folder: where runs are kept.
        more: options of every command.
        checkpoint: what is validated and tested, ``best`` or ``last``.
    """

    def __init__(self, config: str, folder: Path, more: Sequence[str], checkpoint: str = "best") -> None:
        self.config = config
        self.folder = folder
        self.more = list(more)
        self.checkpoint = checkpoint

    def _command(self, name: str, chosen: dict[str, Any], seed: int, *extra: str, place: Path | None = None) -> None:
        place = place or self.folder / label_of(chosen, seed)
        command = [sys.executable, "-m", "lightning_rec.cli", name, "--config", str(ROOT / self.config)]
        command += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(place)]
        command += [*options_of(chosen), *self.more, *extra]
        place.mkdir(parents=True, exist_ok=True)
        with (place / f"{name}.log").open("w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            tail = (place / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(command)}\nfailed; the end of {log.name} says:\n{tail}")

    @staticmethod
    def _read(place: Path, stage: str) -> dict[str, float] | None:
        files = sorted(place.rglob(f"{stage}_metrics.json"))
        return json.loads(files[-1].read_text(encoding="utf-8"))["metrics"] if files else None

    def figures(self, chosen: dict[str, Any], seed: int, stage: str) -> dict[str, float]:
        """Figures of a fitted run: it is fitted, and validated or tested, where that was not done yet.

        Args:
            chosen: options of the run.
            seed: its seed.
            stage: ``validate`` or ``test``.
        """
        place = self.folder / label_of(chosen, seed)
        found = self._read(place, stage)
        if found is None:
            if not (place / "fitted").exists():
                self._command("fit", chosen, seed)
                (place / "fitted").touch()
            self._command(stage, chosen, seed, "--ckpt_path", self.checkpoint)
            found = self._read(place, stage)
        if found is None:
            raise SystemExit(f"The command {stage} left no {stage}_metrics.json in {self.folder}.")
        return found

    def checkpoint_of(self, chosen: dict[str, Any], seed: int) -> str:
        """The checkpoint of a fitted run that is tested."""
        from lightning_rec.run_files import resolve_checkpoint

        return str(resolve_checkpoint(self.checkpoint, str(self.folder / label_of(chosen, seed))))

    def ensemble(self, name: str, files: Sequence[str], *options: str) -> dict[str, float]:
        """Test figures of fitted runs that answer together.

        Args:
            name: of the folder for the figures.
            files: their checkpoints.
            options: options of ``lightning_rec.Ensemble``.
        """
        place = self.folder / "ensemble" / name
        found = self._read(place, "test")
        if found is None:
            members = ["--model", "lightning_rec.Ensemble", "--model.checkpoints", json.dumps(list(files))]
            self._command("test", {}, 0, *members, *options, place=place)
            found = self._read(place, "test")
        if found is None:
            raise SystemExit(f"The command test left no test_metrics.json in {place}.")
        return found


def choose(runner: Runner, grid: dict[str, list[Any]], seed: int) -> dict[str, Any]:
    """The combination with the best validation figure; prints the figures of all."""
    print(f"Chosen by {CHOOSE_BY} of seed {seed}; nothing has been tested yet:")
    scored = []
    for chosen in combinations(grid):
        value = runner.figures(chosen, seed, "validate")[CHOOSE_BY]
        scored.append((value, chosen))
        print(f"  {value:.4f}  {' '.join(options_of(chosen)) or 'the config as it is'}", flush=True)
    best = max(scored, key=lambda pair: pair[0])[1]
    print(f"Chosen: {' '.join(options_of(best)) or 'the config as it is'}", flush=True)
    return best


def table(about: str, config: str, figures: list[dict[str, float]], runs: str = "") -> str:
    """The row in Markdown: means, and standard deviations over the seeds.

    Args:
        about: what the row is.
        config: its config.
        figures: of each run.
        runs: what the runs are; empty: so many seeds.
    """
    cells = []
    for name in METRICS:
        values = [run[name] for run in figures]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4f}{spread}")
    runs = runs or f"{len(figures)} seed{'s' if len(figures) > 1 else ''}"
    return f"| {about} ({runs}) | `{config}` | {' | '.join(cells)} |"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains and tests a row of the table of results.",
        epilog="What follows -- goes to every command, such as -- --trainer.max_epochs 5.",
    )
    parser.add_argument("name", nargs="?", help="a row of configs/reproduce.yaml")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--data", help="where the data lie (data.path); default: what the config says")
    parser.add_argument("--seeds", help="comma-separated seeds (default: 0,1,2, or 0 for rows that take long)")
    parser.add_argument("--grid", action="store_true", help="choose the row's options on validation first")
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce"), help="where runs are kept")
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    options.more = given[end + 1 :]
    if not options.list:
        rows = read_rows()
        if options.name not in rows:
            parser.error(f"There is no row {options.name!r}; the rows are {', '.join(rows)}.")
    return options


def make(name: str, rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> Runner:
    """The runner of a row."""
    row = rows[name]
    more = [
        *options_of(row.get("options", {})),
        *(["--data.path", options.data] if options.data else []),
        *options.more,
    ]
    return Runner(row["config"], options.folder.resolve() / name, more, row.get("checkpoint", "best"))


def main(arguments: list[str] | None = None) -> int:
    """Runs a row; returns the exit status."""
    options = parse(arguments)
    rows = read_rows()
    if options.list:
        for name, row in rows.items():
            print(f"{name:20s} {row['about']}: {row['config']}")
        return 0
    row = rows[options.name]
    given = options.seeds or ",".join(str(seed) for seed in range(row.get("seeds", 3)))
    seeds = [int(seed) for seed in given.split(",")]
    more = [
        *options_of(row.get("options", {})),
        *(["--data.path", options.data] if options.data else []),
        *options.more,
    ]
    folder = options.folder.resolve() / options.name
    runner = Runner(row["config"], folder, more, row.get("checkpoint", "best"))
    chosen = choose(runner, row.get("grid", {}), seeds[0]) if options.grid else {}
    figures = []
    for seed in seeds:
        figures.append(runner.figures(chosen, seed, "test"))
        shown = ", ".join(f"{name} {figures[-1][name]:.4f}" for name in METRICS)
        print(f"seed {seed}: {shown}", flush=True)
    print(table(row["about"], row["config"], figures), flush=True)
    if row.get("ensemble") and len(seeds) > 1:
        files = [runner.checkpoint_of(chosen, seed) for seed in seeds]
        together = runner.ensemble(label_of(chosen, len(seeds)), files)
        print(table(row["about"], row["config"], [together], f"ensemble of {len(seeds)} seeds"), flush=True)
    if row.get("beside"):
        beside = make(row["beside"]["row"], rows, options)
        beside.figures({}, 0, "test")
        files = [*(runner.checkpoint_of(chosen, seed) for seed in seeds), beside.checkpoint_of({}, 0)]
        # the weight counts against the mean of the seeds
        weights = json.dumps([1.0] * len(seeds) + [row["beside"]["weight"] * len(seeds)])
        scores = ["--model.normalise", "none", "--model.weights", weights]
        together = runner.ensemble(f"beside_{label_of(chosen, len(seeds))}", files, *scores)
        about = f"ensemble of {len(seeds)} seed{'s' if len(seeds) > 1 else ''} and {row['beside']['row']}"
        print(table(row["about"], row["config"], [together], about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
