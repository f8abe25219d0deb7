"""What a log of impressions holds and how it is measured, in a few lines printed at the start of a run."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rec.data.catalogue import Catalogue
from lightning_rec.data.collate import Int
from lightning_rec.data.impressions import Impressions, Part, unknown_shares
from lightning_rec.data.summary import counted
from lightning_rec.data.table import ReadReport


@dataclass(frozen=True)
class PartSummary:
    """The denominators of a part.

    Attributes:
        impressions: all.
        unlabelled: those without any label, which are not evaluated.
        one_class: labelled ones without a click or without a non-click, for which no AUC exists.
        candidates: of all impressions.
        clicks: of all impressions.
        empty_histories: impressions of users of whom nothing is known before.
        unknown: share of candidates, clicks and events of histories without a row in the item table.
    """

    impressions: int
    unlabelled: int
    one_class: int
    candidates: int
    clicks: int
    empty_histories: int
    unknown: dict[str, float]

    @classmethod
    def of(cls, log: Impressions, numbers: Int, n_known: int) -> PartSummary:
        """Counts some impressions.

        Args:
            log: with histories.
            numbers: the impressions.
            n_known: catalogue rows that come from the item table, padding included.
        """
        clicks, others = log.counts(1)[numbers], log.counts(0)[numbers]
        labelled = clicks + others > 0
        return cls(
            impressions=len(numbers),
            unlabelled=int((~labelled).sum()),
            one_class=int((labelled & ((clicks == 0) | (others == 0))).sum()),
            candidates=int(log.sizes[numbers].sum()),
            clicks=int(clicks.sum()),
            empty_histories=int((log.history_ends[numbers] == log.history_starts[numbers]).sum()),
            unknown=unknown_shares(log, numbers, n_known),
        )

    def __str__(self) -> str:
        evaluated = self.impressions - self.unlabelled
        if not evaluated:
            text = f"{self.impressions:,} impressions without labels"
        else:
            text = f"{evaluated:,} impressions, {self.one_class:,} of them left out of AUC for lack of one class"
            if self.unlabelled:
                text += f" ({self.unlabelled:,} more have no labels)"
        named = [("candidates", "candidates"), ("clicks", "clicks"), ("history", "events of histories")]
        shares = [f"{self.unknown[key]:.1%} of the {what}" for key, what in named if self.unknown[key]]
        if not shares:
            return text
        return f"{text}, {' and '.join([', '.join(shares[:-1]), shares[-1]]) if shares[1:] else shares[0]} unknown"


def describe_impressions(
    report: ReadReport, catalogue: Catalogue, parts: dict[Part, PartSummary], protocol: str
) -> str:
    """The lines of a run's data.

    Args:
        report: of the reader.
        catalogue: of the run.
        parts: name -> its summary.
        protocol: how results are measured.
    """
    lines = [str(report).rstrip(), f"Catalogue: {counted(catalogue.report)}"]
    for part, summary in parts.items():
        if summary.impressions:
            counts = {
                "impressions": summary.impressions,
                "candidates": summary.candidates,
                "clicks": summary.clicks,
                "impressions_with_an_empty_history": summary.empty_histories,
                "unlabelled_impressions": summary.unlabelled,
            }
            lines.append(f"{part.capitalize()}: {counted(counts)}")
    lines.append(protocol)
    if parts["train"].impressions and not parts["validation"].impressions - parts["validation"].unlabelled:
        lines.append(
            "Nothing can be validated on, so there is no val/auc to choose a checkpoint by: give a validation part, or "
            "set trainer.limit_val_batches: 0 and checkpoint.monitor: null."
        )
    return "\n".join(lines)
