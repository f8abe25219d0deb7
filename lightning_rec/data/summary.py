"""What was read, dropped and excluded, and how it is measured, in a few lines printed at the start of a run."""

from __future__ import annotations

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.histories import Histories
from lightning_rec.data.readers.base import ReadReport
from lightning_rec.data.split import Split


def describe(
    report: ReadReport, catalogue: Catalogue, histories: Histories, split: Split, protocol: str, missed: int
) -> str:
    """The lines of a run's data.

    Args:
        report: of the reader.
        catalogue: of the run.
        histories: of the run.
        split: of the histories.
        protocol: one sentence on how results are measured.
        missed: test targets that are filtered as seen.
    """
    lines = [
        str(report).rstrip(),
        f"Catalogue: {counted(catalogue.report)}",
        f"Histories: {counted(histories.report)}",
        protocol,
        f"Split: {counted(split.counts)}",
    ]
    if not split.counts["validation_users"]:
        lines.append(
            "Nobody can be validated on, so there is no val/ndcg@10 to choose a checkpoint by: lower min_events or "
            "min_rating, move validation_start, or set trainer.limit_val_batches: 0 and checkpoint.monitor: null."
        )
    if missed:
        lines.append(
            f"{missed:,} test targets were touched before and are filtered: they count as misses. Set repeats: first, "
            "or filter_seen: false, if they should be found."
        )
    return "\n".join(line for line in lines if line)


def counted(counts: dict[str, int]) -> str:
    """Counts that are not 0, as one line."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count) + "."
