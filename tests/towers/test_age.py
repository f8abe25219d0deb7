"""Buckets of age: by hand, and what cannot be told."""

import pytest
import torch

from lightning_rec.towers.age import AgeBias, PopularityBias


def test_buckets_by_hand():
    bias = AgeBias(buckets=3, max_hours=7.0)  # log2(1 + hours) is 0 to 3
    hours = torch.tensor([[float("nan"), 0.0, 0.9, 1.1], [2.9, 3.1, 7.0, 1e9]])
    assert bias.bucket(hours).tolist() == [[0, 1, 1, 2], [2, 3, 3, 3]]
    assert bias.bucket(torch.tensor([-5.0])).tolist() == [1], "a clock that is wrong makes an item new"


def test_nothing_is_added_before_training_and_each_bucket_is_learned():
    bias = AgeBias()
    hours = torch.tensor([1.0, float("nan"), 1.0])
    assert bias(hours).tolist() == [0, 0, 0]
    bias(hours).sum().backward()
    assert bias.bias.grad[bias.bucket(hours)].tolist() == [2, 1, 2]
    assert bias.bias.grad.isfinite().all()


@pytest.mark.parametrize(("options", "message"), [({"buckets": 0}, "buckets"), ({"max_hours": 0.0}, "max_hours")])
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        AgeBias(**options)


def test_clicks_fall_into_buckets_of_their_own():
    bias = PopularityBias(buckets=3, max_clicks=7)  # log2(1 + clicks) below 1, 2 and 3
    assert bias.bucket(torch.tensor([0.0, 0.9, 1.0, 2.9, 3.0, 7.0, 1e6, float("nan")])).tolist() == [
        1,
        1,
        2,
        2,
        3,
        3,
        3,
        0,
    ]
    assert not bias(torch.tensor([0.0, 5.0])).any()
    with pytest.raises(ValueError, match="max_clicks"):
        PopularityBias(max_clicks=0.0)
