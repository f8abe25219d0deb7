"""Both towers as ONNX, for servers without torch: written, checked against torch, and run by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import AutoTokenizer

from lightning_rec.data.batch import UserBatch
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export_towers import WrittenTowers
from lightning_rec.recommend.fitted import Fitted
from lightning_rec.recommend.lazy_towers import build_item_tower
from lightning_rec.recommend.onnx_check import Checked, Inputs, OnnxError, compare, session
from lightning_rec.recommend.types import RequestError
from lightning_rec.towers import LanguageUserTower, SideItemTower, TextItemTower, UserTower
from lightning_rec.towers.language import pool
from lightning_rec.towers.score import Score
from lightning_rec.towers.tokens import tokenise

ONNX = "onnx"
ITEM_TOWER, USER_TOWER = "item_tower.onnx", "user_tower.onnx"
_OPSET = 18
#: Users or texts, and their length, of the inputs that a file is checked on; the exporter sees the first.
_SHAPES = ((3, 5), (1, 1), (1, 7), (5, 2), (2, 64), (9, 13))
_REAL = 16  # texts and users of the run that it is checked on too
_BYTES_INSIDE = 1_500_000_000  # a file of ONNX ends at 2 GB; larger weights lie beside it


TextTower = TextItemTower | SideItemTower


class _Items(nn.Module):
    """The text of items to vectors that are ready for the product."""

    def __init__(self, tower: TextTower, score: Score) -> None:
        super().__init__()
        self.model = tower.encoder.running_model(torch.device("cpu"))
        self.tower = tower
        self.score = score

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.tower.reads_layers:
            every = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
            pooled = [pool(part, attention_mask, self.tower.encoder.pooling) for part in every.hidden_states]
            return self.score.items(self.tower.from_features(torch.stack(pooled, 1)))
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        vectors = pool(hidden, attention_mask, self.tower.encoder.pooling)
        if self.tower.encoder.normalise:
            vectors = F.normalize(vectors, dim=-1)
        return self.score.items(self.tower.from_features(vectors))


class _Users(nn.Module):
    """The item vectors of histories to the newest interest, ready for the product."""

    def __init__(self, tower: UserTower, score: Score) -> None:
        super().__init__()
        self.tower = tower
        self.score = score

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        b, t, d = history.shape
        places = torch.arange(b * t).view(b, t)
        users = UserBatch(history=places, lengths=lengths, users=torch.zeros_like(lengths))
        interest = self.tower(users, history.reshape(b * t, d))
        if interest.shape[1] != 1:
            last = (lengths - 1).clamp_min(0)[:, None, None].expand(-1, 1, d)
            interest = interest.gather(1, last)
        return self.score.interest(interest)[:, 0]


def write_onnx(fitted: Fitted, folder: Path, towers: WrittenTowers, raw: Tensor) -> tuple[str, dict[str, Any]]:
    """Writes the towers of a run as ONNX into the part ``onnx`` of an unfinished artefact, each checked against torch.

    The check runs on drawn inputs of several shapes, none of which the exporter saw but one, and on texts and histories
    of the run.

    ``item_tower.onnx`` reads ``input_ids`` and ``attention_mask`` ``(b, l)`` and gives ``(b, d)`` vectors of items that
    are known by their text, as the artefact's own ``encode_texts`` does; it is left out where the item tower reads no
    text. ``user_tower.onnx`` reads ``history`` ``(b, t, d)``, the item vectors before they are made ready for the
    product, and ``lengths`` ``(b,)``, and gives ``(b, d)``, the interest after the newest event. All that comes out is
    ready for the product.

    Args:
        fitted: the run.
        folder: holds the written towers.
        towers: what was written.
        raw: ``(n_rows, d)`` item vectors as the user tower reads them.

    Returns:
        The part's name, and what the manifest says of it.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        ValueError: towers that cannot be written as ONNX.
        OnnxError: a file answers otherwise than torch; it is removed.
    """
    _require()
    module = fitted.module
    checks: dict[str, Checked] = {}
    users = _Users(_user_tower(module.user_tower), module.score).eval()
    items = None
    if isinstance(module.item_tower, TextTower):
        items = _Items(_item_tower(fitted, folder, towers), module.score).eval()
    (folder / ONNX).mkdir()
    said: dict[str, Any] = {"kind": ONNX, "lazy": True, "opset": _OPSET}
    if items is not None:
        encoder = items.tower.encoder
        said |= {"max_tokens": encoder.max_tokens, "pad_id": encoder.pad_id}
        size = encoder.tokenizer.vocab_size
        checks[ITEM_TOWER] = _write(
            items,
            folder / ONNX / ITEM_TOWER,
            names=("input_ids", "attention_mask"),
            longest=encoder.max_tokens,
            both=True,
            example=lambda b, t: _tokens(b, t, size),
            real=_texts(items.tower, fitted.data.view.texts),
        )
    checks[USER_TOWER] = _write(
        users,
        folder / ONNX / USER_TOWER,
        names=("history", "lengths"),
        longest=fitted.data.max_history,
        both=False,
        example=lambda b, t: _history(b, t, users.tower.dim),
        real=_histories(fitted, raw),
    )
    said["differences"] = {name: checked.difference for name, checked in checks.items()}
    said["tolerances"] = {name: checked.allowed for name, checked in checks.items()}
    written = ", ".join(
        f"{name} (largest difference from torch {value.difference:.1e})" for name, value in checks.items()
    )
    rank_zero_info(
        f"ONNX: {written}." + ("" if items is not None else f" The item tower {_why_not(module.item_tower)}.")
    )
    return ONNX, said


def _why_not(tower: Any) -> str:
    """Why an item tower has no file."""
    if hasattr(tower, "encode_texts"):
        return f"({type(tower).__name__}) is more than a language model that reads one text: it has no file"
    return "reads no text: it has no file"


def _require() -> None:
    try:
        import onnx  # noqa: F401  # asked for only
        import onnxruntime  # noqa: F401  # asked for only
        import onnxscript  # noqa: F401  # asked for only
    except ImportError as error:
        raise ImportError(
            f'ONNX needs {error.name}, which is not installed: run `pip install "lightning_rec[export]"`.'
        ) from error


def _user_tower(tower: UserTower) -> UserTower:
    if tower.uses_ids or any(isinstance(part, LanguageUserTower) for part in tower.modules()):
        raise ValueError(
            f"{type(tower).__name__} reads more of a user than the history, which its ONNX could not be given: leave "
            "onnx out, or fit a SequenceUserTower or PooledUserTower."
        )
    if getattr(tower, "time_bias", False):
        raise ValueError(
            f"{type(tower).__name__} reads the times of a history (time_bias), which its ONNX could not be given: "
            "leave onnx out, or fit it without time_bias."
        )
    return tower


def _item_tower(fitted: Fitted, folder: Path, towers: WrittenTowers) -> TextTower:
    spec, parts = towers.specs["item_tower"], towers.parts
    if any(part.get("weights") == "int8" for part in parts.values()):
        raise ValueError(
            "The weights of the language model are quantised by torch, in a way that ONNX does not have: choose "
            "quantise or onnx."
        )
    tower = build_item_tower(folder, spec, parts, fitted.data.view)
    if tower.encoder.tune == "adapter":
        raise ValueError("The adapter lies beside its language model: for ONNX merge it (--merge true).")
    return tower


def _tokens(b: int, length: int, size: int) -> Inputs:
    random = torch.Generator().manual_seed(b + length)
    ids = torch.randint(0, size, (b, length), generator=random)
    lengths = torch.randint(1, length + 1, (b,), generator=random)
    lengths[0] = length
    return ids, (torch.arange(length) < lengths[:, None]).long()


def _history(b: int, t: int, dim: int) -> Inputs:
    random = torch.Generator().manual_seed(b + t)
    lengths = torch.randint(0, t + 1, (b,), generator=random)
    lengths[0] = t
    return torch.randn(b, t, dim, generator=random), lengths


def _texts(tower: TextTower, texts: Sequence[str]) -> list[Inputs]:
    """Tokens of texts of the catalogue, and of none: many together, and one alone."""
    chosen = [*texts[1 :: max(1, (len(texts) - 1) // _REAL)][:_REAL], ""]
    table = tower.encoder.tokenise(chosen)
    found = []
    for rows in (torch.arange(len(chosen)), torch.tensor([0])):
        ids, mask = table.padded(rows)
        found.append((ids, torch.ones_like(ids) if mask is None else mask))
    return found


def _histories(fitted: Fitted, raw: Tensor) -> list[Inputs]:
    """What the user tower reads of the first users of the test."""
    if not fitted.n_test:
        return []
    users = next(iter(fitted.data.test_dataloader())).users
    return [(raw[users.history[:_REAL]], users.lengths[:_REAL])]


def _write(
    model: nn.Module,
    path: Path,
    names: tuple[str, str],
    longest: int,
    both: bool,
    example: Callable[[int, int], Inputs],
    real: Sequence[Inputs] = (),
) -> Checked:
    """Writes a model of two inputs, and compares it with torch on drawn inputs of several shapes, and on real ones.

    The exporter of torch.export is tried first; where it fails, or what it wrote is wrong, the older one of
    TorchScript.
    """
    failures = []
    inputs = [example(b, min(t, longest)) for b, t in _SHAPES]
    for exporter in (_by_export, _by_script):
        try:
            with _quiet(), torch.no_grad():
                exporter(model, path, names, longest, both, inputs[0])
            return compare(model, path, names, [*inputs, *real])
        except Exception as error:
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()
            reason = str(error).strip() or type(error).__name__
            failures.append(f"{exporter.__name__.removeprefix('_by_')}: {reason.splitlines()[0][:300]}")
    raise OnnxError(
        f"The {path.stem.replace('_', ' ')} could not be written as {path.name} so that it answers as torch does, by "
        f"either exporter of torch ({'; '.join(failures)}): leave onnx out."
    )


def _by_export(model: nn.Module, path: Path, names: tuple[str, str], longest: int, both: bool, inputs: Inputs) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=max(longest, 2))
    shapes = {names[0]: {0: batch, 1: length}, names[1]: {0: batch, 1: length} if both else {0: batch}}
    torch.onnx.export(
        model,
        inputs,
        str(path),
        dynamo=True,
        input_names=list(names),
        output_names=["vectors"],
        dynamic_shapes=shapes,
        opset_version=_OPSET,
        external_data=_bytes(model) > _BYTES_INSIDE,
        verbose=False,
    )


def _by_script(model: nn.Module, path: Path, names: tuple[str, str], longest: int, both: bool, inputs: Inputs) -> None:
    axes = {0: "batch", 1: "length"}
    torch.onnx.export(
        model,
        inputs,
        str(path),
        dynamo=False,
        input_names=list(names),
        output_names=["vectors"],
        dynamic_axes={names[0]: axes, names[1]: axes if both else {0: "batch"}, "vectors": {0: "batch"}},
        opset_version=_OPSET,
    )


def _bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


@contextlib.contextmanager
def _quiet() -> Any:
    """Both exporters say much that concerns their authors only."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


class OnnxTowers:
    """The towers of an artefact, run by onnxruntime. Every method may be called from several threads.

    Args:
        artefact: one that was exported with ``onnx``.

    Raises:
        ArtefactError: the artefact has no part ``onnx``, or a file of it was altered.
        ImportError: onnxruntime is not installed.

    Example::

        towers = OnnxTowers(Artefact.read("artefact"))
        interest = towers.interests(artefact.raw_vectors[history], lengths)
    """

    def __init__(self, artefact: Artefact) -> None:
        _require()
        self.artefact = artefact
        folder = artefact.part(ONNX)
        self._said = artefact.manifest.parts[ONNX]
        self._users = session(folder / USER_TOWER)
        path = folder / ITEM_TOWER
        self._items = session(path) if path.is_file() else None

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors of items by the tokens of their texts.

        Args:
            input_ids: ``(b, l)`` int64.
            attention_mask: ``(b, l)`` int64, 1 for a token, 0 for padding on the right.

        Returns:
            ``(b, d)`` float32, ready for the product.

        Raises:
            RequestError: the item tower reads no text.
        """
        if self._items is None:
            raise RequestError(
                "The item tower reads no text.", "no_text_tower", "Export a run with a text item tower, with onnx."
            )
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(self._items.run(None, feed)[0])

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.artefact.part("language_model"), trust_remote_code=False)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """``(n, d)`` vectors of items by their texts, ready for the product; by the artefact's own tokenizer."""
        if self._items is not None and not texts:
            return torch.zeros(0, self.artefact.manifest.dim)
        if self._items is None:
            return self.encode(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64))
        table = tokenise(self._tokenizer, texts, self._said["max_tokens"], self._said["pad_id"])
        ids, mask = table.padded(torch.arange(len(texts)))
        return self.encode(ids, torch.ones_like(ids) if mask is None else mask)

    def interests(self, history: Tensor, lengths: Tensor) -> Tensor:
        """The newest interest of users.

        Args:
            history: ``(b, t, d)`` float32 raw item vectors of the histories, oldest first, right-padded with anything.
            lengths: ``(b,)`` int64 number of events.

        Returns:
            ``(b, d)`` float32, ready for the product.
        """
        feed = {"history": history.contiguous().numpy(), "lengths": lengths.numpy()}
        return torch.from_numpy(self._users.run(None, feed)[0])
