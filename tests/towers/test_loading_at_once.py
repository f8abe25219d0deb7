"""Language models that several threads load at once, as a service does whose artefact is exchanged under load."""

import sys
import threading

import pytest
import torch
from transformers import BertForMaskedLM, PreTrainedModel

from lightning_rec.towers.language import TextEncoder


@pytest.fixture
def many_switches():
    """Threads take turns far more often than usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def test_threads_leave_transformers_as_it_was(many_switches, tiny_bert):
    before = PreTrainedModel.tie_weights
    vectors = []

    def load():
        vectors.extend(TextEncoder(tiny_bert).encode(["red shoe"]) for _ in range(8))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(vectors) == 32
    for vector in vectors:
        torch.testing.assert_close(vector, vectors[0])
    assert PreTrainedModel.tie_weights is before
    whole = BertForMaskedLM.from_pretrained(tiny_bert)
    assert not [name for name, parameter in whole.named_parameters() if parameter.device.type == "meta"]
