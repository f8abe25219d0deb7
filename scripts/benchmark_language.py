#!/usr/bin/env python3
"""Examples a second of a fit through a language model, beside sentence-transformers' trainer, and the memory of each.

An example is a pair of items that one user took one after the other: the second is to be found among the others of the
batch by the text of the first. Both sides train the same MiniLM with the same adapter on the same pairs in the same
batches' size: ours by ``Trainer.fit`` of a ``TwoTower``, the other by ``SentenceTransformerTrainer`` with
``MultipleNegativesRankingLoss``. The sides, each in a process of its own, in turns:

- ``lora`` against ``st_lora``: LoRA in every layer;
- ``top`` against ``st_top``: LoRA in the two top layers, the output of the frozen ones below cached by ours;
- ``side``: a side network over the cached hidden states, against both.

    python scripts/benchmark_language.py                                   # generated texts and pairs
    python scripts/benchmark_language.py --data DIR --module EcommerceDataModule

Needs ``pip install sentence-transformers accelerate datasets``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmark_encoding import WORDS

SIDES = ("lora", "st_lora", "top", "st_top", "side")
NAMES = {
    "lora": "LoRA in all layers, lightning_rec",
    "st_lora": "LoRA in all layers, sentence-transformers",
    "top": "LoRA in the top layers, lightning_rec",
    "st_top": "LoRA in the top layers, sentence-transformers",
    "side": "side network, lightning_rec",
}
TOP_LAYERS = 2
WARM_UP = 2  # steps


def generated(items: int, pairs: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Texts of 10 to 60 words, and pairs drawn by Zipf's law, as popular items come again and again."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(10, 60))) for _ in range(items)]
    weights = [1 / rank for rank in range(1, items + 1)]
    drawn = rng.choices(range(items), weights, k=2 * pairs)
    return texts, list(zip(drawn[::2], drawn[1::2], strict=True))


def of_data(module: str, folder: str, pairs: int) -> tuple[list[str], list[tuple[int, int]]]:
    """The texts of a data set, and pairs of consecutive training events drawn from it."""
    import lightning_rec

    data = getattr(lightning_rec, module)(path=folder)
    data.prepare_data()
    data.setup("fit")
    histories = data.histories
    found: list[tuple[int, int]] = []
    for start, end in zip(histories.indptr[:-1].tolist(), histories.indptr[1:].tolist(), strict=True):
        events = histories.items[start : max(start, end - 2)].tolist()  # the two newest are for validation and test
        found.extend(itertools.pairwise(events))
    chosen = random.Random(0).sample(found, min(pairs, len(found)))
    return list(data.catalogue.texts), chosen


# ---------------------------------------------------------------------- one side


def measure(side: str, job: dict[str, Any], folder: Path) -> dict[str, float]:
    """Trains one side; returns seconds of its steps after the warm-up, and the memory that training added."""
    texts, pairs = job["texts"], job["pairs"]
    steps: list[float] = []
    run = _sentence_transformers if side.startswith("st_") else _ours
    before = run(side, texts, pairs, job, folder, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = steps[-1] - steps[WARM_UP - 1]
    return {"rate": job["batch_size"] * (len(steps) - WARM_UP) / seconds, "mib": (peak - before) / 1024}


def _lora(layers: int, top: bool) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["query", "value"],
        layers_to_transform=list(range(layers - TOP_LAYERS, layers)) if top else None,
        task_type="FEATURE_EXTRACTION",
    )


def _ours(
    side: str, texts: list[str], pairs: list[list[int]], job: dict[str, Any], folder: Path, steps: list[float]
) -> int:
    from lightning import Callback, Trainer, seed_everything

    from lightning_rec import EcommerceDataModule, TwoTower
    from lightning_rec.data.readers import Files
    from lightning_rec.objectives import Softmax
    from lightning_rec.towers import PooledUserTower, TextItemTower
    from lightning_rec.towers.score import Cosine

    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"item_id": str(row), "title": text}) + "\n" for row, text in enumerate(texts))
    with (folder / "log.csv").open("w", encoding="utf-8") as file:
        file.write("user_id,item_id,timestamp\n")
        for number, (first, second) in enumerate(pairs):
            file.write(f"u{number},{first},1600000000\nu{number},{second},1600000001\n")
    options: dict[str, Any] = {"max_tokens": job["max_tokens"], "dim": None, "projection": "none"}
    if side == "side":
        from lightning_rec.towers import SideItemTower

        tower: Any = SideItemTower(max_tokens=job["max_tokens"], dim=384, cache_dir=str(folder))
    else:
        if side == "top":
            options |= {"frozen_layers": 6 - TOP_LAYERS, "cache_dir": str(folder)}
        tower = TextItemTower(peft=_lora(6, side == "top"), **options)
    data = EcommerceDataModule(
        Files(str(folder / "log.csv"), str(folder / "items.jsonl")),
        batch_size=job["batch_size"],
        candidates="batch",
        max_history=1,
        template="{title}",
        cleaning=[],
    )
    module = TwoTower(tower, PooledUserTower(), Softmax(), Cosine(0.05), language_lr=2e-5)

    class Clock(Callback):
        """Notes when each step ended."""

        def on_train_batch_end(self, *_: Any) -> None:
            steps.append(time.perf_counter())

        def on_train_start(self, *_: Any) -> None:
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    clock = Clock()
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_steps=job["steps"],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[clock],
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    return clock.before


def _sentence_transformers(
    side: str, texts: list[str], pairs: list[list[int]], job: dict[str, Any], folder: Path, steps: list[float]
) -> int:
    from datasets import Dataset
    from peft import get_peft_model
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.training_args import SentenceTransformerTrainingArguments
    from transformers import TrainerCallback

    from lightning_rec.towers.language import find_language_model

    model = SentenceTransformer(str(find_language_model("minilm")), device="cpu")
    model.max_seq_length = job["max_tokens"]
    # add_adapter of this transformers wants a newer peft than others do; it puts the same layers in the same places
    transformer: Any = model[0]
    transformer.auto_model = get_peft_model(transformer.auto_model, _lora(6, side == "st_top"))
    dataset = Dataset.from_dict(
        {"anchor": [texts[first] for first, _ in pairs], "positive": [texts[second] for _, second in pairs]}
    )

    class Clock(TrainerCallback):
        """Notes when each step ended."""

        before = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append(time.perf_counter())

    clock = Clock()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "st"),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=2e-5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[clock],
    ).train()
    return clock.before


# ---------------------------------------------------------------------- all of them


def main(arguments: list[str] | None = None) -> int:
    """Runs the sides in turns and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Examples a second of a fit through a language model.")
    parser.add_argument("--data", help="a data set to take texts and pairs from; default: generated ones")
    parser.add_argument("--module", default="EcommerceDataModule", help="the data module that reads --data")
    parser.add_argument("--items", type=int, default=2000, help="generated texts (default: 2000)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of a step (default: 64)")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run, two of them to warm up (default: 12)")
    parser.add_argument("--max-tokens", type=int, default=128, help="texts are cut to so many tokens (default: 128)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side; the best counts (default: 2)")
    parser.add_argument("--only", default=",".join(SIDES), help=f"sides to measure (default: {','.join(SIDES)})")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(options.side, json.loads(options.job.read_text()), Path(folder))
        options.job.with_suffix(".out").write_text(json.dumps(figures))
        return 0
    sides = options.only.split(",")
    unknown = sorted(set(sides) - set(SIDES))
    if unknown:
        parser.error(f"There is no side {unknown[0]!r}; the sides are {', '.join(SIDES)}.")
    pairs = options.batch_size * options.steps
    texts, chosen = of_data(options.module, options.data, pairs) if options.data else generated(options.items, pairs)
    if len(chosen) < pairs:
        parser.error(f"The data have only {len(chosen)} pairs; {pairs} are needed: lower --steps or --batch-size.")
    job = {
        "texts": texts,
        "pairs": chosen,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "max_tokens": options.max_tokens,
    }
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "job.json"
        place.write_text(json.dumps(job))
        for _ in range(options.rounds):
            for side in sides:
                command = [sys.executable, __file__, "--side", side, "--job", str(place)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"The side {side} failed:\n{done.stderr[-3000:]}")
                found = json.loads(place.with_suffix(".out").read_text())
                print(f"{side}: {found['rate']:.1f} examples a second, {found['mib']:.0f} MiB", file=sys.stderr)
                if side not in best or found["rate"] > best[side]["rate"]:
                    best[side] = found
    print(f"{options.steps} steps of {options.batch_size} pairs, texts of at most {options.max_tokens} tokens\n")
    print("| side | examples a second | memory that training added |\n| --- | ---: | ---: |")
    for side, found in best.items():
        print(f"| {NAMES[side]} | {found['rate']:.1f} | {found['mib']:,.0f} MiB |")
    for ours, theirs in (("lora", "st_lora"), ("top", "st_top"), ("side", "st_lora"), ("side", "st_top")):
        if ours in best and theirs in best:
            print(f"{ours} against {theirs}: {best[ours]['rate'] / best[theirs]['rate']:.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
