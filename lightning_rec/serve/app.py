"""The service as an ASGI application."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request as Call
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from lightning_rec.recommend.ann import make_index
from lightning_rec.recommend.artefact import ArtefactError
from lightning_rec.recommend.index import Index
from lightning_rec.recommend.lives import moment
from lightning_rec.recommend.recommender import Recommender
from lightning_rec.recommend.types import RequestError
from lightning_rec.serve import errors
from lightning_rec.serve.auth import Keys
from lightning_rec.serve.errors import ServiceError
from lightning_rec.serve.gate import Gate
from lightning_rec.serve.logs import LOG, Mask
from lightning_rec.serve.routes import add_routes
from lightning_rec.serve.service import Service
from lightning_rec.serve.settings import Settings
from lightning_rec.serve.stores import open_store


class App:
    """The service: an ASGI application, and what it is made of.

    Attributes:
        api: the FastAPI application inside.
        service: the parts.
    """

    def __init__(self, api: FastAPI, service: Service, gate: ASGIApp) -> None:
        self.api = api
        self.service = service
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call."""
        await self._gate(scope, receive, send)


def create_app(source: Recommender | str | os.PathLike[str], settings: Settings | None = None) -> App:
    """Makes the service.

    Args:
        source: an artefact, or a recommender with the index and the store that it shall use.
        settings: None: the usual ones.

    Raises:
        ArtefactError: the artefact cannot be opened.
        ValueError: keys that cannot be used, or none where other machines reach the service.

    Example::

        app = create_app("artefact", Settings(store="memory:"))
        uvicorn.run(app, port=8080, access_log=False)  # uvicorn's own log would tell the ids of users
    """
    settings = settings or Settings()
    keys = Keys.load(settings)
    index: Callable[[], Index]
    if isinstance(source, Recommender):
        recommender, like, close = source, source.state.index, False

        def index() -> Index:
            return like  # only its kind is looked at: ``build`` makes a new one
    else:

        def index() -> Index:
            return make_index(settings.index)

        store = open_store(settings.store)
        try:
            recommender = Recommender.load(source, index(), store, settings.verify, moment(settings.now))
        except BaseException:
            store.close()
            raise
        close = True
    service = Service(recommender, index, settings, Mask(settings.log_key), close)

    @asynccontextmanager
    async def life(api: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(service.watch)
            yield
            tasks.cancel_scope.cancel()
        await anyio.to_thread.run_sync(service.close)

    api = FastAPI(
        title="lightning_rec",
        description="Recommendations, explanations and updates from an exported artefact.",
        version="1",
        docs_url=None,  # FastAPI's own page loads its scripts from elsewhere; /docs is ours
        redoc_url=None,
        openapi_url=None,  # served by a route of ours, which says what it needs
        redirect_slashes=False,
        lifespan=life,
    )
    add_routes(api, service)
    _tell_errors(api, recommender.store.failures)
    gate = Gate(api, api.router.routes, settings, keys, service.metrics, service.mask)
    return App(api, service, gate)


def _tell_errors(api: FastAPI, failures: Sequence[type[Exception]]) -> None:
    @api.exception_handler(RequestError)
    async def refused(call: Call, error: RequestError) -> Response:
        call.state.code = error.code
        return errors.of_request(error)

    @api.exception_handler(ArtefactError)
    async def gone(call: Call, error: ArtefactError) -> Response:
        LOG.warning(str(error))
        return await refused(call, errors.replaced())

    @api.exception_handler(ServiceError)
    async def told(call: Call, error: ServiceError) -> Response:
        call.state.code = error.code
        return errors.of_service(error)

    @api.exception_handler(RequestValidationError)
    async def invalid(call: Call, error: RequestValidationError) -> Response:
        return errors.of_validation(error.errors())

    @api.exception_handler(HTTPException)
    async def status(call: Call, error: HTTPException) -> Response:
        return errors.of_status(error.status_code, error.detail, error.headers)

    async def store_away(call: Call, error: Exception) -> Response:
        LOG.error("The store of histories failed.", exc_info=error, extra={"fields": {"call": call.state.call}})
        call.state.code = "store_unavailable"
        return errors.of_service(errors.store_unavailable())

    for kind in failures:
        api.add_exception_handler(kind, store_away)

    @api.exception_handler(Exception)
    async def failed(call: Call, error: Exception) -> Response:
        return errors.of_failure(call.state.call)  # the error itself goes on to the gate, which logs it
