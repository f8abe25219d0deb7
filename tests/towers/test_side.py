from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_rec.cli import main
from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import open_run
from lightning_rec.towers import LanguageUserTower, parameter_summary
from lightning_rec.towers.language import TextEncoder
from lightning_rec.towers.side import SideIdItemTower, SideItemTower, SideNetwork

SHOP = Path(__file__).parent.parent / "data" / "files" / "shop"
TEXTS = ["", "red shoe", "the old film of war", "", "red shoe", "new song"]
CATALOGUE = CatalogueView(n_rows=6, texts=TEXTS)
WHOLE = ItemBatch(torch.arange(6), whole=True)


def build(model, cache, **options):
    torch.manual_seed(0)
    tower = SideItemTower(model, dim=8, side_width=4, cache_dir=str(cache), init_std=None, **options)
    tower.configure(CATALOGUE)
    tower.prepare(CATALOGUE)
    return tower.eval()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("features", ["standardise", "whiten", "raw"])
@pytest.mark.parametrize("memory", [0, 10])
def test_cached_recomputed_batch_and_single_agree(tiny_model, tmp_path, dtype, features, memory):
    options = {"cache_dtype": dtype, "features": features, "memory": memory}
    if features == "whiten":
        options["whiten_eps"] = 0.1  # five texts in 16 directions: what hardly varies among them is rounding
    tower = build(tiny_model, tmp_path, **options)
    assert (tower.states is None) == (memory == 0)
    whole = tower(WHOLE)
    assert whole.shape == (6, 8)
    torch.testing.assert_close(tower(ItemBatch(torch.tensor([0, 4, 2]))), whole[[0, 4, 2]], atol=1e-5, rtol=0)
    for row in range(6):
        torch.testing.assert_close(tower(ItemBatch(torch.tensor([row])))[0], whole[row], atol=1e-5, rtol=0)
    torch.testing.assert_close(build(tiny_model, tmp_path, **options)(WHOLE), whole)  # from the disk
    # half precision may round a text's states the other way when it is encoded beside others
    atol = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(tower.encode_texts(TEXTS), whole, atol=atol, rtol=0)
    torch.testing.assert_close(tower.encode_texts(["new song"])[0], whole[5], atol=atol, rtol=0)
    assert (whole[1] - whole[2]).abs().max() > 1e-2


def test_the_language_model_runs_once_over_the_catalogue(tiny_bert, tmp_path, monkeypatch):
    whole = build(tiny_bert, tmp_path)(WHOLE)
    (file,) = (tmp_path / "hidden_states").iterdir()
    assert 6 * 3 * 16 * 2 < file.stat().st_size < 6 * 3 * 16 * 2 + 200  # half precision, three states a text
    monkeypatch.setattr(TextEncoder, "_load", lambda self: pytest.fail("the language model was loaded"))
    tower = build(tiny_bert, tmp_path)
    torch.testing.assert_close(tower(WHOLE), whole)
    tower.train()(WHOLE).sum().backward()


def test_features_of_every_layer_are_standardised(tiny_bert, tmp_path):
    states = build(tiny_bert, tmp_path, cache_dtype="float32").states
    layers = TextEncoder(tiny_bert).encode(TEXTS, layers=True)
    expected = (layers - layers[1:].mean(0)) / layers[1:].std(0, unbiased=False).clamp_min(1e-6)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


def test_features_of_every_layer_are_whitened(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_rec.towers.side._CHUNK", 2)  # the statistics of parts are those of the whole
    tower = build(tiny_bert, tmp_path, cache_dtype="float32", features="whiten", whiten_eps=0.01)
    layers = TextEncoder(tiny_bert).encode(TEXTS, layers=True).numpy().astype(np.float64)
    for layer in range(layers.shape[1]):
        centred = layers[:, layer] - layers[1:, layer].mean(0)
        covariance = np.cov(layers[1:, layer], rowvar=False, bias=True)
        white = tower.states[:, layer].numpy().astype(np.float64)
        # the scalar product of two white vectors is the Mahalanobis product of what they were made of
        ridge = 0.01 * np.trace(covariance) / len(covariance)
        seen = np.linalg.eigh(covariance)[1][:, -4:]  # five texts vary in four directions at most
        shrunk = seen @ np.linalg.inv(seen.T @ covariance @ seen + ridge * np.eye(4)) @ seen.T
        np.testing.assert_allclose(white @ white.T, centred @ shrunk @ centred.T, atol=2e-2)
        assert np.abs(white[1:].mean(0)).max() < 1e-4


def test_whitened_statistics_are_part_of_a_checkpoint(tiny_bert, tmp_path):
    tower = build(tiny_bert, tmp_path, features="whiten", whiten_eps=0.1)
    state = tower.state_dict()
    assert {name.split(".")[0] for name in state} == {"side", "whitening", "measured"}
    other = SideItemTower(tiny_bert, dim=8, side_width=4, cache_dir=str(tmp_path), features="whiten", whiten_eps=0.1)
    other.configure(CatalogueView(n_rows=6))
    other.load_state_dict(state, strict=True)
    other.eval().prepare(CatalogueView(n_rows=3, texts=["", "red shoe", "blue"]))
    expected = tower(ItemBatch(torch.tensor([1])))
    torch.testing.assert_close(other(ItemBatch(torch.tensor([1]))), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("skip", [True, False])
def test_a_gradient_reaches_every_rung(tiny_model, tmp_path, skip):
    tower = build(tiny_model, tmp_path, skip=skip, dropout=0.1).train()
    tower(WHOLE).square().sum().backward()
    assert {name.split(".")[1] for name, _ in tower.named_parameters()} >= {"down", "gates", "blocks", "norm", "out"}
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert tower.side.gates.grad.all()


def test_the_ladder_by_hand():
    torch.manual_seed(0)
    side = SideNetwork(3, 4, 2, 5, 0.0, True, None).eval()
    with torch.no_grad():
        side.gates.copy_(torch.tensor([0.3, -2.0]))
        x = torch.randn(1, 3, 4)
        ladder = x[:, 0] @ side.down[0].weight.T + side.down[0].bias
        for rung, gate in enumerate([1 / (1 + 2.718281828**-0.3), 1 / (1 + 2.718281828**2.0)]):
            own = x[:, rung + 1] @ side.down[rung + 1].weight.T + side.down[rung + 1].bias
            ladder = gate * ladder + (1 - gate) * own
            ladder = ladder + side.blocks[rung](ladder)
        expected = side.out(side.norm(ladder)) + x[:, 2] @ side.skip.weight.T
        torch.testing.assert_close(side(x), expected)


def test_the_share_of_trained_parameters_is_small(minilm):
    tower = SideItemTower(dim=128)
    tower.configure(CatalogueView(n_rows=6))
    trained, total = (parameter_summary(tower)[name] for name in ("trainable", "total"))
    assert trained <= 0.03 * total
    assert total == trained + sum(weight.numel() for weight in tower.encoder.running_model("cpu").parameters())
    assert trained == 7 * 385 * 64 + 6 + 6 * (128 + 65 * 128 + 129 * 64) + 128 + 65 * 128 + 384 * 128


def test_a_checkpoint_holds_the_side_network_and_its_statistics(tiny_bert, tmp_path):
    tower = build(tiny_bert, tmp_path)
    state = tower.state_dict()
    assert {name.split(".")[0] for name in state} == {"side", "feature_mean", "feature_scale", "measured"}
    other = SideItemTower(tiny_bert, dim=8, side_width=4, cache_dir=str(tmp_path))
    other.configure(CatalogueView(n_rows=6))
    other.load_state_dict(state, strict=True)
    # other texts are seen as training saw its own
    other.eval().prepare(CatalogueView(n_rows=3, texts=["", "red shoe", "blue"]))
    expected = tower(ItemBatch(torch.tensor([1])))
    torch.testing.assert_close(other(ItemBatch(torch.tensor([1]))), expected, atol=2e-2, rtol=0)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: value for key, value in state.items() if "gates" not in key})


def test_what_is_missing_is_said(tiny_bert):
    tower = SideItemTower(tiny_bert, dim=8)
    tower.configure(CATALOGUE)
    with pytest.raises(RuntimeError, match="no texts yet"):
        tower(WHOLE)
    with pytest.raises(ValueError, match="6 rows but 1 texts"):
        tower.prepare(CatalogueView(n_rows=6, texts=["red"]))


def test_a_user_tower_may_share_its_language_model(tiny_bert, tmp_path):
    tower = build(tiny_bert, tmp_path)
    users = LanguageUserTower()
    users.configure(CATALOGUE, tower)
    assert users.encoder is tower.encoder


COUNTS = torch.tensor([0, 3, 1, 0, 2, 5])


def build_with_ids(model, cache, **options):
    torch.manual_seed(0)
    catalogue = CatalogueView(n_rows=6, texts=TEXTS, counts=COUNTS)
    options = {"side_width": 4, "cache_dtype": "float32", "cache_dir": str(cache), "init_std": None, **options}
    tower = SideIdItemTower(language_model=model, dim=8, **options)
    tower.configure(catalogue)
    tower.prepare(catalogue)
    return tower


@pytest.mark.parametrize("fusion", ["sum", "concat", "gate"])
def test_ids_beside_a_side_network(tiny_bert, tmp_path, fusion):
    tower = build_with_ids(tiny_bert, tmp_path, fusion=fusion, id_init_std=1.0).eval()
    side, whole = tower.side(tower.states), tower(WHOLE)
    ids = tower.table.weight * (COUNTS > 0)[:, None]
    both = torch.cat([side, ids], 1)
    if fusion == "sum":
        expected = side + ids
    else:
        expected = both @ tower.mix.weight.T + tower.mix.bias
        if fusion == "gate":
            expected = expected.sigmoid() * side + (1 - expected.sigmoid()) * ids
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    for row in range(6):
        torch.testing.assert_close(tower(ItemBatch(torch.tensor([row])))[0], whole[row], atol=1e-5, rtol=1e-5)
    # an item that was never trained on is what its text alone says
    torch.testing.assert_close(tower.encode_texts([""])[0], whole[3], atol=1e-5, rtol=1e-5)
    assert (tower.encode_texts(["red shoe"])[0] - whole[1]).abs().max() > 1e-2


def test_id_dropout_and_alignment_beside_a_side_network(tiny_bert, tmp_path):
    tower = build_with_ids(tiny_bert, tmp_path, id_dropout=0.5, id_init_std=1.0, alignment=0.3).train()
    side = tower.side(tower.states)
    dropped = {bool((tower(WHOLE)[1] - side[1]).abs().max() < 1e-5) for _ in range(60)}
    assert dropped == {True, False}
    loss = tower.auxiliary_loss()
    warm = [1, 2, 4, 5]
    one, other = (torch.nn.functional.normalize(x[warm], dim=1) for x in (side, tower.table.weight))
    logits = one @ other.T / 0.1
    expected = sum(torch.nn.functional.cross_entropy(x, torch.arange(4)) for x in (logits, logits.T)) / 2
    torch.testing.assert_close(loss, 0.3 * expected)
    assert tower.auxiliary_loss() is None


TOWERS = {
    SideItemTower: "lightning_rec.towers.side.SideItemTower, init_args: {",
    SideIdItemTower: "lightning_rec.towers.SideIdItemTower, init_args: {fusion: gate, ",
}


@pytest.mark.parametrize("kind", TOWERS)
def test_from_the_command_line_to_the_artefact(tiny_bert, tmp_path, kind):
    text = (SHOP.parents[2] / "configs" / "text_pooled.yaml").read_text()
    old = "lightning_rec.towers.TextItemTower, init_args: {language_model: TINY_BERT, dim: 16}"
    assert old in text
    new = TOWERS[kind] + "language_model: TINY_BERT, dim: 16, side_width: 4}"
    text = text.replace(old, new).replace("TINY_BERT", tiny_bert).replace("SHOP", str(SHOP))
    (tmp_path / "given.yaml").write_text(text)
    main(["fit", "--config", str(tmp_path / "given.yaml"), "--trainer.default_root_dir", str(tmp_path / "run")])
    checkpoint = next((tmp_path / "run").rglob("last.ckpt"))
    export(checkpoint, tmp_path / "out", progress=False)
    fitted, artefact = open_run(checkpoint), Artefact.read(tmp_path / "out")
    tower = fitted.module.item_tower
    assert type(tower) is kind
    assert tower.side.gates.any(), "the gates were trained and stored"
    with torch.no_grad():
        torch.testing.assert_close(artefact.raw_vectors[1:], fitted.module.encode_catalogue()[1:], atol=1e-5, rtol=0)
    assert artefact.has_text_tower
    texts = [*artefact.texts[1:4], "a new red shoe", ""]
    torch.testing.assert_close(artefact.encode_texts(texts), tower.encode_texts(texts), atol=1e-5, rtol=0)
