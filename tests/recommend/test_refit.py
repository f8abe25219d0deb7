"""The projection behind a pruned language model: ridge regression as others write it, and vectors that stay near."""

import pytest
import torch

from lightning_rec.data.batch import CatalogueView, ItemBatch
from lightning_rec.recommend import compress as compress_module
from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.export import export
from lightning_rec.recommend.fitted import open_run
from lightning_rec.recommend.refit import Target, refit, ridge, target_of
from lightning_rec.towers import TextItemTower


def test_the_strength_is_that_of_leaving_each_row_out():
    """By brute force: for every strength and row, a fit of the others."""
    torch.manual_seed(0)
    x = torch.randn(12, 4, dtype=torch.float64) * torch.tensor([1, 2, 3, 0.1])
    y = x @ torch.randn(4, 2, dtype=torch.float64) + 2 * torch.randn(12, 2, dtype=torch.float64) + 5
    found = ridge(x, y)
    penalty = len(x) * float((x - x.mean(0)).square().mean()) * torch.logspace(2, -6, 25, dtype=torch.float64)

    def fit(rows: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        one = torch.cat([x[rows], torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        ridged = torch.diag(torch.tensor([strength] * 4 + [0.0], dtype=torch.float64))
        return torch.linalg.solve(one.t() @ one + ridged, one.t() @ y[rows])

    errors = []
    for strength in penalty:
        error = 0.0
        for row in range(12):
            map_ = fit(torch.tensor([other for other in range(12) if other != row]), strength)
            error += float((y[row] - x[row] @ map_[:4] - map_[4]).square().sum())
        errors.append(error)
    best = min(range(25), key=errors.__getitem__)
    assert 0 < best < 24, "a choice that is made"
    assert found.strength == pytest.approx(float(torch.logspace(2, -6, 25, dtype=torch.float64)[best]))
    wanted = fit(torch.arange(12), penalty[best])
    torch.testing.assert_close(found.weight, wanted[:4].t())
    torch.testing.assert_close(found.bias, wanted[4])
    assert found.explained == pytest.approx(1 - errors[best] / float((y - y.mean(0)).square().sum()))


def test_what_is_linear_is_found_and_few_rows_do_no_harm():
    torch.manual_seed(0)
    x, map_ = torch.randn(50, 6), torch.randn(3, 6)
    found = ridge(x, x @ map_.t() + 1)
    torch.testing.assert_close(found.weight.float(), map_, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bias.float(), torch.ones(3), atol=1e-4, rtol=0)
    assert found.explained > 0.999
    for n in (1, 2, 5):  # fewer rows than features
        few = ridge(x[:n], x[:n] @ map_.t())
        assert torch.isfinite(few.weight).all()
        assert torch.isfinite(few.bias).all()
    same = ridge(torch.ones(4, 3), torch.full((4, 2), 7.0))
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(same.weight @ one + same.bias, torch.tensor([7.0, 7.0], dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"projection": "mlp"}, {"projection": "none", "dim": None}])
def test_a_tower_gives_nearly_what_it_gave(options, tiny_bert, tmp_path):
    """Features that were turned and shifted are found again by the new fit, whatever projects them."""
    torch.manual_seed(0)
    texts = [
        "",
        *(f"{colour} {thing}" for colour in ["red", "green", "blue"] for thing in ["shoe", "tea", "book", "hat"]),
    ]
    view = CatalogueView(n_rows=len(texts), n_users=1, texts=[*texts[:-1], texts[1]])
    tower = TextItemTower(**{"language_model": tiny_bert, "dim": 4, "cache_dir": str(tmp_path), **options}).eval()
    tower.configure(view)
    tower.prepare(view)
    target = target_of(tower, view)
    assert len(target.rows) == len(texts) - 2, "one row for each distinct text, none for padding"
    rows = ItemBatch(torch.arange(view.n_rows), whole=True)
    before = tower(rows).detach()
    width = tower.vectors.shape[1]
    tower.vectors = tower.vectors @ torch.linalg.qr(torch.randn(width, width))[0] + 0.5
    arguments = dict(options)
    lost = (tower(rows) - before)[1:].square().sum()
    said = refit(tower, tower.vectors, target, arguments)
    kept = (tower(rows) - before)[1:].square().sum()
    assert kept < 0.1 * lost
    assert said["strength"] > 0
    if options.get("projection") == "none":
        assert arguments == {"projection": "linear", "dim": width}


def test_a_mixture_of_experts_reads_features_that_were_turned(tiny_bert, tmp_path):
    torch.manual_seed(0)
    texts = ["", "red shoe", "green tea", "old film", "blue boot", "dog book", "new city", "river song", "cat"]
    view = CatalogueView(n_rows=len(texts), n_users=1, texts=texts)
    tower = TextItemTower(tiny_bert, dim=4, cache_dir=str(tmp_path), projection="moe", experts=3)
    tower.configure(view)
    tower.eval()
    for parameter in tower.projection.parameters():
        parameter.data.normal_()
    x = torch.randn(400, 16)
    x -= x.mean(0)
    turn = torch.randn(16, 16)
    with torch.no_grad():
        wanted = tower.projection(x)
        said = refit(tower, x @ turn, Target(torch.arange(400), x.double()), {})
        found = tower.projection(x @ turn)
    assert said["explained"] > 0.9999
    assert (found - wanted).square().sum() < 1e-4 * wanted.square().sum()


def test_vectors_of_a_pruned_model_are_nearer_with_a_new_fit(run_of, artefact_of, tmp_path, monkeypatch):
    checkpoint = run_of("text_pooled")
    manifest = export(checkpoint, tmp_path / "pruned", keep_layers=1, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(compress_module, "refit", lambda *arguments: {})
        export(checkpoint, tmp_path / "plain", keep_layers=1, progress=False)
    pruned, plain, whole = map(Artefact.read, (tmp_path / "pruned", tmp_path / "plain", artefact_of("text_pooled")))
    with_fit, without = ((part.raw_vectors - whole.raw_vectors).square().sum() for part in (pruned, plain))
    assert with_fit < 0.5 * without
    texts = whole.texts[1:]
    torch.testing.assert_close(pruned.encode_texts(texts), pruned.raw_vectors[1:], atol=1e-5, rtol=1e-4)
    said = manifest.parts["language_model"]["compression"][0]["refit"]
    assert said["strength"] > 0
    assert said["explained"] <= 1


def test_all_layers_change_nothing(run_of, artefact_of, tmp_path):
    manifest = export(run_of("text_pooled"), tmp_path / "kept", progress=False, keep_layers=2)
    whole, kept = Artefact.read(artefact_of("text_pooled")), Artefact.read(tmp_path / "kept")
    assert torch.equal(whole.raw_vectors, kept.raw_vectors)
    assert torch.equal(whole.encode_texts(["red shoe"]), kept.encode_texts(["red shoe"]))
    assert not {"layers", "compression"} & set(manifest.parts["language_model"])


def test_an_id_vector_takes_up_what_its_text_lost(run_of, tmp_path, monkeypatch):
    def lose(tower, *arguments):
        tower.projection.weight.zero_()
        return {}

    monkeypatch.setattr(compress_module, "refit", lose)
    fitted = open_run(checkpoint := run_of("text_id_gate", {"fusion: gate": "fusion: sum"}))
    export(checkpoint, tmp_path / "pruned", progress=False, keep_layers=1)
    pruned = Artefact.read(tmp_path / "pruned")
    whole = fitted.encode_catalogue()
    torch.testing.assert_close(pruned.raw_vectors, whole, atol=1e-6, rtol=1e-5)
    texts = pruned.encode_texts(pruned.texts)[1:]  # of items that have no row
    assert not torch.allclose(texts, fitted.module.item_tower.encode_texts(pruned.texts)[1:], atol=1e-5)
    torch.testing.assert_close(texts + pruned.item_tower.table.weight[1:], whole[1:], atol=1e-6, rtol=1e-5)
