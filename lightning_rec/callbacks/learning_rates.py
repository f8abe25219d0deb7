"""Learning rates of the parameter groups, once a step."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class LearningRates(Callback):
    """Logs the learning rate of each parameter group beside the loss, as ``lr/towers`` or ``lr/language``.

    Lightning's ``LearningRateMonitor`` logs once a batch, which is several times a step under accumulation.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs the rates that the step is taken with."""
        for number, group in enumerate(optimizer.param_groups):
            name = str(group.get("name", number))
            if group["lr"] is not None and not name.endswith("_no_decay"):
                pl_module.log(f"lr/{name}", float(group["lr"]), on_step=True, on_epoch=False, batch_size=1)
