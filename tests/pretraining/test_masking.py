"""Which tokens are asked for, and what the model reads in their place."""

from types import SimpleNamespace

import pytest
import torch

from lightning_rec.pretraining.masking import MaskVocabulary, mask_tokens, next_tokens, packed
from lightning_rec.towers.tokens import TokenTable

PAD, CLS, SEP, UNK, MASK = range(5)


class Tokenizer(SimpleNamespace):
    def __len__(self):
        return 105


VOCABULARY = MaskVocabulary.of(Tokenizer(all_special_ids=[0, 1, 2, 3, 4], mask_token_id=MASK), 110)


def batch(count=2000, length=22):
    """Rows of CLS, twenty words, SEP; every second row ends five words sooner."""
    ids = torch.randint(5, 105, (count, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = CLS, SEP
    mask = torch.ones_like(ids)
    ids[1::2, -6], ids[1::2, -5:], mask[1::2, -5:] = SEP, PAD, 0
    return ids, mask


def test_shares_are_those_of_bert():
    ids, mask = batch()
    hidden, asked = mask_tokens(ids, mask, VOCABULARY, generator=torch.Generator().manual_seed(0))
    assert asked[0::2].sum(1).unique().tolist() == [3], "15 % of 20 words"
    assert asked[1::2].sum(1).unique().tolist() == [2], "15 % of 15 words are 2.25"
    assert torch.equal(hidden[~asked], ids[~asked])
    masked = (hidden[asked] == MASK).float().mean()
    same = (hidden[asked] == ids[asked]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert same == pytest.approx(0.1 + 0.1 / 100, abs=0.015), "a word drawn at random may be the same"
    drawn = hidden[asked & (hidden != MASK) & (hidden != ids)]
    assert drawn.min() >= 5, "no special token is written"
    assert drawn.max() <= 104, "nor a row of the table that is no token"
    assert len(drawn.unique()) > 90


def test_special_tokens_and_padding_are_never_asked_for():
    ids, mask = batch()
    ids[:, 3] = UNK
    _, asked = mask_tokens(ids, mask, VOCABULARY, share=0.9)
    assert not asked[ids < 5].any()
    assert asked.any(0).sum() == 19, "all other places are, in some row"


def test_a_short_text_has_one_token_to_find_and_an_empty_one_none():
    ids = torch.tensor([[CLS, 7, SEP], [CLS, UNK, SEP]])
    _, asked = mask_tokens(ids, None, VOCABULARY)
    assert asked.tolist() == [[False, True, False], [False, False, False]]


def test_draws_follow_the_generator():
    ids, mask = batch(20)
    one, two, other = (
        mask_tokens(ids, mask, VOCABULARY, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
    )
    assert all(torch.equal(left, right) for left, right in zip(one, two, strict=True))
    assert not torch.equal(one[1], other[1])


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(ValueError, match=r"objective: masked needs a mask token"):
        MaskVocabulary.of(Tokenizer(all_special_ids=[0], mask_token_id=None), 110)
    with pytest.raises(ValueError, match=r"with a row in the model's table"):
        MaskVocabulary.of(Tokenizer(all_special_ids=[0, 120], mask_token_id=120), 110)
    assert MaskVocabulary.of(Tokenizer(all_special_ids=[0, 120], mask_token_id=0), 110).special.sum() == 1


def test_next_tokens_by_hand():
    ids = torch.tensor([[7, 8, 9, 10], [5, 6, 0, 0], [4, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    asked, targets = next_tokens(ids, mask)
    assert asked.long().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert targets.tolist() == [8, 9, 10, 6]
    asked, targets = next_tokens(ids, None)
    assert asked[:, -1].sum() == 0
    assert targets.tolist() == [8, 9, 10, 6, 0, 0, 0, 0, 0]


def test_packed_texts_lose_no_token():
    table = TokenTable(torch.tensor([11, 12, 13, 21, 31, 32]), torch.tensor([0, 3, 4, 6]), pad_id=0)
    ids, mask = packed(table, torch.tensor([2, 0, 1]), 4, end=9)
    assert ids.tolist() == [[31, 32, 9, 11], [12, 13, 9, 21], [9, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    ids, mask = packed(table, torch.tensor([0, 1]), 2, end=None)
    assert (ids.tolist(), mask) == ([[11, 12], [13, 21]], None)
    ids, mask = packed(table, torch.tensor([0]), 50, end=None)
    assert (ids.tolist(), mask) == ([[11, 12, 13]], None), "one block is no longer than it must be"
