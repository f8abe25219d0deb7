"""Adversarial training on embeddings: every training step also learns from a slightly wrong reading of its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rec.checkpoint import random_state, set_random_state

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lightning_rec.data.batch import Batch
    from lightning_rec.tower_module import TowerModule

Method = Literal["fgm", "pgd", "free"]
Phase = Literal["clean", "attack"]

# A gradient below this share of the largest of the batch is rounding, and its direction means nothing.
_NOISE = 1e-6


class AdversarialTraining(Callback):
    """Adds to the gradient of each batch that of the same batch with its embeddings moved against the model.

    Word embeddings are perturbed where a language model is trained, whole or through an adapter: the output of its
    embedding layer, one perturbation a text. Where there is none, the item vectors that enter the user tower are, one
    perturbation an item. Weights are never touched: the perturbation is added to an output, so nothing has to be
    restored. Dropout draws in the perturbed passes what it drew in the clean one.

    - ``fgm``: one step along the gradient, as long as ``epsilon`` (Miyato, Dai and Goodfellow, "Adversarial Training
      Methods for Semi-Supervised Text Classification", ICLR 2017). One more forward and backward pass.
    - ``pgd``: ``steps`` steps inside the ball of radius ``epsilon``, the model learns from the last (Madry et al.,
      "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018). The first step takes the gradient of
      the clean pass, so that there are ``steps`` more passes.
    - ``free``: the same steps, but the model learns from all of them, with the mean of their gradients, which come with
      the passes that move the perturbation anyway (Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019; Zhu
      et al., "FreeLB", ICLR 2020).

    Works with gradient accumulation, mixed precision, gradient checkpointing (layers or passes), DDP and resumed runs;
    not with sharded models (FSDP, DeepSpeed). The mean loss of the perturbed passes of a step is logged as
    ``train/adversarial_loss``.

    Args:
        method: how perturbations are found.
        epsilon: length of a perturbation: as a share of the length of what it is added to, or with ``relative: false``
            as a number. The length of a text's embeddings is that of all its tokens together.
        relative: see ``epsilon``.
        steps: steps of ``pgd`` and ``free``.
        step_size: length of a step, in the unit of ``epsilon``; None: ``epsilon`` for ``fgm``, else
            ``2.5 * epsilon / steps`` as Madry et al. choose it.
        weight: weight of the perturbed batch's loss; that of the clean one is 1.
        modules: names of the modules whose outputs are perturbed instead, such as ``[item_tower]``: modules that return
            a tensor, whose first dimension counts examples.

    Raises:
        ValueError: a number outside its range.

    Example::

        trainer:
          callbacks+:
            - class_path: lightning_rec.callbacks.AdversarialTraining
              init_args: {method: fgm, epsilon: 0.1}
    """

    def __init__(
        self,
        method: Method = "fgm",
        epsilon: float = 0.1,
        relative: bool = True,
        steps: int = 3,
        step_size: float | None = None,
        weight: float = 1.0,
        modules: list[str] | None = None,
    ) -> None:
        if not epsilon > 0 or not weight > 0 or steps < 1 or not (step_size is None or step_size > 0):
            raise ValueError(
                "AdversarialTraining needs epsilon, weight and step_size above 0 and at least one step, but got "
                f"epsilon={epsilon}, weight={weight}, step_size={step_size}, steps={steps}."
            )
        self.method = method
        self.epsilon = epsilon
        self.relative = relative
        self.steps = 1 if method == "fgm" else steps
        self.step_size = step_size or (epsilon if method == "fgm" else 2.5 * epsilon / steps)
        self.weight = weight
        self.modules = modules
        self._handles: list[RemovableHandle] = []
        self._phase: Phase | None = None
        self._batch: Batch | None = None
        self._random: dict[str, Tensor] | None = None
        self._perturbations: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._met = 0
        self._backward = False
        self._places: dict[Any, int] = {}
        self._losses: list[Tensor] = []

    # ------------------------------------------------------------------ hooks on the model

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds what is perturbed.

        Raises:
            ValueError: a name of ``modules`` that the model does not have, or a sharded model.
        """
        if type(trainer.strategy).__name__ in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
            raise ValueError(
                "AdversarialTraining does not work with sharded models: set trainer.strategy to ddp or auto, or leave "
                "the callback out."
            )
        self._remove()
        module = cast("TowerModule", pl_module)
        self._handles.append(module.item_tower.register_forward_pre_hook(self._remember_random(module)))
        if self.modules is not None:
            for name in self.modules:
                try:
                    found = module.get_submodule(name)
                except AttributeError:
                    raise ValueError(
                        f"AdversarialTraining.modules names {name!r}, which the model does not have. Its modules are "
                        f"{', '.join(name for name, _ in module.named_modules() if name.count('.') < 2 and name)}."
                    ) from None
                self._handles.append(found.register_forward_hook(self._on_output))
        elif embeddings := word_embeddings(module):
            self._handles += [embedding.register_forward_hook(self._on_output) for embedding in embeddings]
        else:
            self._handles.append(module.user_tower.register_forward_pre_hook(self._on_input))

    def _remember_random(self, module: TowerModule) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._phase == "clean" and self._random is None:
                self._random = random_state(module.device)

        return hook

    def _on_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._moved(module, output, inputs)

    def _on_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        users, items, *rest = inputs
        return (users, self._moved(module, items, (items,)), *rest)

    def _moved(self, module: nn.Module, values: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """The values with their perturbation: zero in the clean pass, where it only collects the gradient."""
        if self._phase is None or not module.training:
            return values
        if not torch.is_grad_enabled():
            raise ValueError(
                f"AdversarialTraining cannot perturb {type(module).__name__}, which was run without gradients in "
                "training: encode in one pass (no recomputation in chunks), or leave the callback out."
            )
        key = (id(module), *((each.data_ptr(), each.shape) for each in inputs if isinstance(each, Tensor)))
        if self._backward:  # gradient checkpointing runs a part again, with the inputs that it kept
            if self._phase == "clean" or key not in self._places:
                return values + torch.zeros_like(values, requires_grad=True)
            return values + self._perturbations[self._places[key]]
        self._places[key] = self._met
        self._met += 1
        if self._phase == "clean":
            perturbation = torch.zeros_like(values, requires_grad=True)
            self._perturbations.append(perturbation)
            self._lengths.append(_length(values.detach()))
            return values + perturbation
        if self._met > len(self._perturbations) or self._perturbations[self._met - 1].shape != values.shape:
            raise RuntimeError(
                f"{type(module).__name__} met other values in the perturbed pass than in the clean one: "
                "AdversarialTraining needs passes that are alike."
            )
        return values + self._perturbations[self._met - 1]

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """The clean pass begins."""
        self._forget()
        self._phase, self._batch = "clean", batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """What is run from here on is run again."""
        self._backward = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Perturbs the batch and adds the gradient of its loss to the clean one.

        Raises:
            ValueError: when nothing passed through what is to be perturbed.
        """
        if self._phase != "clean" or self._batch is None:
            return
        if not self._perturbations:
            raise ValueError(
                "AdversarialTraining found nothing to perturb: the training step did not call "
                f"{', '.join(self.modules) if self.modules else 'the user tower or the word embeddings'}. Name modules "
                "that it does call in modules."
            )
        state = random_state(pl_module.device)
        self._phase = "attack"
        gradients: list[Tensor | None] = [perturbation.grad for perturbation in self._perturbations]
        moved = [torch.zeros_like(perturbation, dtype=torch.float32) for perturbation in self._perturbations]
        for step in range(1, self.steps + 1):
            moved = self._step(moved, gradients)
            more = step < self.steps
            kinds = [perturbation.dtype for perturbation in self._perturbations]
            self._perturbations = [
                value.to(kind).detach().requires_grad_(more) for value, kind in zip(moved, kinds, strict=True)
            ]
            if self._random is not None:
                set_random_state(self._random, pl_module.device)
            if more and self.method == "pgd":
                # only the perturbation moves: the parameters get no gradient of this pass
                loss = self._loss(trainer, pl_module, wrapped=False)
                gradients = list(torch.autograd.grad(loss, self._perturbations, allow_unused=True))
            else:
                self._loss(trainer, pl_module, wrapped=True).backward()
                gradients = [perturbation.grad for perturbation in self._perturbations]
        set_random_state(state, pl_module.device)
        self._forget()

    def _step(self, moved: list[Tensor], gradients: list[Tensor | None]) -> list[Tensor]:
        """One step along the gradient of each example, back into the ball."""
        found = [None if gradient is None else gradient.detach().float() for gradient in gradients]
        sizes = [None if gradient is None else _length(gradient) for gradient in found]
        # where mixed precision could not hold a gradient there is no direction
        largest = max((float(s.nan_to_num(0.0, 0.0).max()) for s in sizes if s is not None and s.numel()), default=0.0)
        result = []
        for value, gradient, size, length in zip(moved, found, sizes, self._lengths, strict=True):
            if gradient is None or size is None:
                result.append(value)
                continue
            usable = torch.isfinite(size) & (size > _NOISE * largest)
            direction = torch.where(usable, gradient / size.clamp_min(1e-30), 0.0)
            unit = length if self.relative else torch.ones_like(length)
            value = value + self.step_size * unit * direction
            radius = self.epsilon * unit
            result.append(value * (radius / _length(value).clamp_min(1e-30)).clamp(max=1.0))
        return result

    def _loss(self, trainer: Trainer, pl_module: LightningModule, wrapped: bool) -> Tensor:
        """The loss of a perturbed pass, scaled as the clean one was, and weighted.

        ``wrapped``: the pass goes through the wrapper of DDP, which then takes the mean of the gradients of all
        devices, whatever already lies there being the same on each of them.
        """
        module = cast("TowerModule", pl_module)
        strategy = trainer.strategy
        self._met, self._places, self._backward = 0, {}, False
        with strategy.precision_plugin.train_step_context():
            if wrapped and strategy.model is not None and strategy.model is not strategy.lightning_module:
                loss = cast(Tensor, strategy._forward_redirection(strategy.model, module, "loss", self._batch))
            else:
                loss = module.loss(cast("Batch", self._batch))
        if self._met != len(self._perturbations):
            raise RuntimeError(
                f"The perturbed pass met {self._met} embeddings, but the clean one {len(self._perturbations)}: "
                "AdversarialTraining needs passes that are alike."
            )
        self._backward = True
        if wrapped:
            self._losses.append(loss.detach())
        share = 1.0 if self.method == "pgd" else 1.0 / self.steps
        loss = loss * (self.weight * share / trainer.accumulate_grad_batches)
        scaler = getattr(strategy.precision_plugin, "scaler", None)
        return loss if scaler is None else scaler.scale(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs the mean loss of the step's perturbed passes."""
        if self._losses:
            loss = torch.stack(self._losses).mean()
            self._losses.clear()
            pl_module.log("train/adversarial_loss", loss, on_step=True, on_epoch=False, batch_size=1)

    # ------------------------------------------------------------------ the end

    def _forget(self) -> None:
        self._phase = self._batch = self._random = None
        self._perturbations, self._lengths, self._places = [], [], {}
        self._met, self._backward = 0, False

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Nothing of a batch is kept."""
        self._forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the hooks off the model."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hooks off the model."""
        self._remove()


def _length(values: Tensor) -> Tensor:
    """The length of each example, ``(k, 1, ...)`` float32, of ``(k, ...)`` values."""
    flat = values.float().flatten(1) if values.ndim > 1 else values.float()[:, None]
    return torch.linalg.vector_norm(flat, dim=1).view(-1, *[1] * (values.ndim - 1))


def word_embeddings(module: nn.Module) -> list[nn.Module]:
    """The layers of word embeddings of the language models in a module, each once; a frozen, cached one is in none."""
    found: dict[int, nn.Module] = {}
    for part in module.modules():
        getter = getattr(part, "get_input_embeddings", None)
        if callable(getter):
            try:
                embedding = getter()
            except NotImplementedError:  # transformers has the method in layers too
                continue
            if isinstance(embedding, nn.Module):
                found[id(embedding)] = embedding
    return list(found.values())
