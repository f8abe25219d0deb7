"""Which words of an item's text moved its score."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rec.recommend.artefact import Artefact
from lightning_rec.recommend.types import RequestError, Word

_WORD = re.compile(r"\S+")
_STEPS = 32
_CHUNK = 16  # texts that are encoded while others wait for the language model
_BREATH = 0.001  # seconds in which those who wait get it


def weigh_words(
    artefact: Artefact, text: str, interest: Tensor, method: Literal["occlusion", "gradients"]
) -> list[Word]:
    """The effect of each word of a text on its score.

    Args:
        artefact: the towers.
        text: what the item tower reads of the item.
        interest: ``(d,)`` interest vector, ready for the product.
        method: ``occlusion``: the score of the text minus that of the text without the word, exact, for each word that
            lies within what the tower reads of the text (its ``max_tokens``), and 0 for those beyond; ``gradients``:
            integrated gradients from a text of padding (Sundararajan, Taly and Yan, ICML 2017), which add up to the
            difference of the two scores.

    Returns:
        Words in their order; those beyond the length limit have no effect. Where items have id vectors too, the score
        is that of the text alone.

    Raises:
        RequestError: the item tower reads no text, or has no language model to take gradients of.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    if not artefact.has_text_tower:
        raise RequestError(
            "The item tower reads no text, so no word has an effect.", "no_text_tower", "Ask without words."
        )
    if not spans:
        return []
    effects = (
        _occlusion(artefact, text, spans, interest)
        if method == "occlusion"
        else gradients(artefact, text, spans, interest)
    )
    return [Word(text[start:end], effect) for (start, end), effect in zip(spans, effects, strict=True)]


def weigh_fields(artefact: Artefact, fields: Mapping[str, Any], interest: Tensor) -> list[Word]:
    """The effect of each word of the text fields of an item whose tower reads fields, such as ``NewsItemTower``.

    Args:
        artefact: the towers.
        fields: of the item.
        interest: ``(d,)`` interest vector, ready for the product.

    Returns:
        Words in their order, a field after the other; the effect of each is the score of the item minus that of the
        item without the word. Categories and entities are no words.
    """
    reading = artefact.field_reading
    assert reading is not None
    values = reading.values(reading.of(fields))
    tower: Any = artefact.item_tower
    texts = set(tower.text_fields or reading.names)
    words, variants = [], [reading.written(values)]
    for at, name in enumerate(reading.names):
        if name not in texts or not isinstance(values[at], str):
            continue
        for match in _WORD.finditer(values[at]):
            rest = f"{values[at][: match.start()]}{values[at][match.end() :].lstrip()}"
            words.append(match.group())
            variants.append(reading.written([*values[:at], rest, *values[at + 1 :]]))
    scores = []
    for place in range(0, len(variants), _CHUNK):
        if place:
            time.sleep(_BREATH)
        scores.append(artefact.ready(artefact.encode_readings(variants[place : place + _CHUNK])) @ interest)
    joined = torch.cat(scores)
    return [Word(word, effect) for word, effect in zip(words, (joined[0] - joined[1:]).tolist(), strict=True)]


def _occlusion(artefact: Artefact, text: str, spans: Sequence[tuple[int, int]], interest: Tensor) -> list[float]:
    read = spans[: _words_read(artefact, text, spans)]
    texts = [text, *(f"{text[:start]}{text[end:].lstrip()}" for start, end in read)]
    scores = []
    for place in range(0, len(texts), _CHUNK):
        if place:
            # a lock that is taken again at once would leave those who wait for it waiting
            time.sleep(_BREATH)
        scores.append(artefact.ready(artefact.encode_texts(texts[place : place + _CHUNK])) @ interest)
    joined = torch.cat(scores)
    return [*(joined[0] - joined[1:]).tolist(), *[0.0] * (len(spans) - len(read))]


def _words_read(artefact: Artefact, text: str, spans: Sequence[tuple[int, int]]) -> int:
    """How many words, from the first, it takes until more of them change nothing of what the tower reads."""
    tower: Any = artefact.item_tower
    # a bias tower has its encoder in the content tower, a news tower in what reads its texts
    towers = (tower, getattr(tower, "content", None))
    holders = (*towers, *(getattr(part, "text", None) for part in towers))
    encoder: Any = next((holder.encoder for holder in holders if hasattr(holder, "encoder")), None)
    if encoder is None:
        return len(spans)

    def tokens(part: str) -> list[int]:
        with artefact.lock:
            found: list[int] = encoder.tokenise([part]).tokens.tolist()
        return found

    whole = tokens(text)
    most = 1
    while most < len(spans) and tokens(text[: spans[most - 1][1]]) != whole:
        most *= 2
    low, high = most // 2, min(most, len(spans))
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if tokens(text[: spans[middle - 1][1]]) == whole else (middle, high)
    return high


def gradients(artefact: Artefact, text: str, spans: Sequence[tuple[int, int]], interest: Tensor) -> list[float]:
    """Integrated gradients over the input embeddings, summed over the tokens of each word."""
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as error:
        raise RequestError(
            "Integrated gradients need captum.",
            "extra_missing",
            'Run `pip install "lightning_rec[explain]"`, or ask for words by occlusion.',
        ) from error
    tower: Any = artefact.item_tower
    if not hasattr(tower, "from_features"):
        raise RequestError(
            f"{type(tower).__name__} has no language model to take gradients of.",
            "no_gradients",
            "Ask for words by occlusion.",
        )
    encoder = tower.encoder
    # captum needs gradients, and callers forbid them
    with torch.inference_mode(False), torch.enable_grad():
        wanted = interest.clone()
        encoded = encoder.tokenizer(
            text, truncation=True, max_length=encoder.max_tokens, return_offsets_mapping=True, return_tensors="pt"
        )
        ids = encoded["input_ids"]
        if not ids.numel():
            return [0.0] * len(spans)
        offsets: list[tuple[int, int]] = [(int(start), int(end)) for start, end in encoded["offset_mapping"][0]]
        special = torch.tensor([[start == end for start, end in offsets]])
        baseline = torch.where(special, ids, torch.full_like(ids, encoder.pad_id))
        model = encoder.running_model(ids.device)

        def score(tokens: Tensor) -> Tensor:
            return artefact.ready(tower.from_features(encoder(tokens, layers=tower.reads_layers))) @ wanted

        attribution = LayerIntegratedGradients(score, model.get_input_embeddings()).attribute(
            ids, baselines=baseline, n_steps=_STEPS, internal_batch_size=8
        )
    by_token = attribution.detach().sum(-1)[0].tolist()
    effects = [0.0] * len(spans)
    word = 0
    for (start, end), value in zip(offsets, by_token, strict=True):
        if start == end:
            continue
        while word + 1 < len(spans) and start >= spans[word][1]:
            word += 1
        effects[word] += value
    return effects
