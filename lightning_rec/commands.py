"""What is done with a fitted run: ``lightning-rec export | recommend | explain | serve``.

They stand beside LightningCLI's commands, and read no config: an artefact knows all that they need.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import yaml

from lightning_rec.cli_errors import CommandParser
from lightning_rec.recommend.sentences import Sentences
from lightning_rec.recommend.types import Answer, Explanation, IndexName, Request, VectorType, Words
from lightning_rec.serve.settings import Settings

#: Words at the beginning that may stand without the name of their option.
_UNNAMED = {"export": ("ckpt_path", "output")}
#: Options of recommend and explain that are lists of raw ids.
_IDS = ("--history", "--candidates", "--exclude", "--history+", "--candidates+", "--exclude+")


def export(
    ckpt_path: str,
    output: str,
    vectors: VectorType = "float32",
    users: bool = True,
    merge: bool = False,
    keep_layers: int | None = None,
    quantise: bool = False,
    onnx: bool = False,
    max_age: float | None = None,
    progress: bool = True,
    root_dir: str | None = None,
) -> None:
    """Writes a fitted run as an artefact: a folder that answers without the data and the run.

    Of a pretraining run it writes the language model, as the end of its fit does; the options do not matter then.

    Args:
        ckpt_path: a checkpoint of ``lightning-rec fit``: a file, or ``best`` or ``last`` of the newest run below
            ``root_dir``. Its data must still be where the run read it.
        output: the new folder, or an artefact to replace as a whole.
        vectors: how item vectors are stored; what float16 and int8 cost in test NDCG@10 is measured and printed.
        users: export the histories of the users, with their raw ids, and the profiles that their texts are made of.
        merge: merge an adapter into the language model, which then loads and answers faster.
        keep_layers: keep so many layers of the item tower's language model; what it saves and costs is printed.
        quantise: store the item tower's language model as int8 and compute with it; likewise.
        onnx: write both towers as ONNX too (needs the extra ``export``).
        max_age: of a run of impressions: answers hold items of at most so many hours. None: all; a run of interactions
            has its own limit, ``data.max_age``.
        progress: show progress bars.
        root_dir: where ``best`` and ``last`` look for runs, the ``trainer.default_root_dir`` of the fit.
    """
    from lightning_rec.recommend.export import export as write
    from lightning_rec.run_files import load_checkpoint, resolve_checkpoint

    checkpoint = resolve_checkpoint(ckpt_path, root_dir)
    if "pretraining" in load_checkpoint(checkpoint):
        from lightning_rec.pretraining.output import export_language_model

        export_language_model(checkpoint, output)
        return
    write(
        checkpoint,
        output,
        vectors=vectors,
        users=users,
        merge=merge,
        keep_layers=keep_layers,
        quantise=quantise,
        onnx=onnx,
        max_age=max_age,
        progress=progress,
    )


def recommend(
    artefact: str,
    request: Request | None = None,
    input: str | None = None,
    users: str | None = None,
    output: str = "-",
    index: IndexName = "exact",
    on_bad_rows: Literal["error", "skip"] = "error",
    progress: bool = True,
    engine: Literal["local", "ray"] = "local",
    workers: int = 1,
    now: int | str | None = None,
) -> None:
    """Answers requests from an artefact: one on the command line, or a file of them.

    Args:
        artefact: a folder that ``lightning-rec export`` wrote.
        request: who asks and what is wanted. With a file, what is wanted by the rows that do not say it.
        input: JSON Lines or Parquet with a request a line, whose fields are called as the options below (``user``,
            ``history``, ``text``, ``k``, ``where`` and so on), or ``-`` for JSON Lines from the standard input. What a
            request does not say is taken from the command line.
        users: a file of users, each of whom is answered: one raw id a line, or Parquet, JSON Lines, CSV or TSV with a
            column ``user_id``, by the ending.
        output: JSON Lines or Parquet, by the ending; ``-`` for the standard output. One answer a request, in order.
        index: ``exact``, or ``hnsw`` or ``ivfpq`` (need the extra ``index``).
        on_bad_rows: a request that cannot be answered ends the command, or gets an answer with an ``error``.
        progress: show a progress bar over a file of requests.
        engine: ``local``, or ``ray``: a file of requests or users is answered by Ray Data, with the same answers in the
            same order (needs the extra ``ray``; the cluster is that of ``RAY_ADDRESS``, else this machine).
        workers: most processes of Ray that answer, each with a recommender of its own.
        now: where answers hold what is alive (``max_age``), or age and clicks add to scores: the moment of the
            requests, in seconds since 1970 or as an ISO date and time. None: the time of the answer.
    """
    asked = request or Request()
    source = input if input is not None else users
    if input is not None and users is not None:
        raise ValueError("--input and --users are two sources of requests: give one of them.")
    if source is None:
        if engine == "ray":
            raise ValueError("--engine ray answers a file: name one of requests with --input, or of --users.")
        _recommend_one(artefact, asked, output, index, now)
        return
    _check_file(asked, source, output, "--input" if users is None else "--users")
    from lightning_rec.recommend import rows

    options = rows.wanted_by(asked)
    if engine == "ray":
        from lightning_rec.recommend.ray_engine import answer_with_ray

        answers = answer_with_ray(artefact, source, options, index, workers, users is not None, now)
    else:
        answers = _answers(artefact, source, options, index, users is not None, now)
    _write_all(answers, source, output, rows.ANSWERS, on_bad_rows, progress)


def explain(
    artefact: str,
    item: str | None = None,
    request: Request | None = None,
    input: str | None = None,
    output: str = "-",
    words: Words = "none",
    format: Literal["text", "json", "html"] = "text",
    sentences: Sentences | None = None,
    on_bad_rows: Literal["error", "skip"] = "error",
    progress: bool = True,
    now: int | str | None = None,
) -> None:
    """Says why an item has its score for someone: which items of the history moved it, and which words.

    Args:
        artefact: a folder that ``lightning-rec export`` wrote.
        item: raw id of the item. Every row of a file of questions names its own.
        request: who asks.
        input: JSON Lines or Parquet with a question a line: ``item``, and who asks (``user``, ``history`` or ``text``),
            or ``-`` for JSON Lines from the standard input.
        output: where the explanation is written, ``-`` for the standard output. Those of a file of questions become
            JSON Lines or Parquet, by the ending: one a question, in order.
        words: weigh the words of the item's text: ``occlusion``, or ``gradients`` (needs the extra ``explain``).
        format: of a single explanation: ``text`` for people, ``json`` for programs, ``html``: a fragment with the words
            shaded.
        sentences: other sentences than the usual ones.
        on_bad_rows: a question that cannot be answered ends the command, or gets a row with an ``error``.
        progress: show a progress bar over a file of questions.
        now: where answers hold what is alive (``max_age``), or age and clicks add to scores: the moment of the
            requests, in seconds since 1970 or as an ISO date and time. None: the time of the answer.
    """
    asked = request or Request()
    if input is not None:
        if item is not None:
            raise ValueError(f"The rows of {input} name the items: leave out {item}.")
        if format == "html":
            raise ValueError("--format html is of a single explanation: leave it out, or leave out --input.")
        _check_file(asked, input, output, "--input")
    elif item is None:
        raise ValueError("Say which item is asked about: lightning-rec explain ARTEFACT ITEM, or a file with --input.")
    from lightning_rec.recommend import rows
    from lightning_rec.recommend.explain import explain as explain_item
    from lightning_rec.recommend.files import batches, open_rows, open_text, read_rows
    from lightning_rec.recommend.lives import moment
    from lightning_rec.recommend.recommender import Recommender

    recommender = Recommender.load(artefact, now=moment(now))
    if input is not None:
        found = (
            row
            for batch in batches(read_rows(input))
            for row in rows.explanation_rows(recommender, batch, words, sentences)
        )
        _write_all(found, input, output, rows.EXPLANATIONS, on_bad_rows, progress)
        return
    assert item is not None
    explanation = explain_item(recommender, asked, item, words, sentences)
    if format == "json":
        with open_rows(output, rows.EXPLANATIONS) as write:
            write(rows.explanation_row(explanation, asked))
        return
    with open_text(output, "w") as file:
        file.write(_shown(explanation, format))


def serve(artefact: str, settings: Settings = Settings()) -> None:  # noqa: B008  # frozen, and shown by --help
    """Serves an artefact over HTTP, with a demo page, until the process is asked to end.

    ``SIGHUP`` lets the artefact that then lies in the folder take over without a lost request.

    Args:
        artefact: a folder that ``lightning-rec export`` wrote.
        settings: how the service listens, whom it lets in, and where its limits are.
    """
    try:
        import fastapi  # noqa: F401  # only to know whether the extra is there
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f'The service needs {error.name}, which is not installed: run `pip install "lightning-rec[serve]"`.'
        ) from error
    from lightning_rec.serve.server import run as run_server

    run_server(artefact, settings)


#: What ``main`` of the command line looks up: name -> function.
COMMANDS: dict[str, Callable[..., None]] = {
    "export": export,
    "recommend": recommend,
    "explain": explain,
    "serve": serve,
}
#: Which fields of a request are options of a command.
_ASKED: dict[str, Sequence[str]] = {
    "recommend": list(Request.__dataclass_fields__),
    "explain": ["user", "history", "times", "text", "half_life"],
}


def make_parser(name: str) -> CommandParser:
    """The options of a command.

    Args:
        name: a key of ``COMMANDS``.
    """
    function = COMMANDS[name]
    parser = CommandParser(prog=f"lightning-rec {name}", description=(function.__doc__ or "").split("\n\n")[0])
    parser.add_function_arguments(
        function, as_positional=name not in _UNNAMED, as_group=False, skip={"request", "item"}
    )
    if name == "explain":
        parser.add_argument(
            "item", nargs="?", type=str, help="raw id of the item; every row of a file of questions names its own"
        )
    if name in _ASKED:
        fields = set(Request.__dataclass_fields__)
        parser.add_class_arguments(Request, skip=fields - set(_ASKED[name]), instantiate=False)
    return parser


def run(name: str, args: Sequence[str]) -> None:
    """Parses the options of a command and runs it.

    Args:
        name: a key of ``COMMANDS``.
        args: what follows it on the command line.
    """
    parser = make_parser(name)
    given = parser.instantiate_classes(parser.parse_args(plain(name, args)))
    options = dict(given)
    if name in _ASKED:
        options["request"] = Request(**{field: options.pop(field) for field in _ASKED[name]})
    import torch

    torch.set_float32_matmul_precision("high")
    try:
        COMMANDS[name](**options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the answers has enough of them, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain(name: str, args: Sequence[str]) -> list[str]:
    """Arguments with the names that may be left out, and with ids as strings: 001 is neither 1 nor 1.0.

    Args:
        name: a key of ``COMMANDS``.
        args: what follows it on the command line.
    """
    named: list[str] = []
    rest = list(args)
    for option in _UNNAMED.get(name, ()):
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{option}", rest.pop(0)]
    for place, arg in enumerate(rest):
        option, equals, value = arg.partition("=")
        if option in _IDS and equals:
            rest[place] = f"{option}={_as_strings(value)}"
        elif place and rest[place - 1] in _IDS:
            rest[place] = _as_strings(arg)
    return [*named, *rest]


def _as_strings(text: str) -> str:
    """A list in YAML with each of its parts as a string; anything else as it is."""
    try:
        found = yaml.load(text, yaml.BaseLoader)  # which makes strings only
    except yaml.YAMLError:
        return text
    return json.dumps(found) if isinstance(found, list) else text


def _recommend_one(artefact: str, request: Request, output: str, index: IndexName, now: int | str | None) -> None:
    from lightning_rec.recommend.ann import make_index
    from lightning_rec.recommend.files import open_rows
    from lightning_rec.recommend.lives import moment
    from lightning_rec.recommend.recommender import Recommender
    from lightning_rec.recommend.rows import ANSWERS, answer_row

    answer = Recommender.load(artefact, make_index(index), now=moment(now)).recommend(request)
    if output == "-" and sys.stdout.isatty():
        _show(answer)
        return
    with open_rows(output, ANSWERS) as write:
        write(answer_row(answer, request))


def _answers(
    artefact: str, source: str, options: dict[str, Any], index: IndexName, users: bool, now: int | str | None
) -> Iterator[dict[str, Any]]:
    """Answers of a file by the local engine."""
    from lightning_rec.recommend.ann import make_index
    from lightning_rec.recommend.files import batches, read_rows, read_users
    from lightning_rec.recommend.lives import moment
    from lightning_rec.recommend.recommender import Recommender
    from lightning_rec.recommend.rows import answer_rows

    recommender = Recommender.load(artefact, make_index(index), now=moment(now))
    for batch in batches(read_users(source) if users else read_rows(source)):
        yield from answer_rows(recommender, batch, options)


def _check_file(asked: Request, source: str, output: str, option: str) -> None:
    """Refuses a file of requests beside a request, and an output over the input."""
    from lightning_rec.recommend.files import check_apart
    from lightning_rec.recommend.rows import WHO

    for name in WHO:
        if getattr(asked, name) is not None:
            raise ValueError(f"With {option} every row says who asks: leave out --{name}, or leave out {option}.")
    check_apart(source, output)


def _show(answer: Answer) -> None:
    """A table for people."""
    told = {"towers": "by the history", "text": "by the words", "popularity": "by popularity"}
    print(f"{len(answer.items)} items, {told[answer.path]}:")
    for rank, item in enumerate(answer.items, start=1):
        print(f"{rank:4d}. {item.text}  [{item.id}]  {item.score:.3f}")


def _shown(explanation: Explanation, format: str) -> str:
    """An explanation for people."""
    if format == "html":
        from lightning_rec.recommend.html import to_html

        return to_html(explanation)
    lines = [explanation.sentence]
    for name, effects in (
        ("History", [(reason.effect, reason.text) for reason in explanation.reasons]),
        ("Words", [(word.effect, word.text) for word in explanation.words]),
    ):
        if effects:
            lines += ["", f"{name}, and what the score of {explanation.score:.3f} would lose without it:"]
            lines += [f"  {effect:+8.3f}  {shown}" for effect, shown in effects]
    return "\n".join([*lines, ""])


def _write_all(
    rows: Iterator[dict[str, Any]], source: str, output: str, schema: Any, on_bad_rows: str, progress: bool
) -> None:
    """Writes rows as they come; one with an error ends the command where bad rows are not skipped."""
    from tqdm.auto import tqdm

    from lightning_rec.recommend.files import open_rows

    with closing(rows), open_rows(output, schema) as write:  # type: ignore[type-var]
        for number, row in enumerate(tqdm(rows, unit="request", disable=not progress or output == "-"), 1):
            if "error" in row and on_bad_rows == "error":
                raise ValueError(
                    f"{source}, request {number}: {row['error']['message']} "
                    "Or set --on_bad_rows skip to answer the others."
                )
            write(row)
