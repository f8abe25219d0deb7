"""A table of examples: what some users touched and what they would be recommended, by title."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_rec.alive import alive_windows
from lightning_rec.data.collate import BatchIndex
from lightning_rec.metrics.ranks import top_k

COLUMNS = ["user", "history", "recommended", "target"]


class ExampleTable(Callback):
    """Logs a table of histories with recommendations by title after each validation, to W&B or TensorBoard.

    The same users are shown each time, so that one can watch their recommendations change. With impressions the
    recommendations are the best of the candidates, and the target is what was clicked.

    Args:
        users: number of validation users, spread evenly over all of them.
        titles: titles shown of the newest history and of the recommendations.
    """

    def __init__(self, users: int = 8, titles: int = 5) -> None:
        self.users = users
        self.titles = titles

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the table, on one device."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
        ranks = hasattr(pl_module, "user_tower")  # pretraining of a language model knows no users
        if trainer.sanity_checking or not trainer.is_global_zero or not loggers or not ranks:
            return
        step = max(0, trainer.global_step - 1)  # where Lightning logs the figures of this validation
        rows = self.rows(trainer.datamodule, pl_module)  # type: ignore[attr-defined]  # set by Lightning
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("examples", columns=COLUMNS, data=rows, step=step)
            else:
                lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(" | ".join(row) for row in rows)]
                logger.experiment.add_text("examples", "\n".join(lines), step)

    def rows(self, data: Any, module: Any) -> list[list[str]]:
        """One row a user: raw id, newest titles, recommended titles, and what the user chose next."""
        dataset = data.evaluation_dataset("validation")
        count = min(self.users, len(dataset))
        if count == 0:
            return []
        chosen = torch.linspace(0, len(dataset) - 1, count).long().numpy()
        batch = dataset[BatchIndex(chosen, (0,))].to(module.device)
        was_training = module.training
        module.eval()
        shown = batch.impressions
        if shown is None:
            interest, items, _ = module.interests(batch)
            bonus = module.history_bonus(batch.users)
            _, found = top_k(interest, items, self.titles, batch.seen, alive=alive_windows(data, batch), bonus=bonus)
            targets = batch.targets
        else:
            scores = module.predict_step(batch, 0)["scores"].masked_fill(~shown.mask, -torch.inf)
            best = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.titles]
            found, targets = shown.candidates.gather(1, best), shown.candidates * (shown.labels == 1)
        module.train(was_training)
        module.forget_catalogue()
        display = data.catalogue.display
        rows = []
        users = batch.users.users.tolist()
        if shown is not None:  # the batch does not say who a user is that training does not know
            users = data.impressions.users[dataset.numbers[chosen]].tolist()
        for number, user in enumerate(users):
            length = int(batch.users.lengths[number])
            history = batch.users.history[number, max(0, length - self.titles) : length].tolist()
            target = targets[number].tolist()
            rows.append(
                [
                    data.user_ids[user],
                    "; ".join(display(row) for row in history),
                    "; ".join(display(row) for row in found[number].tolist() if row),
                    "; ".join(display(row) for row in target if row),
                ]
            )
        return rows
