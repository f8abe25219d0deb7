"""A data set of the hub is read again from the local cache without a network, ids and titles as they were written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlparse

import pytest

LOG = b"user_id,item_id,rating,timestamp\n001,07,5,1600000000\n001,2,4,1600000010\n1,07,3,1600000020\n"
ITEMS = b"item_id,title\n07,null\n2,NA\n"
REVISION = "a" * 40
READ = """
import json
from lightning_rec.data.readers import HubDataset
raw = HubDataset("shop/log", items="shop/items").read()
print(json.dumps([raw.interactions["user_id"][:], raw.interactions["item_id"][:], raw.items["title"][:],
                  raw.report.notes]))
"""


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub that loading a data set of one file makes."""

    protocol_version = "HTTP/1.1"
    sets: ClassVar = {"shop/log": ("data.csv", LOG), "shop/items": ("items.csv", ITEMS)}

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        for name, (file, content) in self.sets.items():
            digest = hashlib.sha1(content).hexdigest()
            entry = {"type": "file", "path": file, "size": len(content), "oid": digest}
            if path.startswith(f"/api/datasets/{name}/tree/"):
                return self.answer(json.dumps([entry]).encode(), Content_Type="application/json")
            if path == f"/api/datasets/{name}" or path.startswith(f"/api/datasets/{name}/revision/"):
                about = {"id": name, "sha": REVISION, "private": False, "tags": [], "siblings": [{"rfilename": file}]}
                return self.answer(json.dumps(about).encode(), Content_Type="application/json")
            if path.startswith(f"/datasets/{name}/resolve/") and path.endswith(f"/{file}"):
                return self.answer(content, ETag=f'"{digest}"', X_Repo_Commit=REVISION)
        return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=REVISION)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_what_was_loaded_once_is_read_without_a_network(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    def read(**more: str) -> list[list[str]]:
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", READ], env=os.environ | where | more, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    wanted = [["001", "001", "1"], ["07", "2", "07"], ["null", "NA"], []]
    assert read() == wanted
    hub.shutdown()
    hub.server_close()
    assert read(HF_HUB_OFFLINE="1") == wanted
