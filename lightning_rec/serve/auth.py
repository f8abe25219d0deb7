"""Who may do what: API keys with scopes."""

from __future__ import annotations

import hmac
import ipaddress
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lightning_rec.serve.errors import ServiceError
from lightning_rec.serve.settings import Settings, is_loopback

SCOPES = ("read", "events", "admin")
ENVIRONMENT = "LIGHTNING_REC_KEYS"
_SHORTEST = 16


@dataclass(frozen=True)
class Key:
    """One key: its secret, and what it opens."""

    secret: bytes
    scopes: frozenset[str]


class Keys:
    """The keys that open the service. None at all: everybody who reaches it may do everything.

    Args:
        keys: the keys.
    """

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def load(cls, settings: Settings) -> Keys:
        """Reads the keys of the settings' file, else of the environment.

        Raises:
            ValueError: a file that others can read, a line that is no key, or an address beyond this machine and no
                key.
        """
        if settings.keys is not None:
            path = Path(settings.keys).expanduser()
            try:
                text = _private_text(path)
            except OSError as error:
                raise ValueError(f"The keys cannot be read: {error}.") from error
            keys = cls(parse(text.splitlines(), str(path)))
            if not keys:
                raise ValueError(f"{path} holds no key: write lines such as KEY read,events.")
        else:
            keys = cls(parse(os.environ.get(ENVIRONMENT, "").replace(";", "\n").splitlines(), ENVIRONMENT))
        if not keys and not settings.loopback:
            raise ValueError(
                f"The service would listen on {settings.host}, where other machines reach it, and there is no key. "
                f"Give keys by a file or by {ENVIRONMENT}, or listen on 127.0.0.1."
            )
        return keys

    def find(self, given: str) -> Key | None:
        """The key with a secret; every key is compared, in constant time."""
        found = None
        secret = given.encode("utf-8", "surrogatepass")
        for key in self._keys:
            if hmac.compare_digest(key.secret, secret):
                found = key
        return found

    def admit(self, headers: Mapping[str, str], scope: str | None, client: str | None = None) -> Key | None:
        """Lets a call in, or not.

        Args:
            headers: of the call, with names in lower case.
            scope: what it needs; None: nothing.
            client: the address that it comes from, where there is one.

        Returns:
            Its key, or None where no key is needed.

        Raises:
            ServiceError: 401 without a key or with a wrong one, 403 with one that does not open this.
        """
        if not self._keys:
            self._refuse_other_sites(headers, client)
            return None
        if scope is None:
            return None
        key = self.find(_given(headers))
        if key is None:
            missing = not _given(headers)
            raise ServiceError(
                401,
                "no_key" if missing else "wrong_key",
                "The call carries no API key." if missing else "The API key is not known.",
                "Send it as `Authorization: Bearer KEY`.",
                {"WWW-Authenticate": "Bearer"},
            )
        if scope not in key.scopes:
            raise ServiceError(
                403, "wrong_scope", f"This call needs a key with the scope {scope}.", "Use a key that has it."
            )
        return key

    @staticmethod
    def _refuse_other_sites(headers: Mapping[str, str], client: str | None) -> None:
        """Without keys no other machine, and no web page of another site opened on this one, reaches the service."""
        origin = headers.get("origin")
        try:
            host = urlsplit(f"//{headers.get('host', '')}")
            name = host.hostname or ""
            same = origin is None or urlsplit(origin).netloc == host.netloc
        except ValueError:
            name, same = "", False
        # whoever runs the application by a server of their own may listen wider than the settings say
        if not is_loopback(name) or not same or (_is_address(client) and not is_loopback(str(client))):
            raise ServiceError(
                403,
                "foreign_site",
                "Without API keys only this machine is answered, by the names localhost and 127.0.0.1.",
                "Call it by such a name, or give the service keys.",
            )


def parse(lines: Iterable[str], source: str) -> list[Key]:
    """Keys from lines ``KEY SCOPE,SCOPE``; empty lines and those that begin with ``#`` say nothing.

    Raises:
        ValueError: naming the line, and never the key.
    """
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        where = f"{source}, line {number}"
        if len(parts) != 2:
            raise ValueError(f"{where}: write a key, a space, and its scopes as read,events,admin.")
        scopes = parts[1].split(",")
        wrong = [scope for scope in scopes if scope not in SCOPES]
        if wrong:
            raise ValueError(f"{where}: there is no scope {wrong[0]!r}; the scopes are {', '.join(SCOPES)}.")
        if len(parts[0]) < _SHORTEST:
            raise ValueError(f"{where}: a key has at least {_SHORTEST} characters; `openssl rand -hex 24` makes one.")
        if not parts[0].isascii():
            raise ValueError(f"{where}: a key holds other than ASCII characters, which no header carries.")
        secret = parts[0].encode()
        if secret in keys:
            raise ValueError(f"{where}: this key came before; write all its scopes in one line.")
        keys[secret] = Key(secret, frozenset(scopes))
    return list(keys.values())


def _is_address(client: str | None) -> bool:
    try:
        ipaddress.ip_address(client or "")
    except ValueError:
        return False  # a socket of this machine, or a test's client
    return True


def _private_text(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(f"{path} can be read by others (mode {stat.S_IMODE(mode):o}): run `chmod 600 {path}`.")
        return file.read()


def _given(headers: Mapping[str, str]) -> str:
    kind, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
