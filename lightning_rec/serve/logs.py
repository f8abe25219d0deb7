"""The access log: one line of JSON a call, with nothing in it that tells who the user is."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import sys
import traceback
from typing import Any

ACCESS = logging.getLogger("lightning_rec.access")
LOG = logging.getLogger("lightning_rec.serve")


class Mask:
    """Stands in for ids and texts by a keyed hash: the same one for the same value, and no way back without the key.

    Args:
        key: the key; None: a random one, so that values cannot be linked beyond this process.
    """

    def __init__(self, key: str | None = None) -> None:
        self._key = secrets.token_bytes(32) if key is None else key.encode()

    def __call__(self, value: str | bytes) -> str:
        """Twelve hexadecimal digits for a value."""
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        return hmac.new(self._key, data, hashlib.sha256).hexdigest()[:12]


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON: its time, level, message and the fields of ``extra={"fields": ...}``."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`. Of an exception the kind and the lines of code are told, not its message,
        which may hold an id.
        """
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            frames = traceback.extract_tb(record.exc_info[2])
            line["frames"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stdout() -> None:
    """Sends the service's log to the standard output, for the process that runs it."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("lightning_rec")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
