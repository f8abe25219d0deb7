"""Full-ranking evaluation of many users over a large catalogue: memory, time, and the same figures for any chunk size.

    python scripts/benchmark_evaluation.py --users 50000 --items 20000 --dim 128

Vectors, targets and seen items are drawn at random; some items share a vector, so that ties are met. The memory
reported is the growth of the process above what it holds before the evaluation: the vectors are there already.
"""

from __future__ import annotations

import argparse
import threading
import time

import psutil
import torch

from lightning_rec.metrics import BeyondAccuracy, RankingMetrics, RankingResult, ScoreTable, rank_and_top


class PeakMemory:
    """The most resident memory within the block, sampled from a thread, in MiB above what there was at its start."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> float:
        return (self._highest - self._start) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=512, help="users ranked at once")
    parser.add_argument("--seen", type=int, default=20, help="seen items of each user")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 8192, 20_000], help="items scored at once")
    parser.add_argument("--limit", type=float, default=1536.0, help="MiB of growth that fail the run")
    args = parser.parse_args()

    random = torch.Generator().manual_seed(0)
    interest = torch.randn(args.users, args.dim, generator=random)
    items = torch.randn(args.items + 1, args.dim, generator=random)
    items[1 : args.items // 10] = items[args.items // 10 + 1 : 2 * (args.items // 10)]
    targets = torch.randint(1, args.items + 1, (args.users, 1), generator=random)
    seen = torch.randint(1, args.items + 1, (args.users, args.seen), generator=random)
    counts = torch.randint(0, 100, (args.items + 1,), generator=random)
    # A target is near its user's interest, so that the figures are not those of chance.
    interest += 0.3 * items[targets[:, 0]]

    print(f"{args.users} users × {args.items} items × {args.dim}, {torch.get_num_threads()} threads")
    print(f"{'chunk':>8} {'seconds':>8} {'MiB more':>9} {'ndcg@10':>10} {'hr@10':>10} {'novelty@10':>11}")
    runs = []
    for chunk in args.chunks:
        start = time.perf_counter()
        with PeakMemory() as memory:
            ranking, beyond = RankingMetrics(ks=(10,)), BeyondAccuracy(k=10)
            table = ScoreTable(items)
            for first in range(0, args.users, args.batch):
                part = slice(first, first + args.batch)
                found = rank_and_top(interest[part], table, targets[part], seen[part], beyond.k, chunk_size=chunk)
                result = RankingResult(found.ranks, targets[part], found.rows, found.scores, counts)
                ranking.update(result)
                beyond.update(result)
            figures = {name: value.item() for name, value in (ranking.compute() | beyond.compute()).items()}
        runs.append((figures, memory.growth))
        print(
            f"{chunk:>8} {time.perf_counter() - start:>8.1f} {memory.growth:>9.0f} {figures['ndcg@10']:>10.6f} "
            f"{figures['hr@10']:>10.6f} {figures['novelty@10']:>11.6f}",
            flush=True,
        )
    if any(figures != runs[0][0] for figures, _ in runs):
        raise SystemExit("The figures differ between chunk sizes.")
    if max(growth for _, growth in runs) > args.limit:
        raise SystemExit(f"More than {args.limit:.0f} MiB of memory were needed.")
    print("the same figures for every chunk size")


if __name__ == "__main__":
    main()
