import pytest
import torch

from lightning_rec.towers.language import TextEncoder

TEXTS = ["red shoe", "", "the old dog of the new city " * 3, "blue", "a big red river song of the small cat", "cat dog"]
RELATIVE = {"t5", "t5-encoder"}
NO_PADDING_TOKEN = {"gpt2", "llama", "qwen3"}


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_alone_beside_longer_ones_and_padded_on_either_side(family, family_folder, pooling):
    encoder = TextEncoder(family_folder(family), pooling=pooling, max_tokens=30)
    together = encoder.encode(TEXTS)
    table = encoder.tokenise(TEXTS)
    ids, mask = table.padded(torch.arange(len(TEXTS)))
    assert mask is not None
    left_ids, left_mask = torch.full_like(ids, encoder.pad_id), torch.zeros_like(mask)
    for row, length in enumerate(table.lengths.tolist()):
        left_ids[row, -length:], left_mask[row, -length:] = ids[row, :length], 1
    with torch.no_grad():
        right, left = encoder(ids, mask), encoder(left_ids, left_mask)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    for other in (together, right, left):
        torch.testing.assert_close(other, alone, atol=1e-5, rtol=0)
    assert (alone[0] - alone[3]).abs().max() > 1e-2, "texts that differ have vectors that differ"


def test_order_of_words_matters(family, family_folder):
    encoder = TextEncoder(family_folder(family))
    one, other = encoder.encode(["red dog of the city", "city dog of the red"])
    assert (one - other).abs().max() > 1e-3


def test_the_limit_is_that_of_the_positions(family, family_folder):
    encoder = TextEncoder(family_folder(family), max_tokens=400)
    # RoBERTa has 50 positions, of which the first two are never a token's
    assert encoder.max_tokens == (400 if family in RELATIVE else 48)
    assert encoder.tokenise(["red " * 500]).lengths.tolist() == [encoder.max_tokens]
    vectors = encoder.encode(["red " * 500, "blue"])
    assert vectors.isfinite().all()
    torch.testing.assert_close(vectors[1:], encoder.encode(["blue"]), atol=1e-5, rtol=0)


def test_a_padding_token_where_there_is_none(family, family_folder):
    encoder = TextEncoder(family_folder(family))
    assert (encoder.tokenizer.pad_token_id is None) == (family in NO_PADDING_TOKEN)
    assert encoder.pad_id == (3 if family in NO_PADDING_TOKEN else encoder.tokenizer.pad_token_id)


def test_every_layer_in_one_pass(family, family_folder):
    encoder = TextEncoder(family_folder(family))
    layers = encoder.encode(TEXTS, layers=True)
    assert layers.shape == (len(TEXTS), encoder.n_states, 16)
    torch.testing.assert_close(layers[:, -1], encoder.encode(TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode(TEXTS[:1], layers=True)[0], layers[0], atol=1e-5, rtol=0)
    assert all((layers[:, n] - layers[:, n + 1]).abs().max() > 1e-3 for n in range(encoder.n_states - 1))


def test_t5s_encoder_alone_has_its_own_weights(family_folder, tmp_path):
    from transformers import AutoTokenizer, T5EncoderModel, T5Model

    whole = T5Model.from_pretrained(family_folder("t5"))
    half = T5EncoderModel(whole.encoder.config)
    half.encoder.load_state_dict(whole.encoder.state_dict())
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(family_folder("t5")).save_pretrained(tmp_path / "half")
    torch.testing.assert_close(
        TextEncoder(str(tmp_path / "half")).encode(TEXTS), TextEncoder(family_folder("t5")).encode(TEXTS)
    )
