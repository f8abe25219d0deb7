"""ONNX of both towers answers as the artefact does."""

import pytest
import torch
from torch import nn

from lightning_rec.data.batch import UserBatch
from lightning_rec.recommend.artefact import Artefact, ArtefactError
from lightning_rec.recommend.export import export
from lightning_rec.recommend.types import RequestError

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")

from lightning_rec.recommend import onnx as onnx_module  # after it is known to be there
from lightning_rec.recommend.onnx import ITEM_TOWER, USER_TOWER, OnnxTowers
from lightning_rec.recommend.onnx_check import TOLERANCE, OnnxError, compare

SIDE = "cache_dtype: float32, side_width: 4, features: whiten, whiten_eps: 0.1"
POOLED = "lightning_rec.towers.PooledUserTower, init_args: {pooling: gru}"


def users_of(artefact: Artefact) -> UserBatch:
    history = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8]])
    return UserBatch(history, torch.tensor([3, 1, 0, 4]), torch.zeros(4, dtype=torch.int64))


def check(artefact: Artefact) -> OnnxTowers:
    towers = OnnxTowers(artefact)
    said = artefact.manifest.parts["onnx"]
    assert all(said["differences"][name] <= allowed for name, allowed in said["tolerances"].items())
    assert said["tolerances"][USER_TOWER] == TOLERANCE
    users = users_of(artefact)
    wanted = artefact.interests(users)
    wanted = wanted[torch.arange(4), (users.lengths - 1).clamp_min(0)]
    found = towers.interests(artefact.raw_vectors[users.history], users.lengths)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    padded = artefact.raw_vectors[users.history]
    padded[1, 1:] = 7.0  # what stands at padding is not looked at
    torch.testing.assert_close(towers.interests(padded, users.lengths), wanted, atol=1e-4, rtol=1e-4)
    return towers


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("text_pooled", None, {}),
        ("text_pooled", {"language_model: TINY_BERT": "language_model: TINY_GPT2", "gru": "attention"}, {}),
        ("text_pooled", {"TextItemTower, init_args: {": f"SideIdItemTower, init_args: {{{SIDE}, "}, {}),
        # half a minute each
        pytest.param("lora_batch", None, {"merge": True, "keep_layers": 1}, marks=pytest.mark.slow),
        pytest.param("text_id_gate", None, {}, marks=pytest.mark.slow),
    ],
)
def test_both_towers(name, changes, options, run_of, tmp_path, monkeypatch):
    def never(*arguments):
        raise AssertionError("the older exporter is not needed")

    monkeypatch.setattr(onnx_module, "_by_script", never)
    export(run_of(name, changes), tmp_path / "out", progress=False, onnx=True, **options)
    artefact = Artefact.read(tmp_path / "out")
    towers = check(artefact)
    said = artefact.manifest.parts["onnx"]
    allowed = said["tolerances"][ITEM_TOWER]
    assert TOLERANCE <= allowed <= 1e-2
    texts = [*artefact.texts[1:], "a new red shoe", "shoe", ""]
    wanted = artefact.ready(artefact.encode_texts(texts))
    torch.testing.assert_close(towers.encode_texts(texts), wanted, atol=allowed, rtol=1e-4)
    torch.testing.assert_close(towers.encode_texts(texts[:1]), wanted[:1], atol=allowed, rtol=1e-4)
    assert towers.encode_texts([]).shape == (0, artefact.manifest.dim)
    assert set(said["differences"]) == set(said["tolerances"]) == {ITEM_TOWER, USER_TOWER}
    assert {f"onnx/{ITEM_TOWER}", f"onnx/{USER_TOWER}"} <= set(artefact.manifest.digests)


def test_items_without_text_and_an_altered_file(run_of, tmp_path):
    export(run_of("id_sequence"), tmp_path / "out", progress=False, onnx=True)
    artefact = Artefact.read(tmp_path / "out")
    towers = check(artefact)
    with pytest.raises(RequestError, match="reads no text") as caught:
        towers.encode_texts(["red shoe"])
    assert caught.value.code == "no_text_tower"
    path = tmp_path / "out" / "onnx" / USER_TOWER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"user_tower\.onnx was altered"):
        OnnxTowers(Artefact.read(tmp_path / "out"))


def test_an_artefact_without_onnx(artefact):
    with pytest.raises(ArtefactError, match="has no part 'onnx'"):
        OnnxTowers(artefact)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("language_user", {}, "LanguageUserTower reads more of a user than the history"),
        ("matrix_factorisation", {}, "reads more of a user than the history"),
        ("lora_batch", {}, r"for ONNX merge it \(--merge true\)"),
        ("text_pooled", {"quantise": True}, "choose quantise or onnx"),
    ],
)
def test_what_cannot_be_written_says_so_and_leaves_nothing(name, options, message, run_of, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(run_of(name), tmp_path / "out", progress=False, onnx=True, **options)
    assert not any(tmp_path.iterdir())


class Sum(nn.Module):
    def forward(self, history, lengths):
        return history.sum(1) / lengths[:, None]


def write(model, tmp_path):
    def example(b, t):
        return torch.randn(b, t, 4), torch.full((b,), t)

    path = tmp_path / "sum.onnx"
    return path, lambda: onnx_module._write(model, path, ("history", "lengths"), 8, False, example)


def test_the_older_exporter_where_the_newer_fails(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("not today")

    fail.__name__ = "_by_export"
    monkeypatch.setattr(onnx_module, "_by_export", fail)
    path, run = write(Sum(), tmp_path)
    assert run().difference <= TOLERANCE
    assert path.is_file()


def test_a_wrong_file_is_removed(tmp_path, monkeypatch):
    class Drifting(Sum):
        """Answers otherwise every time: no file can agree with it."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, history, lengths):
            self.calls += 1
            return super().forward(history, lengths) + self.calls

    _, run = write(Drifting(), tmp_path)
    with pytest.raises(OnnxError, match=r"The sum could not .* differs from torch by \d.* leave onnx out"):
        run()
    assert not any(tmp_path.iterdir())


def test_what_rounding_does_is_let_pass_and_no_more(tmp_path):
    """Subtracting what is nearly the same and enlarging the rest: float32 itself knows few digits of the answer."""

    class Enlarged(Sum):
        def forward(self, history, lengths):
            mean = super().forward(history.exp().log(), lengths)
            return (mean - 1) * 5e3

    class Other(Enlarged):
        def forward(self, history, lengths):
            return super().forward(history, lengths) + 0.2

    def example(b, t):
        random = torch.Generator().manual_seed(b + t)
        return 1 + 1e-4 * torch.randn(b, t, 4, generator=random), torch.full((b,), t)

    path, inputs = tmp_path / "sum.onnx", [example(4, 6)]
    with onnx_module._quiet():
        onnx_module._by_script(Enlarged(), path, ("history", "lengths"), 8, False, example(3, 5))
    checked = compare(Enlarged(), path, ("history", "lengths"), inputs)
    assert checked.difference <= checked.allowed <= 1e-2
    with pytest.raises(OnnxError, match=r"it differs from torch by 0\.\d+ \(allowed: \d.*shape \(4, 6, 4\)"):
        compare(Other(), path, ("history", "lengths"), inputs)
