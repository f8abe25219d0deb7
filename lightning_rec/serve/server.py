"""Runs the service by uvicorn."""

from __future__ import annotations

import os
import signal
import threading
import time

import uvicorn

from lightning_rec.serve.app import App, create_app
from lightning_rec.serve.logs import LOG, log_to_stdout
from lightning_rec.serve.settings import Settings

_LOOK = 0.2  # seconds between looks whether a signal came


def _reload_when_asked(app: App, asked: list[int]) -> None:
    while True:
        if asked:
            asked.clear()  # before: what comes from now on asks for one more
            app.service.reload_soon()
        time.sleep(_LOOK)


def run(folder: str | os.PathLike[str], settings: Settings | None = None) -> None:
    """Serves an artefact until the process is asked to end.

    ``SIGHUP`` lets the artefact that then lies in the folder take over. ``SIGTERM`` and ``SIGINT`` end the service:
    no new call is taken, those under way have ``shutdown_timeout`` seconds left.

    Args:
        folder: what ``lightning-rec export`` wrote, or a link to it.
        settings: None: the usual ones.

    Raises:
        ArtefactError: the artefact cannot be opened.
        ValueError: keys that cannot be used, or none where other machines reach the service.
    """
    settings = settings or Settings()
    log_to_stdout()
    asked: list[int] = []
    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        # before the artefact is loaded, or a signal meanwhile would end the process; a handler may take no lock
        signal.signal(signal.SIGHUP, lambda number, frame: asked.append(number))
    app = create_app(folder, settings)
    threading.Thread(target=_reload_when_asked, args=(app, asked), name="signals", daemon=True).start()
    served = app.service.served
    LOG.info(
        "The service starts.",
        extra={"fields": {"host": settings.host, "port": settings.port, "artefact": served.name}},
    )
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,  # it would tell the ids of users; ours does not
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
