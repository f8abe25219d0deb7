"""The calls of the service."""

# FastAPI looks at the annotations of functions that are made inside of one: no `from __future__ import annotations`.
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import Depends, FastAPI, HTTPException, Path, Query
from fastapi.requests import Request as Call
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from lightning_rec.recommend import types
from lightning_rec.recommend.item_changes import additions, removals, updates
from lightning_rec.serve import schemas
from lightning_rec.serve.errors import ServiceError, as_json, items_pending, store_unavailable, told
from lightning_rec.serve.forgotten import ENTRY
from lightning_rec.serve.item_log import Make
from lightning_rec.serve.page_files import page_files
from lightning_rec.serve.service import LOOK_FOR_ITEMS, Service

_F = TypeVar("_F", bound=Callable[..., Any])
_ItemId = Annotated[schemas.Id, Path(description="Raw id; it may hold any character but NUL, slashes too.")]
_UserId = Annotated[schemas.Id, Path(description="Raw id of a user.")]
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Failure, "description": text}
    for status, text in (
        (400, "Cannot be answered as it is."),
        (401, "No key, or a wrong one."),
        (403, "The key does not open this."),
        (404, "There is no such thing."),
        (408, "The body came too slowly."),
        (409, "Does not fit what is there."),
        (413, "The body is too long."),
        (415, "The body is not said to be JSON."),
        (422, "A field is missing, unknown, of another type or out of bounds."),
        (429, "Too many calls; see Retry-After."),
        (500, "The service failed."),
        (503, "Too much waits; see Retry-After."),
    )
}


def needs(scope: str | None) -> Callable[[_F], _F]:
    """Says which scope a key needs for an endpoint; None: no key is needed."""

    def mark(endpoint: _F) -> _F:
        endpoint.scope = scope  # type: ignore[attr-defined]  # functions take attributes
        return endpoint

    return mark


class StrictCall(Call):
    """A call whose body is JSON as its standard has it: without NaN and infinity, and nested no deeper than is sane."""

    async def json(self) -> Any:
        """The body.

        Raises:
            HTTPException: it is no JSON.
        """
        try:
            return json.loads(await self.body(), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            place = f" (at character {error.pos}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
            # of other errors FastAPI would say only that there was one
            raise HTTPException(400, f"The body is no JSON{place}.") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


class StrictRoute(APIRoute):
    """Reads bodies strictly."""

    def get_route_handler(self) -> Callable[[Call], Coroutine[Any, Any, Response]]:
        """See :class:`fastapi.routing.APIRoute`."""
        handler = super().get_route_handler()

        async def strict(call: Call) -> Response:
            return await handler(StrictCall(call.scope, call.receive))

        return strict


def add_routes(api: FastAPI, service: Service) -> None:
    """Adds all calls to an application."""
    api.router.route_class = StrictRoute
    _add_answers(api, service)
    _add_items(api, service)
    _add_users(api, service)
    _add_operation(api, service)
    _add_pages(api, service)


_V1: dict[str, Any] = {"responses": _FAILURES, "dependencies": [Depends(HTTPBearer(auto_error=False))]}


def _add_answers(api: FastAPI, service: Service) -> None:
    settings = service.settings

    @api.post("/v1/recommend", response_model=schemas.AnswerOut | schemas.AnswersOut, tags=["answers"], **_V1)
    @needs("read")
    async def recommend(call: Call, body: schemas.Recommend) -> Response:
        """Answers one request, or several at once; of several, a bad one gets an error, the others answers."""
        many = isinstance(body, schemas.RecommendMany)
        asked = body.requests if isinstance(body, schemas.RecommendMany) else [body]
        _bounded("requests", len(asked), settings.max_requests)
        _bounded("k", max(request.k for request in asked), settings.max_k)
        if len(asked) > 1 and "charge" in call.scope["state"]:
            call.scope["state"]["charge"](len(asked) - 1)
        requests = [request.to_request() for request in asked]
        said = call.state.said
        said["requests"] = len(requests)
        if not many:
            said |= {name: value for name in ("user", "text") if (value := getattr(asked[0], name))}
        name, outcomes = await service.batcher(requests).recommend(requests)
        answers: list[dict[str, Any]] = []
        for request, outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, types.RequestError):
                service.metrics.refused.labels(outcome.code).inc()
                if not many:
                    raise outcome
                answers.append({"error": told(outcome)})
            else:
                service.metrics.answered(request, outcome)
                answers.append(_as_row(outcome) | {"artefact": name})
        return as_json({"answers": answers} if many else answers[0])

    @api.post("/v1/explain", response_model=schemas.ExplanationOut, tags=["answers"], **_V1)
    @needs("read")
    async def explain(call: Call, body: schemas.Explain) -> Response:
        """Says why an item has its score: the effect of each item of the history, and of words where asked for."""
        call.state.said |= {name: value for name in ("user", "item") if (value := getattr(body, name))}
        recommender = service.served.recommender
        found = await anyio.to_thread.run_sync(
            lambda: recommender.explain(body.to_request(), body.item, body.words), limiter=service.heavy
        )
        return as_json(asdict(found))

    @api.post("/v1/events", tags=["events"], **_V1)
    @needs("events")
    async def events(call: Call, body: schemas.Events) -> Response:
        """Adds to a user's history, durably; an event with an id that the user already has is left out."""
        call.state.said["user"] = body.user
        recommender = service.served.recommender
        new = await anyio.to_thread.run_sync(recommender.update, body.user, body.to_events())
        service.metrics.events.labels("new").inc(new)
        service.metrics.events.labels("repeated").inc(len(body.events) - new)
        return as_json({"new": new, "repeated": len(body.events) - new})


def _as_row(answer: types.Answer) -> dict[str, Any]:
    # dataclasses.asdict copies deeply, which took longer than all the rest of the call
    return vars(answer) | {"items": [vars(item) for item in answer.items]}


def _bounded(name: str, value: int, most: int) -> None:
    if value > most:
        raise ServiceError(
            422, "invalid", f"{name} is {value}, and this service takes {most} at most.", "Ask for less."
        )


_LASTS = (
    "The change is in the store of histories before this call is answered: it outlasts restarts and reloads, and other "
    f"replicas of the store follow within {LOOK_FOR_ITEMS:g} s and the time it takes to encode new texts (with the "
    "store `memory:` it ends with the process). It also holds for newer artefacts: their items keep the fields that "
    "were given here, and an item that was removed stays away until it is added again."
)


def _add_items(api: FastAPI, service: Service) -> None:
    async def change(call: Call, make: Make, items: int) -> Response:
        recommender, generation = await anyio.to_thread.run_sync(service.change_items, make, limiter=service.heavy)
        call.state.said["items"] = items
        return as_json({"generation": generation, "items": recommender.n_items})

    @api.get("/v1/items/{item_id:path}", tags=["items"], **_V1)
    @needs("read")
    async def item(call: Call, item_id: _ItemId) -> Response:
        """The fields of an item."""
        call.state.said["item"] = item_id
        return as_json(service.served.recommender.item(item_id))

    @api.post("/v1/items", tags=["items"], description="Adds items, which can be recommended at once. " + _LASTS, **_V1)
    @needs("admin")
    async def add_items(call: Call, body: schemas.Items) -> Response:
        """Adds items, which can be recommended at once."""
        rows, moment = [item.to_row() for item in body.items], service.served.recommender.moment()
        return await change(call, lambda state: additions(state, rows, moment), len(rows))

    @api.put(
        "/v1/items",
        tags=["items"],
        description="Changes fields of items; those that are not named stay. " + _LASTS,
        **_V1,
    )
    @needs("admin")
    async def update_items(call: Call, body: schemas.Items) -> Response:
        """Changes fields of items; those that are not named stay."""
        rows = [item.to_row() for item in body.items]
        return await change(call, lambda state: updates(state, rows), len(rows))

    @api.delete("/v1/items", tags=["items"], description="Takes items out of all later answers. " + _LASTS, **_V1)
    @needs("admin")
    async def remove_items(call: Call, body: schemas.ItemIds) -> Response:
        """Takes items out of all later answers."""
        return await change(call, lambda state: removals(state, body.ids), len(body.ids))

    @api.delete(
        "/v1/items/{item_id:path}",
        tags=["items"],
        description="Takes one item out of all later answers. " + _LASTS,
        **_V1,
    )
    @needs("admin")
    async def remove_item(call: Call, item_id: _ItemId) -> Response:
        """Takes one item out of all later answers."""
        return await change(call, lambda state: removals(state, [item_id]), 1)


def _add_users(api: FastAPI, service: Service) -> None:
    if service.settings.page:

        @api.get("/v1/users", tags=["users"], **_V1)
        @needs("read")
        async def users(call: Call, limit: Annotated[int, Query(ge=1, le=1_000)] = 50) -> Response:
            """Some users with a history, for the demo page."""
            recommender = service.served.recommender
            found = await anyio.to_thread.run_sync(recommender.users, limit + 1)
            return as_json({"users": [user for user in found if user != ENTRY][:limit]})

    @api.get("/v1/users/{user_id:path}", tags=["users"], **_V1)
    @needs("admin")
    async def user(call: Call, user_id: _UserId) -> Response:
        """All that is kept of a user, to be handed to that user."""
        call.state.said["user"] = user_id
        return as_json(await anyio.to_thread.run_sync(_all_of, service, user_id))

    @api.delete("/v1/users/{user_id:path}", tags=["users"], **_V1)
    @needs("admin")
    async def forget(call: Call, user_id: _UserId) -> Response:
        """Forgets a user: the stored events for good, and what the artefact knows, also in later artefacts."""
        call.state.said["user"] = user_id
        return as_json({"forgotten": await anyio.to_thread.run_sync(service.forget, user_id)})


def _all_of(service: Service, user: str) -> dict[str, Any]:
    recommender = service.served.recommender
    known = recommender.artefact.users
    profile, reviews = ({}, []) if known is None else known.profile(user)
    fitted = [] if known is None else known.history(user, 10**9)
    return {
        "user": user,
        "events": [asdict(event) for event in recommender.store.export(user)],
        "fitted": {
            "events": [asdict(event) for event in fitted],
            "touched": [] if known is None else known.touched(user),
            "profile": dict(profile),
            "reviews": list(reviews),
        },
    }


def _add_operation(api: FastAPI, service: Service) -> None:
    started = time.time()

    @api.post("/v1/reload", tags=["operation"], **_V1)
    @needs("admin")
    async def reload(call: Call) -> Response:
        """Lets the artefact that now lies in the folder take over; if it cannot be loaded, the old one serves on."""
        new = await anyio.to_thread.run_sync(service.reload)
        return as_json({"artefact": new.name, "items": new.recommender.n_items})

    @api.head("/healthz", include_in_schema=False)
    @api.get("/healthz", tags=["operation"])
    @needs(None)
    async def healthz(call: Call) -> Response:
        """The process lives."""
        return as_json({"alive": True, "seconds": int(time.time() - started)})

    @api.head("/readyz", include_in_schema=False)
    @api.get("/readyz", tags=["operation"], responses={503: _FAILURES[503]})
    @needs(None)
    async def readyz(call: Call) -> Response:
        """It can answer: the artefact is loaded, the store is there, and its changes of items are applied."""
        if not service.holder.ready.is_set():
            raise items_pending()
        try:
            with anyio.fail_after(5):
                await anyio.to_thread.run_sync(service.holder.store.read, ENTRY, 1, abandon_on_cancel=True)
        except Exception:
            raise store_unavailable() from None
        served = service.served
        return as_json(
            {
                "ready": True,
                "artefact": served.name,
                "items": served.recommender.n_items,
                "generation": served.recommender.generation,
                "last_reload": service.holder.last_reload,
            }
        )

    @api.get("/metrics", tags=["operation"], responses={401: _FAILURES[401], 403: _FAILURES[403]})
    @needs("read")
    async def metrics(call: Call) -> Response:
        """What Prometheus reads."""
        return Response(await anyio.to_thread.run_sync(service.metrics.text), media_type="text/plain; version=0.0.4")

    @api.get("/openapi.json", include_in_schema=False)
    @needs(None)
    async def openapi(call: Call) -> Response:
        told = api.openapi()
        schemas_told = told["components"]["schemas"]
        schemas_told["RecommendOne"]["properties"]["k"]["maximum"] = service.settings.max_k
        schemas_told["RecommendMany"]["properties"]["requests"]["maxItems"] = service.settings.max_requests
        return as_json(told)


def _add_pages(api: FastAPI, service: Service) -> None:
    found = page_files()

    def add(path: str, name: str) -> None:
        content, kind = found[name]

        @needs(None)
        async def page(call: Call) -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

        api.add_api_route(path, page, methods=["GET"], include_in_schema=False)

    if service.settings.page:
        add("/", "index.html")
        add("/page/app.js", "app.js")
    add("/page/style.css", "style.css")
    add("/docs", "docs.html")
    add("/page/docs.js", "docs.js")
