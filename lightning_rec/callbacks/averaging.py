"""Validate, keep and answer with the average of the weights of many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging as LightningWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAveraging(LightningWeightAveraging):
    """Averages the trained weights over the steps: exponentially, or all alike.

    Exponential averages: Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017). All alike:
    Izmailov et al., "Averaging Weights Leads to Wider Optima" (UAI 2018), at the run's own learning rate.

    Lightning's ``WeightAveraging``, for modules that are built when the data is known and whose checkpoints hold only
    what was trained: it averages the trained parameters alone, not the language models' frozen ones, and buffers stay
    those of the run. While training goes on with its own weights, validation is done with the average, and so
    checkpoints, early stopping, test, predict and export go by the average; at the end of a fit the model has it. A
    resumed run goes on with both. Until the average begins, validation takes the weights as they are.

    Not with sharded models (FSDP, DeepSpeed), nor with ``checkpoint.save_weights_only``, for which Lightning asks no
    callback. ``ExampleTable`` shows what the run's own weights answer. Of Lightning's own callbacks,
    ``EMAWeightAveraging`` fails where a text tower has cached its vectors, and ``StochasticWeightAveraging`` copies the
    model before it is built, so that it averages nothing.

    Args:
        decay: how much of the average stays at each update; in the first of them less, ``(1 + n) / (10 + n)`` after
            ``n`` updates. None: the mean of all updates.
        every_n_steps: optimizer steps from one update to the next.
        start_step: the first update comes after so many optimizer steps.

    Raises:
        ValueError: a number outside its range.

    Example::

        trainer:
          callbacks+:
            - class_path: lightning_rec.callbacks.WeightAveraging
              init_args: {decay: 0.999}
    """

    def __init__(self, decay: float | None = 0.999, every_n_steps: int = 1, start_step: int = 0) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"WeightAveraging.decay lies between 0 and 1, or is null for a plain mean; it is {decay}.")
        if every_n_steps < 1 or start_step < 0:
            raise ValueError(
                "WeightAveraging needs every_n_steps of at least 1 and start_step of at least 0, but got "
                f"every_n_steps={every_n_steps}, start_step={start_step}."
            )
        super().__init__(use_buffers=False)
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.start_step = start_step

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """True after the steps that count."""
        if step_idx is None or step_idx + 1 <= self.start_step:
            return False
        return (step_idx - self.start_step) % self.every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the trained parameters, which are built first where they are not yet.

        Raises:
            ValueError: the model is sharded, or a checkpoint would hold weights only, which no average reaches.
        """
        if stage != "fit":
            return
        if type(trainer.strategy).__name__ in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
            raise ValueError(
                "WeightAveraging does not work with sharded models: set trainer.strategy to ddp or auto, or leave the "
                "callback out."
            )
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            raise ValueError(
                "WeightAveraging cannot reach checkpoints of weights only, which would hold those of the last step: "
                "set checkpoint.save_weights_only to false, or leave the callback out."
            )
        pl_module.configure_model()
        self._average_model = _Average(pl_module, self.decay)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings the average to the device of the model."""
        self._average().to(pl_module.device)

    def _average(self) -> _Average:
        assert isinstance(self._average_model, _Average)
        return self._average_model

    @torch.no_grad()
    def _swap_models(self, pl_module: LightningModule) -> None:
        average = self._average()
        if average.begun:
            for mine, current in zip(average.parameters(), average.of(pl_module).parameters(), strict=True):
                kept = mine.clone()
                mine.copy_(current)
                current.copy_(kept)

    @torch.no_grad()
    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        average = self._average()
        if average.begun:
            for mine, current in zip(average.parameters(), average.of(pl_module).parameters(), strict=True):
                current.copy_(mine)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's weights are the average; those that training goes on with stand beside them."""
        if self._average_model is None or not self._average().begun:
            return
        average = self._average()
        state = checkpoint["state_dict"]
        checkpoint["current_model_state"] = {name: state[name] for name in average.names}
        checkpoint["averaging_state"] = {"n_averaged": average.n_averaged}
        checkpoint["state_dict"] = state | average.named()

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A resumed run goes on with its own weights and its average. Other commands have the average, which suffices.

        A checkpoint of a run without averages begins one.
        """
        if self._average_model is None or "averaging_state" not in checkpoint:
            return
        average = self._average()
        average.take(checkpoint["state_dict"], checkpoint["averaging_state"]["n_averaged"])
        state = pl_module.state_dict()
        for name, value in checkpoint["current_model_state"].items():
            state[name].copy_(value)


class _Average(AveragedModel):
    """The average of the trained parameters of a module.

    Attributes:
        names: name of each in the module's state -> its place; a parameter that two names share stands there twice.
    """

    def __init__(self, module: LightningModule, decay: float | None) -> None:
        places: dict[int, int] = {}
        names = {
            name: places.setdefault(id(parameter), len(places))
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
        }
        super().__init__(_trained(module, names), multi_avg_fn=_averaging(decay))
        self.names = names

    @property
    def begun(self) -> bool:
        """True after the first update."""
        return bool(self.n_averaged > 0)

    def of(self, module: nn.Module) -> nn.ParameterList:
        """The module's own parameters, in the order of the averages."""
        return _trained(module, self.names)

    def update_parameters(self, model: nn.Module) -> None:
        """Takes the module's parameters into the average."""
        super().update_parameters(self.of(model))

    def named(self) -> dict[str, Tensor]:
        """The averages by the names of the module's state."""
        values = list(self.parameters())
        return {name: values[place].detach() for name, place in self.names.items()}

    def take(self, state: Mapping[str, Tensor], count: Tensor) -> None:
        """Takes averages, and of how many updates they are."""
        values = list(self.parameters())
        for name, place in self.names.items():
            values[place].copy_(state[name])
        self.n_averaged.copy_(count)


def _trained(module: nn.Module, names: Mapping[str, int]) -> nn.ParameterList:
    found = {place: module.get_parameter(name) for name, place in names.items()}
    return nn.ParameterList(found[place] for place in range(len(found)))


def _averaging(decay: float | None) -> Any:
    def update(averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        number = float(count)
        weight = 1 / (number + 1) if decay is None else 1 - min(decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(averages, current, weight)

    return update
