"""The one entry point: ``lightning-rec fit | validate | test | predict``."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_rec.callbacks import PredictionWriter, ResultWriter, run_folder
from lightning_rec.data import RecDataModule
from lightning_rec.run_files import checkpoint_config, resolve_checkpoint

COMMANDS = ("fit", "validate", "test", "predict")


class RecArgumentParser(LightningArgumentParser):
    """Names the option that was meant when one is misspelt."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Adds a suggestion to the parser's message and ends with exit code 2."""
        super().error(message + _suggestion(message, self._known_keys()), ex)

    def _known_keys(self) -> set[str]:
        return {action.dest for action in self._actions}


class ConfigSaver(SaveConfigCallback):
    """Saves what ran: ``config.yaml`` beside the logs of a fit, ``test_config.yaml`` and so on in a run's folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file once."""
        if self.already_saved:
            return
        command = trainer.state.fn.value if trainer.state.fn else "run"
        # on every rank: the log folder is agreed upon by a broadcast
        if command == "fit":
            folder = Path(trainer.log_dir or trainer.default_root_dir)
        else:
            folder = run_folder(trainer, self.config.get("ckpt_path"))
        if trainer.is_global_zero:
            name = "config.yaml" if command == "fit" else f"{command}_config.yaml"
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(
                self.config, str(folder / name), skip_unset=False, overwrite=True, multifile=False, format="yaml"
            )
        self.already_saved = trainer.strategy.broadcast(True)


class RecCLI(LightningCLI):
    """LightningCLI with checkpoints, early stopping and results set up for ranking."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks that every run has; each of their options can be set."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
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
        if self.subcommand != "fit" and config.trainer.logger is None:
            config.trainer["logger"] = False
        quiet_wandb()


def quiet_wandb() -> None:
    """Makes W&B log offline where there is no key, instead of asking for a login."""
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
    if not has_key:
        os.environ.setdefault("WANDB_MODE", "offline")


def _suggestion(message: str, keys: set[str]) -> str:
    """A sentence naming the option that a misspelt one resembles, or an empty string."""
    unknown = re.findall(r"[Kk]ey \"?'?([\w.@/]+)|--([\w.]+)", message)
    for match in unknown:
        name = next(part for part in match if part)
        if name in keys:
            continue
        near = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
        if near:
            return f"\nDid you mean {near[0]}?"
    return ""


def main(args: Sequence[str] | None = None) -> RecCLI:
    """Runs one command.

    Args:
        args: the command line; None takes that of the process.

    Returns:
        The finished CLI, with its ``trainer``, ``model`` and ``datamodule``.
    """
    # a user's own towers may lie in the working directory
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    torch.set_float32_matmul_precision("high")
    given = list(sys.argv[1:] if args is None else args)
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [sys.argv[0]]  # Lightning warns when both are there
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
            trainer_defaults={"callbacks": [ResultWriter()]},
            args=with_checkpoint_config(given, Path(folder)),
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
