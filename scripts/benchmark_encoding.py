"""How many texts a second the framework encodes, beside sentence-transformers' ``encode`` with one model and limit.

    python scripts/benchmark_encoding.py                          # 20,000 generated texts
    python scripts/benchmark_encoding.py --texts items.jsonl      # your own: .jsonl, .json or .txt
    python scripts/benchmark_encoding.py --limit 1000             # a quick look

Both encode the same list in one process, in turns; the best of ``--rounds`` counts. Nothing is read from a cache.
Needs ``pip install sentence-transformers``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rec.towers import TextEncoder

WORDS = [
    "stainless",
    "steel",
    "cotton",
    "leather",
    "wireless",
    "portable",
    "digital",
    "compact",
    "heavy",
    "duty",
    "outdoor",
    "kitchen",
    "garden",
    "camera",
    "cable",
    "filter",
    "replacement",
    "kit",
    "set",
    "pack",
    "of",
    "for",
    "with",
    "and",
    "the",
    "a",
    "new",
    "classic",
    "premium",
    "adjustable",
    "waterproof",
    "black",
    "white",
    "blue",
    "small",
    "large",
    "inch",
    "battery",
    "charger",
    "case",
    "cover",
    "screen",
    "light",
    "lamp",
    "pump",
    "valve",
    "tube",
    "glass",
    "plastic",
    "sensor",
    "meter",
    "tool",
]


def generated(count: int) -> list[str]:
    """Texts of 3 to 120 words, most of them short, as product texts are."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=min(120, 3 + int(chance.expovariate(1 / 35))))) for _ in range(count)]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ". ".join(text for text in map(_flat, value.values()) if text)
    if isinstance(value, list):
        return ", ".join(text for text in map(_flat, value) if text)
    return "" if value is None else str(value)


def read(path: Path) -> list[str]:
    """One text a line (.txt), a JSON value a line (.jsonl), or the entries of one JSON list or object (.json)."""
    if path.suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8"))
        entries: Iterable[Any] = data.values() if isinstance(data, dict) else data
        return [_flat(entry) for entry in entries]
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_flat(json.loads(line)) for line in lines if line.strip()] if path.suffix == ".jsonl" else lines


def main() -> None:
    """Runs both and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="a .jsonl, .json or .txt file; default: generated texts")
    parser.add_argument("--limit", type=int, default=20_000, help="number of texts; shorter files are repeated, varied")
    parser.add_argument("--model", default="minilm", help="minilm, a folder or a hub name")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--token-budget", type=int, help="tokens of one pass; default: the framework's")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each; the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        sys.exit("This benchmark compares with sentence-transformers: run `pip install sentence-transformers` first.")

    torch.set_num_threads(options.threads)
    texts = read(options.texts) if options.texts else generated(options.limit)
    if not texts:
        sys.exit(f"{options.texts} holds no texts.")
    # Repeats are numbered, so that neither side gains by encoding equal texts once.
    texts = [
        text if turn == 0 else f"{turn} {text}" for turn in range(-(-options.limit // len(texts))) for text in texts
    ]
    texts = texts[: options.limit]

    budget = {} if options.token_budget is None else {"token_budget": options.token_budget}
    ours = TextEncoder(options.model, max_tokens=options.max_tokens, **budget)
    theirs = SentenceTransformer(str(ours.folder), device="cpu")
    theirs.max_seq_length = ours.max_tokens

    def run_ours() -> Tensor:
        return torch.nn.functional.normalize(ours.encode(texts, torch.device("cpu"), progress="lightning_rec"), dim=-1)

    def run_theirs() -> Tensor:
        return theirs.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=True)

    ours.encode(texts[:32])
    theirs.encode(texts[:32])
    runs: dict[str, Callable[[], Tensor]] = {"sentence-transformers": run_theirs, "lightning_rec": run_ours}
    seconds: dict[str, float] = {}
    vectors: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            vectors[name] = run()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)

    lengths = ours.tokenise(texts).lengths.float()
    print(
        f"{len(texts)} texts of {lengths.mean():.0f} tokens on average, at most {ours.max_tokens}; "
        f"{options.threads} threads"
    )
    print(f"| {'':21} | {'seconds':>8} | {'texts/s':>8} |\n| {'-' * 21} | -------: | -------: |")
    for name, spent in seconds.items():
        print(f"| {name:21} | {spent:8.1f} | {len(texts) / spent:8.1f} |")
    difference = (vectors["lightning_rec"] - vectors["sentence-transformers"]).abs().max().item()
    print(
        f"ratio {seconds['sentence-transformers'] / seconds['lightning_rec']:.2f}, largest difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
