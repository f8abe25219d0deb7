"""What the command line says when it cannot go on: one sentence with a remedy, and a traceback only for bugs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import linecache
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

PACKAGE = Path(__file__).parent
#: Where the classes lie that a config may name.
ROOMS = (
    "lightning_rec",
    "lightning_rec.towers",
    "lightning_rec.towers.score",
    "lightning_rec.objectives",
    "lightning_rec.metrics",
    "lightning_rec.pretraining",
    "lightning_rec.data.readers",
    "lightning_rec.callbacks",
    "peft",
)
_USER_ERRORS = (ValueError, FileNotFoundError, RuntimeError, FloatingPointError, ImportError)
# lines of jsonargparse that repeat the types and the whole config
_NOISE = re.compile(
    r"^\s*(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value type: .*|"
    r"Given value: .{100,}|Given value: NestedArg.*|- Expected a <class 'NoneType'>.*)\s*$"
)


class CommandParser(ArgumentParser):
    """Says in a few lines what is wrong with an option, and names the one that was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse would take --trainer.max_epoch for --trainer.max_epochs: what is misspelt is named instead
        self.allow_abbrev = False

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Ends with exit code 2, or raises where jsonargparse tries one reading after another."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        hint = suggestion(message, option_names(parser))
        sys.stderr.write(f"error: {readable(message)}\n{hint}See: {parser.prog.replace(' [options]', '')} --help\n")
        self.exit(2)


def readable(message: str) -> str:
    """A message of jsonargparse without the lines that repeat types and whole configs."""
    return "\n".join(line for line in message.splitlines() if not _NOISE.match(line))


def option_names(parser: argparse.ArgumentParser) -> set[str]:
    """Names of a parser's options and those of its subcommands."""
    names = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                names |= option_names(part)
        elif action.option_strings:
            names.add(action.dest)
    return names


def suggestion(message: str, options: Iterable[str]) -> str:
    """Lines that name what was meant by a misspelt option or class, or an empty string.

    Args:
        message: what jsonargparse says.
        options: names of the options that the command has itself.
    """
    found = re.search(r"Option '([^']+)' is not accepted\b(?! before)", message)
    if found and "class_path" in message:
        return _of_class(found[1], _last(r"Problem with given class_path '([^']+)'", message[: found.start()]))
    found = re.search(r"does not accept option '([^']+)'", message) or re.search(
        r"unrecognized arguments: --([^\s=]+)", message
    )
    if found:
        return _near(found[1], options)
    missing = (
        _last(r"Expected a dot import path string: (\S+)", message)
        or (_last(r"class_path '([^']+)'", message) if "has no attribute" in message or "No module" in message else "")
        or _last(r"Import path (\S+) does not correspond", message)
    )
    return _near_class(missing) if missing else ""


def _last(pattern: str, message: str) -> str:
    found = re.findall(pattern, message)
    return str(found[-1]) if found else ""


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    # a key of the model or the data lies below their option
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near and "." in name:
        near = difflib.get_close_matches(name.split(".", 1)[0], [key for key in names if "." not in key], n=1)
    if not near and "." in name:
        near = difflib.get_close_matches(name.rsplit(".", 1)[-1], [key.rsplit(".", 1)[-1] for key in names], n=1)
    return f"Did you mean {near[0]}?\n" if near else ""


def _of_class(name: str, class_path: str) -> str:
    parameters = class_parameters(class_path)
    if not parameters:
        return ""
    near = difflib.get_close_matches(name, parameters, n=1, cutoff=0.5)
    first = f"Did you mean {near[0]}? " if near else ""
    return f"{first}{class_path} takes: {', '.join(parameters)}.\n"


def class_parameters(class_path: str) -> list[str]:
    """Names of a class's constructor arguments, those that it passes on to its base classes included."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    names: dict[str, None] = {}
    for base in inspect.getmro(found):
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names |= dict.fromkeys(parameter.name for parameter in parameters if parameter.kind in named)
        if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(names)


def _near_class(class_path: str) -> str:
    name = class_path.rpartition(".")[2]
    known: dict[str, str] = {}
    for room in ROOMS:
        module = importlib.import_module(room)
        for found in dir(module):  # names that are imported with their first use are listed too
            value = getattr(module, found, None)
            if isinstance(value, type) and not found.startswith("_") and not inspect.isabstract(value):
                known.setdefault(found, f"{room}.{found}")
    lowered = {found.lower(): path for found, path in known.items() if path.startswith("lightning_rec")}
    lowered |= {found.lower(): path for found, path in known.items() if found.lower() not in lowered}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)
    paths = [lowered[found] for found in near]
    return f"Did you mean {' or '.join(paths)}?\n" if paths else ""


def user_error(error: BaseException) -> BaseException | None:
    """The error that this package raised on purpose, with a sentence that says what to do, or None.

    Such an error comes from a ``raise`` statement in this package. Whatever Python or a library raises, and whatever is
    raised by accident in a line of ours, is a bug and keeps its traceback. Where a constructor raised it, jsonargparse
    has wrapped it in an error about types.
    """
    found: BaseException | None = error
    while found is not None and found.__traceback__ is not None:
        trace = found.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        file = Path(trace.tb_frame.f_code.co_filename).resolve()
        if PACKAGE in file.parents:
            line = linecache.getline(str(file), trace.tb_lineno).lstrip()
            on_purpose = isinstance(found, _USER_ERRORS) and not isinstance(found, NotImplementedError)
            return found if on_purpose and line.startswith("raise ") else None
        found = found.__cause__ if "jsonargparse" in file.parts else None
    return None


def end_with(error: BaseException) -> None:
    """Ends the process with the error's sentence and exit code 2 where it is a user's; otherwise returns.

    ``LIGHTNING_REC_DEBUG=1`` keeps every traceback.
    """
    found = user_error(error)
    if found is None or os.environ.get("LIGHTNING_REC_DEBUG", "0") not in ("", "0"):
        return
    sys.stderr.write(f"error: {found}\n")
    raise SystemExit(2) from error
