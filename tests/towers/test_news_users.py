import pytest
import torch

from lightning_rec.data.batch import CatalogueView, UserBatch
from lightning_rec.towers import (
    CandidateAttentionUserTower,
    IdItemTower,
    LSTURUserTower,
    NRMSUserTower,
    TextItemTower,
)

CATALOGUE = CatalogueView(n_rows=20, n_users=6)


def build(tower, dim=8, std=0.3):
    torch.manual_seed(0)
    items = IdItemTower(dim)
    items.configure(CATALOGUE)
    tower.configure(CATALOGUE, items)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=std)
    if isinstance(tower, LSTURUserTower):
        tower.long.weight.data[[0, 5]] = 0  # the unknown user, and one without training events
    return tower.eval()


def batch(histories, users=None, width=None):
    width = max(map(len, histories)) if width is None else width
    return UserBatch(
        torch.tensor([history + [0] * (width - len(history)) for history in histories], dtype=torch.long),
        torch.tensor([len(history) for history in histories]),
        torch.tensor(users or [0] * len(histories)),
    )


def answer(tower, users, items, candidates=None):
    """(b, c, d) of a candidate-aware tower, (b, d) at the end of the history of another."""
    if isinstance(tower, CandidateAttentionUserTower):
        c = torch.tensor([[3, 9, 1, 0]]) if candidates is None else candidates
        return tower.attend(users, items, items[c.expand(len(users), -1)])
    interest = tower(users, items)
    if interest.shape[1] == 1:
        return interest[:, 0]
    return interest[torch.arange(len(users)), (users.lengths - 1).clamp_min(0)]


TOWERS = {
    "nrms": lambda: NRMSUserTower(heads=2, hidden=6),
    "nrms-residual": lambda: NRMSUserTower(heads=4, hidden=6, residual=True),
    "lstur-ini": lambda: LSTURUserTower("ini"),
    "lstur-con": lambda: LSTURUserTower("con"),
    "din": lambda: CandidateAttentionUserTower("din", hidden=5),
    "dkn": lambda: CandidateAttentionUserTower("dkn", hidden=5),
    "dot": lambda: CandidateAttentionUserTower("dot"),
}


@pytest.fixture(params=list(TOWERS))
def tower(request):
    return build(TOWERS[request.param]())


@pytest.fixture
def items():
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(1))


def test_padding_and_neighbours_never_matter(tower, items):
    short, long = [3, 1], [4, 5, 6, 7, 8]
    alone = answer(tower, batch([short], [2]), items)
    assert alone.any()
    torch.testing.assert_close(answer(tower, batch([short], [2], width=9), items), alone)
    beside = answer(tower, batch([short, long, []], [2, 3, 0]), items)
    torch.testing.assert_close(beside[:1], alone)
    torch.testing.assert_close(beside[1:2], answer(tower, batch([long], [3]), items))
    poisoned = items.clone()
    poisoned[0] = 100
    found = answer(tower, batch([short, long], [2, 3]), poisoned)
    if alone.ndim == 3:
        found, alone = found[:, :3], alone[:, :3]  # the fourth candidate is the padding itself
    torch.testing.assert_close(found[:1], alone)


def test_order_matters_where_the_paper_says_so(tower, items):
    one, other = (answer(tower, batch([history], [2]), items) for history in ([1, 2, 3, 4], [3, 1, 4, 2]))
    assert torch.allclose(one, other, atol=1e-6) != isinstance(tower, LSTURUserTower)


def test_no_history_and_no_id_is_a_zero_vector(tower, items):
    users = batch([[], [1, 2]])
    interest = answer(tower, users, items)
    assert not interest[0].any()
    assert interest[1].any()
    assert tower.knows(users).tolist() == [False, True]
    nobody = batch([[], []])
    assert nobody.history.shape == (2, 0)
    assert not answer(tower, nobody, items).any()
    tower.train()
    answer(tower, users, items.requires_grad_()).sum().backward()
    assert items.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in tower.parameters())


def test_every_parameter_learns(tower, items):
    tower.train()
    tower.id_dropout = 0
    answer(tower, batch([[1, 2, 3], [4, 5], []], [1, 2, 3]), items).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_mixed_precision(tower, items):
    with torch.autocast("cpu", torch.bfloat16):
        assert answer(tower, batch([[1, 2, 3], []], [1, 2]), items).isfinite().all()


@pytest.mark.parametrize("kind", list(TOWERS))
def test_a_reload_without_data(kind, items):
    tower, fresh = build(TOWERS[kind]()), build(TOWERS[kind](), std=0.1)
    fresh.load_state_dict(tower.state_dict())
    users = batch([[1, 2, 3], []], [1, 2])
    assert torch.equal(answer(fresh, users, items), answer(tower, users, items))


def test_nrms_of_one_event_by_hand(items):
    tower = build(NRMSUserTower(heads=2))
    value = tower.mix.qkv(items[4])[16:]
    torch.testing.assert_close(tower(batch([[4]]), items)[0, 0], value)
    torch.testing.assert_close(
        build(NRMSUserTower(heads=2, residual=True))(batch([[4]]), items)[0, 0], value + items[4]
    )
    with pytest.raises(ValueError, match=r"dim \(8\) is not divisible by the user tower's heads \(3\)"):
        build(NRMSUserTower(heads=3))


@pytest.mark.parametrize("mode", ["ini", "con"])
def test_lstur_equals_its_recurrence(mode, items):
    tower = build(LSTURUserTower(mode))
    history, user = [3, 1, 7], 2
    long = tower.long.weight[user]
    cell = torch.nn.GRUCell(8, 8)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in tower.gru.state_dict().items()})
    state = long[None] if mode == "ini" else torch.zeros(1, 8)
    interest = tower(batch([history], [user]), items)
    for step, row in enumerate(history):
        state = cell(items[row][None], state)
        expected = state if mode == "ini" else tower.join(torch.cat([state, long[None]], -1))
        torch.testing.assert_close(interest[:, step], expected)


@pytest.mark.parametrize("mode", ["ini", "con"])
def test_lstur_answers_a_known_user_without_history(mode, items):
    tower = build(LSTURUserTower(mode))
    assert tower.uses_ids
    users = batch([[], [], [], [1]], [2, 0, 5, 0])
    assert tower.knows(users).tolist() == [True, False, False, True]
    interest = tower(users, items)[:, 0]
    long = tower.long.weight[2]
    expected = long if mode == "ini" else tower.join(torch.cat([torch.zeros(8), long]))
    torch.testing.assert_close(interest[0], expected)
    assert not interest[1:3].any()
    torch.testing.assert_close(answer(tower, batch([[], []], [2, 0]), items)[0], expected)


@pytest.mark.parametrize("mode", ["ini", "con"])
def test_lstur_learns_a_long_term_vector_from_a_user_without_history(mode, items):
    tower = LSTURUserTower(mode, id_dropout=0.0)
    tower.configure(CATALOGUE, IdItemTower(8))
    assert not tower.long.weight.any()
    (tower(batch([[], [1]], [3, 0]), items)[:, 0] @ items[4]).sum().backward()
    assert tower.long.weight.grad[3].any()
    assert not tower.long.weight.grad[[0, 1, 2, 4, 5]].any()


def test_lstur_leaves_ids_out_in_training_only(items):
    tower = build(LSTURUserTower("ini", id_dropout=0.5, dropout=0.0))
    users = batch([[1, 2]], [2])
    known, unknown = tower(users, items), tower(batch([[1, 2]], [0]), items)
    tower.train()
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        found = tower(users, items)
        seen.add("known" if torch.allclose(found, known) else "unknown" if torch.allclose(found, unknown) else "?")
    assert seen == {"known", "unknown"}
    with pytest.raises(ValueError, match="between 0 and 1"):
        LSTURUserTower(id_dropout=2)


def test_candidate_attention_equals_the_plain_formula(items):
    history, candidates = [4, 2, 6], [3, 9]
    for kind in ("din", "dkn", "dot"):
        tower = build(CandidateAttentionUserTower(kind, hidden=5))
        found = answer(tower, batch([history]), items, torch.tensor([candidates]))[0]
        for place, candidate in enumerate(candidates):
            c, scores = items[candidate], []
            for event in history:
                e = items[event]
                if kind == "dot":
                    scores.append(e @ tower.between.weight @ c / 8**0.5)
                    continue
                layers = [tower.of_event, tower.of_candidate] + ([tower.of_product] if kind == "din" else [])
                joint = torch.cat([e, c, e * c][: len(layers)])
                first = torch.cat([layer.weight for layer in layers], 1) @ joint + tower.of_event.bias
                scores.append(tower.score(tower.activation(first))[0])
            weights = torch.stack(scores) if kind == "din" else torch.stack(scores).softmax(0)
            torch.testing.assert_close(found[place], weights @ items[history])


def test_a_candidate_does_not_see_the_others(items):
    for kind in ("din", "dkn", "dot"):
        tower = build(CandidateAttentionUserTower(kind))
        users = batch([[4, 2, 6], [1]])
        many = answer(tower, users, items, torch.tensor([[3, 9, 3]]))
        one = answer(tower, users, items, torch.tensor([[9]]))
        torch.testing.assert_close(many[:, 1:2], one)
        torch.testing.assert_close(many[:, 0], many[:, 2])
        assert answer(tower, users, items, torch.zeros(1, 0, dtype=torch.long)).shape == (2, 0, 8)


def test_candidate_attention_refuses_to_rank_a_catalogue(items):
    with pytest.raises(TypeError, match="ImpressionTwoTower"):
        build(CandidateAttentionUserTower())(batch([[1]]), items)
    with pytest.raises(ValueError, match="hidden"):
        CandidateAttentionUserTower(hidden=0)


def test_the_command_line_sees_every_option(tiny_bert):
    from jsonargparse import ArgumentParser

    from lightning_rec.towers import UserTower

    for name, options in {
        "NRMSUserTower": {"heads": 4, "residual": True},
        "LSTURUserTower": {"mode": "con", "id_dropout": 0.1},
        "CandidateAttentionUserTower": {"kind": "dkn"},
    }.items():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(UserTower, "tower")
        given = {"tower": {"class_path": f"lightning_rec.towers.{name}", "init_args": options}}
        tower = parser.instantiate(parser.parse_object(given)).tower
        items = TextItemTower(tiny_bert, dim=8)
        items.configure(CATALOGUE)
        tower.configure(CATALOGUE, items)
        assert tower.dim == 8
