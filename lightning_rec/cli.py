"""The one entry point: ``lightning-rec fit | validate | test | predict``."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_rec.callbacks import PredictionWriter, ResultWriter, run_folder
from lightning_rec.callbacks.resumption import PatientStopping, RunCheckpoint
from lightning_rec.cli_errors import RecArgumentParser, end_with
from lightning_rec.data import RecDataModule
from lightning_rec.run_files import checkpoint_config, resolve_checkpoint

COMMANDS = ("fit", "validate", "test", "predict")


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
        """Finds the checkpoint that ``best`` or ``last`` means, and keeps a resumed run in its folder."""
        config: Namespace = self.config[self.subcommand]
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
        quiet_wandb()

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


def quiet_wandb() -> None:
    """Makes W&B log offline where there is no key, instead of asking for a login."""
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
    if not has_key:
        os.environ.setdefault("WANDB_MODE", "offline")


def main(args: Sequence[str] | None = None) -> RecCLI:
    """Runs one command.

    Args:
        args: the command line; None takes that of the process.

    Returns:
        The finished CLI, with its ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: with code 2 after the sentence that says what is wrong with an option, a file or a row.
            ``LIGHTNING_REC_DEBUG=1`` in the environment shows the traceback instead.
    """
    # a user's own towers may lie in the working directory
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    torch.set_float32_matmul_precision("high")
    # what Lightning 2.6 calls of newer jsonargparse and torch is none of the user's business
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # the command line itself stays in sys.argv: the other processes of DDP are started with it
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python.*")
    given = list(sys.argv[1:] if args is None else args)
    try:
        return _run(given)
    except Exception as error:
        end_with(error)
        raise


def _run(args: list[str]) -> RecCLI:
    with tempfile.TemporaryDirectory() as folder:
        return RecCLI(
            LightningModule,
            RecDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=ConfigSaver,
            parser_class=RecArgumentParser,
            parser_kwargs={"prog": "lightning-rec", "description": DESCRIPTION},
            seed_everything_default=0,
            # a small data set has few steps an epoch
            trainer_defaults={"callbacks": [ResultWriter()], "log_every_n_steps": 10},
            args=with_checkpoint_config(args, Path(folder)),
        )


DESCRIPTION = """Trains, tests and applies two-tower recommenders over pretrained language models.
Try: lightning-rec fit --config configs/video/ml100k.yaml"""


def with_checkpoint_config(args: list[str], folder: Path) -> list[str]:
    """Starts from the config of the checkpoint where the command line names no other.

    Args:
        args: the command line.
        folder: for a temporary file.
    """
    if (
        not args
        or args[0] not in COMMANDS
        or any(arg.split("=")[0] in ("-c", "--config", "--print_config") for arg in args)
    ):
        return args
    path = _option(args, "ckpt_path")
    if path is None:
        return args
    checkpoint = resolve_checkpoint(path, _option(args, "trainer.default_root_dir"))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(checkpoint_config(checkpoint), allow_unicode=True), encoding="utf-8")
    return [args[0], "--config", str(config), *args[1:]]


def _option(args: list[str], name: str) -> str | None:
    for number, arg in enumerate(args):
        if arg == f"--{name}" and number + 1 < len(args):
            return args[number + 1]
        if arg.startswith(f"--{name}="):
            return arg.split("=", 1)[1]
    return None


def run() -> None:
    """The console script: one command, whose exit status is 0 unless it raises or the parser refuses."""
    main()


if __name__ == "__main__":
    run()
