"""``lightning-rec fit | validate | test | predict``: LightningCLI, set up for ranking."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_rec.callbacks import PredictionWriter, ResultWriter, run_folder
from lightning_rec.callbacks.resumption import PatientStopping, RunCheckpoint
from lightning_rec.cli_errors import ROOMS, CommandParser
from lightning_rec.precision import Bf16, has_bf16
from lightning_rec.pretraining.data import PretrainingData
from lightning_rec.pretraining.module import PretrainingModule
from lightning_rec.run_files import resolve_checkpoint
from lightning_rec.tower_module import TowerModule


class RecArgumentParser(CommandParser, LightningArgumentParser):
    """LightningCLI's parser, which says in a few lines what is wrong with an option."""


class ConfigSaver(SaveConfigCallback):
    """Saves what ran: ``config.yaml`` in the folder of a fit, ``test_config.yaml`` and so on in that of its checkpoint.

    W&B and TensorBoard get it too.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file of any command but ``fit``."""
        if trainer.state.fn is not None and trainer.state.fn.value != "fit":
            self._save(trainer, f"{trainer.state.fn.value}_config.yaml")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file of ``fit``, whose folder is known only now that the checkpoint callback is set up."""
        self._save(trainer, "config.yaml")
        if trainer.is_global_zero and trainer.loggers:
            config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger | TensorBoardLogger):
                    logger.log_hyperparams(config)

    def _save(self, trainer: Trainer, name: str) -> None:
        folder = run_folder(trainer, self.config.get("ckpt_path"))  # on every rank, see there
        if self.already_saved:
            return
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(
                self.config, str(folder / name), skip_unset=False, overwrite=True, multifile=False, format="yaml"
            )
        self.already_saved = trainer.strategy.broadcast(True)


class RecCLI(LightningCLI):
    """LightningCLI with checkpoints, early stopping and results set up for ranking."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has; each of their options can be set."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PatientStopping, "early_stopping")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_argument(
            "--bf16",
            type=Bf16,
            default="none",
            help="auto: bf16-mixed where the device has bfloat16 instructions, else 32-true; trainer.precision wins.",
        )
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/ndcg@10",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                # no "/" or "=" from a metric's name may reach a file name
                "checkpoint.filename": "epoch_{epoch:03d}-step_{step}",
                "checkpoint.auto_insert_metric_name": False,
                "early_stopping.monitor": "val/ndcg@10",
                "early_stopping.mode": "max",
                "early_stopping.patience": 10,
                # a run without validation trains to its end
                "early_stopping.strict": False,
            }
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leaves the config as it is: what the command line says wins over a checkpoint (see ``main``)."""

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint that ``best`` or ``last`` means, keeps a resumed run in its folder, sets precision."""
        config: Namespace = self.config[self.subcommand]
        if config.bf16 == "auto":
            if config.trainer.precision is None:
                config.trainer["precision"] = "bf16-mixed" if has_bf16(str(config.trainer.accelerator)) else "32-true"
            else:
                rank_zero_info(f"bf16: auto has no effect beside trainer.precision {config.trainer.precision}.")
            config["bf16"] = "none"  # the saved config shows what ran
        wanted = config.get("ckpt_path")
        if wanted is not None:
            path = resolve_checkpoint(str(wanted), config.trainer.default_root_dir)
            config["ckpt_path"] = str(path)
            if config.checkpoint.dirpath is None and path.parent.name == "checkpoints":
                config.checkpoint["dirpath"] = str(path.parent)
            if self.subcommand == "fit":
                _same_wandb_run(config.trainer.logger, path)
        if self.subcommand != "fit" and config.trainer.logger is None:
            config.trainer["logger"] = False

    def instantiate_classes(self) -> None:
        """Looks whether model and data go together before anything is read."""
        super().instantiate_classes()
        if isinstance(self.datamodule, PretrainingData):
            self.datamodule.check_model(self.model)
        if isinstance(self.model, TowerModule | PretrainingModule):
            self.model.check_data(self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the run's folder absolute, by which a resumed run knows its own checkpoints again."""
        root = self._get(self.config_init, "trainer").default_root_dir
        return super().instantiate_trainer(default_root_dir=os.path.abspath(root or "."), **kwargs)


def _same_wandb_run(logger: Any, checkpoint: Path) -> None:
    """A resumed run goes on in its own W&B run, whose id is the name of its folder."""
    if not isinstance(logger, Namespace) or not str(logger.class_path).endswith("WandbLogger"):
        return
    run = checkpoint.resolve().parent.parent
    if logger.init_args.get("id") is None and run.parent.name == logger.init_args.get("project"):
        logger.init_args["id"] = run.name
        logger["dict_kwargs"] = {"resume": "allow", **dict(logger.get("dict_kwargs") or {})}


def run(args: Sequence[str], description: str) -> RecCLI:
    """Runs one command.

    Args:
        args: the command line.
        description: what ``--help`` says first.

    Returns:
        The finished CLI.
    """
    for room in ROOMS:  # a config may name a class without its module, and --help lists those that are there
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ()):
            getattr(module, name)
    return RecCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=ConfigSaver,
        parser_class=RecArgumentParser,
        parser_kwargs={"prog": "lightning-rec", "description": description},
        seed_everything_default=0,
        # a small data set has few steps an epoch
        trainer_defaults={"callbacks": [ResultWriter()], "log_every_n_steps": 10},
        args=list(args),
    )
