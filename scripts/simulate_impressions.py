"""Makes an invented log of news impressions with planted interests, in MIND's format.

    python scripts/simulate_impressions.py --output simulated
    lightning-rec fit --config configs/news/mind_small_lora.yaml --data.path simulated

Every user has a weight for every topic, and every article one topic that its words tell. The chance of a click depends
on these weights alone, so that the best possible AUC is known: ``truth.json`` says it for each part. A model that reads
clicks and words must come close to it, and a model that leaks will pass it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

TOPICS = {
    "football": "goal striker penalty league keeper coach derby stadium referee header cup offside",
    "cooking": "recipe oven butter garlic dough simmer spice roast pan flour basil sauce",
    "space": "orbit rocket lunar probe telescope comet launch crater astronaut galaxy capsule solar",
    "finance": "stocks bond interest inflation bank dividend market loan index merger profit currency",
    "travel": "island hotel flight beach passport ferry hiking museum luggage visa village resort",
    "health": "vaccine clinic surgeon diet symptom therapy heart sleep nurse allergy trial muscle",
    "music": "album guitar concert singer drummer chorus vinyl tour melody piano festival encore",
    "gardens": "tulip compost hedge seedling orchard pruning lawn greenhouse bulb rose mulch pond",
}
_SHARED = ["today", "report", "says", "new", "after", "first", "week", "people", "more", "about", "local", "year"]
_PARTS = {"train": 0.7, "dev": 0.15, "test": 0.15}


class World:
    """Users, articles and the chance of a click.

    Args:
        users: number of users.
        articles: number of articles.
        seed: of everything that is drawn.
        strength: how far a user's clicks follow the weights; 0 is chance.
    """

    def __init__(self, users: int, articles: int, seed: int = 0, strength: float = 6.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.names = list(TOPICS)
        self.topics = self.rng.integers(0, len(self.names), articles)
        self.weights = self.rng.dirichlet(np.full(len(self.names), 0.12), users)  # most users love one or two topics
        self.strength = strength
        words = [TOPICS[name].split() for name in self.names]
        self.titles = [self._text(words[topic], 4, 3) for topic in self.topics]
        self.abstracts = [self._text(words[topic], 7, 8) for topic in self.topics]

    def _text(self, words: list[str], own: int, shared: int) -> str:
        chosen = [*self.rng.choice(words, own, replace=False), *self.rng.choice(_SHARED, shared)]
        self.rng.shuffle(chosen)
        return " ".join(chosen).capitalize()

    def chances(self, user: int, articles: np.ndarray) -> np.ndarray:
        """``(c,)`` probability that ``user`` clicks each of ``articles``."""
        logit = self.strength * self.weights[user, self.topics[articles]] - 3.0
        return np.asarray(1 / (1 + np.exp(-logit)))

    def impressions(self, count: int, shown: int, warm_up: int) -> Iterator[dict[str, Any]]:
        """Impressions in the order of time. Each user's history begins with ``warm_up`` clicks."""
        histories = [self._first_clicks(user, warm_up) for user in range(len(self.weights))]
        for number in range(count):
            user = int(self.rng.integers(len(self.weights)))
            candidates = self.rng.choice(len(self.topics), shown, replace=False)
            chances = self.chances(user, candidates)
            clicked = self.rng.random(shown) < chances
            yield {
                "number": number,
                "user": user,
                "history": list(histories[user]),
                "candidates": candidates,
                "clicked": clicked,
                "chances": chances,
            }
            histories[user].extend(candidates[clicked].tolist())

    def _first_clicks(self, user: int, count: int) -> list[int]:
        weights = self.chances(user, np.arange(len(self.topics)))
        return self.rng.choice(len(self.topics), count, p=weights / weights.sum()).tolist()


def auc(scores: np.ndarray, clicked: np.ndarray) -> float | None:
    """The share of (click, non-click) pairs that ``scores`` orders rightly, ties half; None without such pairs."""
    wins = scores[clicked][:, None] - scores[~clicked][None]
    return float(((wins > 0) + 0.5 * (wins == 0)).mean()) if wins.size else None


def write(
    folder: Path,
    users: int = 300,
    articles: int = 400,
    impressions: int = 4000,
    shown: int = 12,
    warm_up: int = 40,
    seed: int = 0,
    strength: float = 6.0,
) -> dict[str, float]:
    """Writes the parts ``train``, ``dev`` and ``test`` (all labelled) below ``folder``.

    Returns:
        The mean AUC of the generating model on each part, over impressions with a click and a non-click.
    """
    world = World(users, articles, seed, strength)
    log = list(world.impressions(impressions, shown, warm_up))
    news = [
        f"N{row}\t{world.names[topic]}\t{world.names[topic]}\t{title}\t{abstract}\t\t[]\t[]\n"
        for row, (topic, title, abstract) in enumerate(
            zip(world.topics, world.titles, world.abstracts, strict=True), start=1
        )
    ]
    begin = datetime(2020, 1, 6, tzinfo=UTC)
    truth: dict[str, float] = {}
    start = 0
    for part, share in _PARTS.items():
        stop = len(log) if part == "test" else start + round(share * len(log))
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "news.tsv").write_text("".join(news), encoding="utf-8")
        lines = []
        for row in log[start:stop]:
            when = begin + timedelta(minutes=row["number"])
            shown_ids = " ".join(
                f"N{item + 1}-{int(hit)}" for item, hit in zip(row["candidates"], row["clicked"], strict=True)
            )
            history = " ".join(f"N{item + 1}" for item in row["history"])
            time = f"{when.month}/{when.day}/{when.year} {when.strftime('%I:%M:%S %p').lstrip('0')}"
            lines.append(f"{row['number'] + 1}\tU{row['user']}\t{time}\t{history}\t{shown_ids}\n")
        (folder / part / "behaviors.tsv").write_text("".join(lines), encoding="utf-8")
        found = [auc(row["chances"], row["clicked"]) for row in log[start:stop]]
        truth[part] = float(np.mean([value for value in found if value is not None]))
        start = stop
    (folder / "truth.json").write_text(json.dumps({"auc": truth}, indent=2) + "\n", encoding="utf-8")
    return truth


def main() -> None:
    """Writes the log and prints the AUC of the generating model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--articles", type=int, default=400)
    parser.add_argument("--impressions", type=int, default=4000)
    parser.add_argument("--shown", type=int, default=12, help="candidates of an impression")
    parser.add_argument("--warm-up", type=int, default=40, help="clicks of each user before the log begins")
    parser.add_argument("--strength", type=float, default=6.0, help="how far clicks follow interests")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    folder = options.pop("output")
    truth = write(folder, **options)
    print(f"Written to {folder}. AUC of the generating model: " + ", ".join(f"{k} {v:.4f}" for k, v in truth.items()))


if __name__ == "__main__":
    main()
