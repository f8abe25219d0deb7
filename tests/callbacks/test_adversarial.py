"""Perturbations against gradients worked out by hand, and that nothing else is changed by them."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_rec import EcommerceDataModule, TwoTower
from lightning_rec.callbacks import AdversarialTraining
from lightning_rec.callbacks.adversarial import word_embeddings
from lightning_rec.data.readers import Files
from lightning_rec.towers import IdItemTower, SequenceUserTower, TextItemTower

SHOP = Path(__file__).parent.parent / "data" / "files" / "shop"


class Recorder(Callback):
    """The gradients that each optimizer step is taken with, and the batches."""

    def __init__(self):
        self.gradients, self.batches, self.logged = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({name: gradient.clone() for name, gradient in named.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(module, callback, folder, callbacks=(), ckpt_path=None, **options):
    seed_everything(0, verbose=False)
    files = Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv"))
    recorder = Recorder()
    chosen = {"max_steps": 1, "accelerator": "cpu", "logger": False, "limit_val_batches": 0} | options
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[*([callback] if callback else []), recorder, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **chosen,
    )
    data = EcommerceDataModule(files, min_rating=0, batch_size=8, candidates="batch")
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    module._trainer = None
    return recorder


def still(item_tower, user_tower=None):
    """A model whose weights stay as they are, without dropout."""
    torch.manual_seed(5)
    module = TwoTower(
        item_tower,
        user_tower or SequenceUserTower(blocks=1, heads=1, dropout=0.0),
        optimizer=lambda groups: torch.optim.SGD([dict(group, lr=0.0) for group in groups], lr=0.0),
    )
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


def by_hand(module, batches, perturbed, steps, step_size, epsilon, learn_from, share=1.0, weight=1.0):
    """Clean gradients plus those of perturbed passes, by an independent implementation.

    Args:
        perturbed: ``(module, batch, deltas | None) -> loss, values``: the loss with deltas added to the values.
        learn_from: numbers of the steps whose gradients count.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    rises = []
    for batch in batches:
        loss, values = perturbed(module, batch, None)
        found = torch.autograd.grad(loss, parameters.values(), allow_unused=True, retain_graph=True)
        for name, g in zip(parameters, found, strict=True):
            total[name] += 0 if g is None else share * g
        gradients = torch.autograd.grad(loss, values, allow_unused=True)
        moved = [torch.zeros_like(value) for value in values]
        for step in range(steps):
            largest = max(g[example].norm() for g in gradients if g is not None for example in range(len(g)))
            for number, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
                if gradient is None:
                    continue
                for example in range(len(value)):
                    size = gradient[example].norm()
                    if size <= 1e-6 * largest:
                        continue
                    unit = value[example].detach().norm()
                    new = moved[number][example] + step_size * unit * gradient[example] / size
                    if new.norm() > epsilon * unit:
                        new = new * (epsilon * unit / new.norm())
                    moved[number][example] = new
            deltas = [delta.detach().clone().requires_grad_() for delta in moved]
            attacked, _ = perturbed(module, batch, deltas)
            if step in learn_from:
                found = torch.autograd.grad(attacked, parameters.values(), allow_unused=True, retain_graph=True)
                for name, g in zip(parameters, found, strict=True):
                    total[name] += 0 if g is None else share * weight / len(learn_from) * g
            rises.append((attacked - loss).item())
            gradients = torch.autograd.grad(attacked, deltas, allow_unused=True)
    return total, rises


def item_vectors(module, batch, deltas):
    """The loss with perturbed item vectors at the user tower."""
    items = module.item_tower(batch.items)
    entering = items + 0 if deltas is None else items + deltas[0]
    interest = module.user_tower(batch.users, entering)
    supervised = batch.targets > 0
    logits = interest[supervised] @ items[1 : batch.n_candidates + 1].T
    owner = supervised.nonzero()[:, 0]
    logits = logits - batch.log_q
    target = batch.targets[supervised] - 1
    rows = batch.items.rows[1 : batch.n_candidates + 1]
    known = (batch.known[owner][:, :, None] == rows).any(1)
    known[torch.arange(len(target)), target] = False
    return F.cross_entropy(logits.masked_fill(known, -torch.inf), target), [entering]


def words(module, batch, deltas):
    """The loss with perturbed word embeddings."""
    (layer,) = [part for name, part in module.named_modules() if name.endswith("word_embeddings")]
    values, place = [], iter(deltas or ())

    def hook(_, inputs, output):
        output = output + (0 if deltas is None else next(place))
        if not output.requires_grad:
            output.requires_grad_()
        values.append(output)
        return output

    handle = layer.register_forward_hook(hook)
    loss, _ = item_vectors(module, batch, None)
    handle.remove()
    return loss, values


def assert_same(found, wanted):
    assert any(value.abs().sum() > 0 for value in wanted.values())
    for name, value in wanted.items():
        one = found.get(name, torch.zeros_like(value))
        torch.testing.assert_close(one, value, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


METHODS = {
    "fgm": ({"method": "fgm", "epsilon": 0.2}, (1, 0.2, 0.2, [0])),
    "pgd": ({"method": "pgd", "epsilon": 0.2, "steps": 3, "step_size": 0.1}, (3, 0.1, 0.2, [2])),
    "free": ({"method": "free", "epsilon": 0.3, "steps": 2}, (2, 0.375, 0.3, [0, 1])),
    "weighted": ({"method": "fgm", "epsilon": 0.1, "weight": 0.5}, (1, 0.1, 0.1, [0], 1.0, 0.5)),
}


@pytest.mark.parametrize("method", METHODS)
def test_item_vectors_by_hand(tmp_path, method):
    options, arguments = METHODS[method]
    module = still(IdItemTower(6, init_std=0.5))
    recorder = fit(module, AdversarialTraining(**options), tmp_path)
    wanted, rises = by_hand(module, recorder.batches, item_vectors, *arguments)
    assert_same(recorder.gradients[0], wanted)
    assert rises[0] > 0, "the direction is up the loss"
    assert recorder.logged[0]["train/adversarial_loss"] > recorder.logged[0]["train/loss"]


LORA = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)


@pytest.mark.parametrize(
    ("tune", "method", "again"),
    [("lora", "fgm", False), ("lora", "free", "passes"), ("full", "pgd", "passes")],
)
def test_word_embeddings_by_hand(tmp_path, tiny_bert, method, tune, again):
    options, arguments = METHODS[method]
    chosen = {"peft": LORA} if tune == "lora" else {"tune": "full"}
    module = still(
        TextItemTower(tiny_bert, dim=8, init_std=None, token_budget=40, gradient_checkpointing=again, **chosen)
    )
    recorder = fit(module, AdversarialTraining(**options), tmp_path, [NoDropout()])
    module.item_tower.encoder._recompute_passes = False  # by hand each pass is run once
    wanted, rises = by_hand(module, recorder.batches, words, *arguments)
    assert_same(recorder.gradients[0], wanted)
    assert rises[0] > 0
    assert len(word_embeddings(module)) == 1


class NoDropout(Callback):
    """Language models come with dropout of their own, in the model that is built for the data."""

    def on_train_start(self, trainer, pl_module):
        for part in pl_module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if hasattr(part, "dropout_prob"):
                part.dropout_prob = 0.0


def test_accumulated_batches(tmp_path):
    module = still(IdItemTower(6, init_std=0.5))
    recorder = fit(module, AdversarialTraining(epsilon=0.2), tmp_path, accumulate_grad_batches=3)
    assert len(recorder.batches) == 3
    wanted, _ = by_hand(module, recorder.batches, item_vectors, 1, 0.2, 0.2, [0], share=1 / 3)
    assert_same(recorder.gradients[0], wanted)


@pytest.mark.parametrize("method", ["fgm", "pgd"])
def test_weights_and_hooks_are_as_before(tmp_path, tiny_bert, method):
    module = still(TextItemTower(tiny_bert, dim=8, tune="full"))
    before = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    fit(module, AdversarialTraining(method), tmp_path, callbacks=[Look()], max_steps=2)
    after = module.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "bit for bit"
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_dropout_and_random_numbers_of_the_clean_pass(tmp_path):
    # the perturbed passes draw what the clean one drew, and the run goes on as if they had not been
    found = []
    for callback in (None, AdversarialTraining(epsilon=1e-7), AdversarialTraining("free", epsilon=1e-7)):
        module = still(IdItemTower(6, init_std=0.5), SequenceUserTower(blocks=1, heads=1, dropout=0.4))
        found.append(fit(module, callback, tmp_path, max_steps=3).gradients)
    for plain, *others in zip(*found, strict=True):
        for other in others:
            for name, value in plain.items():
                torch.testing.assert_close(other[name], 2 * value, rtol=1e-3, atol=1e-5, msg=name)


def test_absolute_lengths_and_named_modules(tmp_path):
    module = still(IdItemTower(6, init_std=0.5))
    callback = AdversarialTraining(epsilon=0.7, relative=False, modules=["item_tower"])
    seen = []
    inner = callback._step
    callback._step = lambda *given: seen.append(inner(*given)) or seen[-1]
    fit(module, callback, tmp_path)
    lengths = seen[0][0].norm(dim=1)
    assert lengths[0] == 0, "padding has no gradient"
    torch.testing.assert_close(lengths[lengths > 0], torch.full_like(lengths[lengths > 0], 0.7))
    with pytest.raises(ValueError, match=r"names 'item_towr', which the model does not have\. Its modules are it"):
        fit(still(IdItemTower(6)), AdversarialTraining(modules=["item_towr"]), tmp_path)


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    def run(ckpt_path=None):
        torch.manual_seed(0)
        module = TwoTower(IdItemTower(8), SequenceUserTower(blocks=1, heads=1, dropout=0.3), lr=0.01)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        fit(module, AdversarialTraining("pgd"), tmp_path, callbacks=[saver], ckpt_path=ckpt_path, max_steps=7)
        return module.state_dict()

    whole, resumed = run(), run(tmp_path / "step=4.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_mixed_precision_and_gradient_checkpointing(tmp_path, tiny_bert):
    tower = TextItemTower(tiny_bert, dim=8, peft=LORA, init_std=None, gradient_checkpointing=True)
    recorder = fit(still(tower), AdversarialTraining("free"), tmp_path, precision="bf16-mixed")
    assert all(torch.isfinite(value).all() for value in recorder.gradients[0].values())
    assert recorder.logged[0]["train/adversarial_loss"] > 0


def test_half_precision_scales_both_losses(tmp_path):
    module = still(IdItemTower(6, init_std=0.5))
    callback = AdversarialTraining(epsilon=0.2)
    inner = callback.on_train_start
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def with_scaler(trainer, pl_module):
        trainer.precision_plugin.scaler = scaler
        inner(trainer, pl_module)

    callback.on_train_start = with_scaler
    recorder = fit(module, callback, tmp_path)
    plain = fit(still(IdItemTower(6, init_std=0.5)), None, tmp_path)
    wanted, _ = by_hand(module, recorder.batches, item_vectors, 1, 0.2, 0.2, [0], weight=1024.0)
    clean = plain.gradients[0]
    found = recorder.gradients[0]
    added, due = ({name: (part[name] - clean[name]) / 1024 for name in clean} for part in (found, wanted))
    assert_same(added, due)


def test_validation_is_not_perturbed(tmp_path):
    module = still(IdItemTower(6, init_std=0.5))
    figures = []
    for callback in (None, AdversarialTraining(epsilon=5.0)):
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            max_epochs=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[callback] if callback else [],
        )
        files = Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv"))
        trainer.fit(module, EcommerceDataModule(files, min_rating=0, batch_size=8))
        figures.append(float(trainer.callback_metrics["val/ndcg@10"]))
    assert figures[0] == figures[1]


def test_encoding_twice_is_refused(tmp_path):
    class Twice(IdItemTower):
        """Looks at its vectors without gradients first."""

        def forward(self, items):
            with torch.no_grad():
                self.look(super().forward(items))
            return self.look(super().forward(items))

        def configure(self, catalogue):
            super().configure(catalogue)
            self.look = nn.Identity()

    with pytest.raises(ValueError, match=r"cannot perturb Identity, which was run without gradients in training"):
        fit(still(Twice(6)), AdversarialTraining(modules=["item_tower.look"]), tmp_path)


def test_nothing_to_perturb_is_refused(tmp_path):
    class Silent(IdItemTower):
        def configure(self, catalogue):
            super().configure(catalogue)
            self.unused = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"nothing to perturb: the training step did not call item_tower\.unused"):
        fit(still(Silent(6)), AdversarialTraining(modules=["item_tower.unused"]), tmp_path)


def test_numbers_out_of_range_are_refused():
    for options in ({"epsilon": 0.0}, {"steps": 0}, {"weight": -1.0}, {"step_size": 0.0}):
        with pytest.raises(ValueError, match=r"needs epsilon, weight and step_size above 0 and at least one step"):
            AdversarialTraining(**options)


class Sharing(Callback):
    """Writes what each device trained on, and the gradients that it steps with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.save(batch, self.folder / f"batch{batch_idx}_{trainer.global_rank}.pt")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
        torch.save(gradients, self.folder / f"gradients_{trainer.global_rank}.pt")


@pytest.mark.parametrize(("method", "accumulate"), [("free", 2), ("pgd", 1)])
def test_two_devices_share_the_gradients(tmp_path, method, accumulate):
    options, arguments = METHODS[method]
    module = still(IdItemTower(6, init_std=0.5))
    module.gather_negatives = False
    fit(
        module,
        AdversarialTraining(**options),
        tmp_path,
        callbacks=[Sharing(tmp_path)],
        devices=2,
        strategy="ddp_fork",
        accumulate_grad_batches=accumulate,
    )
    one, two = (torch.load(tmp_path / f"gradients_{rank}.pt") for rank in (0, 1))
    wanted = {name: torch.zeros_like(value) for name, value in one.items()}
    files = Files(str(SHOP / "interactions.csv"), str(SHOP / "items.csv"))
    data = EcommerceDataModule(files, min_rating=0, candidates="batch")
    data.setup()
    module = still(IdItemTower(6, init_std=0.5))
    seed_everything(0, verbose=False)
    module.build(data.view)
    for number in range(accumulate):
        batches = [torch.load(tmp_path / f"batch{number}_{rank}.pt", weights_only=False) for rank in (0, 1)]
        counts = [int((batch.targets > 0).sum()) for batch in batches]
        for batch, count in zip(batches, counts, strict=True):
            part, _ = by_hand(module, [batch], item_vectors, *arguments, share=count / sum(counts) / accumulate)
            wanted = {name: value + part[name] for name, value in wanted.items()}
    for found in (one, two):
        assert_same(found, wanted)
