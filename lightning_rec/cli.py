"""The one entry point: ``fit | validate | test | predict``, and ``export | recommend | explain | serve``."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lightning_rec.cli_errors import end_with

if TYPE_CHECKING:  # Lightning takes seconds to import, and commands over an artefact do without it
    from lightning_rec.training_cli import RecCLI

COMMANDS = ("fit", "validate", "test", "predict")
#: Commands of ``lightning_rec.commands``, which read no config.
ARTEFACT_COMMANDS = ("export", "recommend", "explain", "serve")


def quiet_wandb() -> None:
    """Makes W&B log offline where there is no key, instead of asking for a login."""
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    has_key = bool(os.environ.get("WANDB_API_KEY")) or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
    if not has_key:
        os.environ.setdefault("WANDB_MODE", "offline")


def main(args: Sequence[str] | None = None) -> RecCLI | None:
    """Runs one command.

    Args:
        args: the command line; None takes that of the process.

    Returns:
        The finished CLI, with its ``trainer``, ``model`` and ``datamodule``; None for a command over an artefact.

    Raises:
        SystemExit: with code 2 after the sentence that says what is wrong with an option, a file or a row.
            ``LIGHTNING_REC_DEBUG=1`` in the environment shows the traceback instead.
    """
    # a user's own towers may lie in the working directory
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # what Lightning 2.6 calls of newer jsonargparse and torch is none of the user's business
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # the command line itself stays in sys.argv: the other processes of DDP are started with it
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python.*")
    given = list(sys.argv[1:] if args is None else args)
    try:
        if given and given[0] in ARTEFACT_COMMANDS:
            from lightning_rec.commands import run as run_command

            run_command(given[0], given[1:])
            return None
        return _run(given)
    except Exception as error:
        end_with(error)
        raise


def _run(args: list[str]) -> RecCLI:
    import torch

    from lightning_rec.training_cli import run as run_training

    torch.set_float32_matmul_precision("high")
    quiet_wandb()
    with tempfile.TemporaryDirectory() as folder:
        return run_training(with_checkpoint_config(args, Path(folder)), DESCRIPTION)


DESCRIPTION = """Trains, tests and applies two-tower recommenders over pretrained language models.
Try: lightning-rec fit --config configs/video/ml100k.yaml.
A fitted run goes on with: lightning-rec export (write it as a folder that answers without the data and the run),
recommend (answer requests from that folder), explain (say why an item has its score) and serve (do both over HTTP).
Each has its own --help."""


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
    from lightning_rec.run_files import checkpoint_config, resolve_checkpoint

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
