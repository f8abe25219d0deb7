"""What calls may hold: every field is known, of one type, and bounded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from lightning_rec.data.table import plain_text
from lightning_rec.recommend import types

MAX_ID = 512
MAX_TEXT = 4_000
MAX_EVENTS = 1_000
MAX_IDS = 10_000
MAX_ITEMS = 1_000
_MAX_FIELDS = 64
_MAX_VALUE = 20_000
_TIME = 2**53


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("an id holds no NUL character")
    return value


Id = Annotated[str, Field(min_length=1, max_length=MAX_ID), AfterValidator(_no_nul)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Time = Annotated[int, Field(ge=-_TIME, le=_TIME, strict=True, description="Seconds since 1970.")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Value = Annotated[str, Field(max_length=_MAX_VALUE)] | bool | Annotated[int, Field(ge=-_TIME, le=_TIME)] | Number
Values = Value | Annotated[list[Value], Field(max_length=1_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Asker(_Strict):
    """Who asks: a known user, a history, or words."""

    user: Id | None = Field(None, description="Raw id of a user; what is known of that user is the history.")
    history: Annotated[list[Id], Field(max_length=MAX_EVENTS)] | None = Field(
        None, description="Raw item ids, oldest first, in the place of the known history."
    )
    times: Annotated[list[Time], Field(max_length=MAX_EVENTS)] | None = Field(
        None, description="Seconds since 1970 of each event of the history."
    )
    text: Text | None = Field(None, description="What someone without a history likes, in plain words.")
    half_life: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Seconds after which an event counts half."
    )

    @model_validator(mode="after")
    def _times_fit(self) -> Asker:
        if self.times is not None and len(self.times) != len(self.history or ()):
            raise ValueError("times has one time for each event of the history")
        return self


class RecommendOne(Asker):
    """One request."""

    k: int = Field(10, ge=1, le=10_000, strict=True, description="Number of items wanted.")
    filter_seen: bool | None = Field(None, description="Leave out what the history holds; null: as the run was tested.")
    candidates: Annotated[list[Id], Field(max_length=MAX_IDS)] | None = Field(
        None, description="Raw ids to choose from; null: the whole catalogue."
    )
    exclude: Annotated[list[Id], Field(max_length=MAX_IDS)] = Field([], description="Raw ids that must not come.")
    where: Annotated[dict[Name, Values], Field(max_length=_MAX_FIELDS)] = Field(
        {}, description="A value, or a list of allowed ones, that a field of the items must have."
    )
    at_most: Annotated[dict[Name, Annotated[int, Field(ge=1, le=10_000)]], Field(max_length=_MAX_FIELDS)] = Field(
        {}, description="At most so many items with the same value of a field."
    )
    diversity: float = Field(0.0, ge=0, le=1, description="0: by score alone, 1: by difference alone.")
    explore: Literal["none", "ucb", "thompson"] = "none"
    exploration: float = Field(1.0, ge=0, le=1_000, description="How strongly to explore.")
    seed: int | None = Field(None, ge=0, le=2**53, strict=True, description="Of a Thompson draw.")

    def to_request(self) -> types.Request:
        """The same request, for the recommender."""
        return types.Request(**{name: getattr(self, name) for name in types.Request.__dataclass_fields__})


class RecommendMany(_Strict):
    """Several requests, which are answered together, in order."""

    requests: Annotated[list[RecommendOne], Field(min_length=1, max_length=1_024)]


def _kind(value: Any) -> str:
    return "many" if isinstance(value, RecommendMany) or (isinstance(value, dict) and "requests" in value) else "one"


Recommend = Annotated[
    Annotated[RecommendOne, Tag("one")] | Annotated[RecommendMany, Tag("many")],
    Discriminator(_kind),
    Field(description="One request, or several as `requests`."),
]


class Explain(Asker):
    """Why an item has its score for who asks."""

    item: Id = Field(description="Raw id of the item.")
    words: Literal["none", "occlusion", "gradients"] = Field(
        "none", description="Weigh the words of its text, and how."
    )

    def to_request(self) -> types.Request:
        """Who asks, for the recommender."""
        return types.Request(self.user, self.history, self.times, self.text, half_life=self.half_life)


class EventIn(_Strict):
    """One thing that a user did."""

    item: Id
    time: Time | None = Field(None, description="Seconds since 1970; null: now.")
    id: Id | None = Field(None, description="What makes it the same event when it is sent twice.")


class Events(_Strict):
    """What a user did, oldest first."""

    user: Id
    events: Annotated[list[EventIn], Field(min_length=1, max_length=MAX_EVENTS)]

    def to_events(self) -> list[types.Event]:
        """The same events, for the recommender."""
        return [types.Event(event.item, event.time, event.id) for event in self.events]


ItemValue = Values | None


class Item(BaseModel):
    """An item: its id and any other fields, each a string, a number or a list of them."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Name, ItemValue]

    item_id: Id

    @model_validator(mode="after")
    def _few_fields(self) -> Item:
        if len(self.__pydantic_extra__) > _MAX_FIELDS:
            raise ValueError(f"an item has at most {_MAX_FIELDS} fields")
        return self

    def to_row(self) -> dict[str, Any]:
        """The fields as an artefact has them: strings, and lists of strings."""
        return {"item_id": self.item_id} | {name: _as_text(value) for name, value in self.__pydantic_extra__.items()}


class Items(_Strict):
    """Items to add or to change."""

    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]


class ItemIds(_Strict):
    """Items to take out."""

    ids: Annotated[list[Id], Field(min_length=1, max_length=MAX_ITEMS)]


def _as_text(value: Any) -> Any:
    # by the rules of the readers, as a value of ``where`` is read too; a string stays as it is
    if isinstance(value, list):
        return [_as_text(part) for part in value]
    return value if isinstance(value, str) else plain_text(value)


class Failure(BaseModel):
    """An error."""

    code: str
    message: str
    remedy: str


class ItemOut(BaseModel):
    """A recommended item."""

    id: str
    score: float
    text: str


class AnswerOut(BaseModel):
    """The answer to one request."""

    items: list[ItemOut]
    path: Literal["towers", "text", "popularity"]
    generation: int
    unknown: list[str]
    artefact: str


class FailedOut(BaseModel):
    """A request that cannot be answered, among others that can."""

    error: Failure


class AnswersOut(BaseModel):
    """The answers to several requests, in order; a request that cannot be answered has an ``error`` instead."""

    answers: list[AnswerOut | FailedOut]


class ReasonOut(BaseModel):
    """What one item of the history did to the score."""

    id: str
    text: str
    effect: float
    place: int


class WordOut(BaseModel):
    """What one word did to the score."""

    text: str
    effect: float


class ExplanationOut(BaseModel):
    """Why an item has its score."""

    item: str
    text: str
    score: float
    reasons: list[ReasonOut]
    words: list[WordOut]
    sentence: str
