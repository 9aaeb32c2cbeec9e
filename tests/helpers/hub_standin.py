"""A stand-in for the Hugging Face Hub on this machine: it answers what an upload asks, and keeps what came."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_thisIsATokenOfNobody"


@dataclass
class Hub:
    """What the stand-in knows and is to do.

    ``refused`` maps the beginning of a request's name, such as `commit`, to the status and the message of its answer.
    Files with a name that ends as one of ``large`` go through the storage of large files.
    """

    address: str = ""
    large: tuple[str, ...] = ()
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def answer(self, name: str, place: str, body: bytes) -> dict[str, Any]:
        """The answer to a request, by its name and the repository or object that it is about."""
        said = json.loads(body) if name in ("create", "validate-yaml", "preupload", "batch") else {}
        if name == "create":
            place = f"{said['organization']}/{said['name']}"
            self.repositories.setdefault(place, said)
            return {"url": f"{self.address}/{place}", "name": place}
        if name == "preupload":
            modes = {file["path"]: "lfs" if file["path"].endswith(self.large) else "regular" for file in said["files"]}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return {"files": files}
        if name == "batch":
            wanted = [{"oid": each["oid"], "size": each["size"]} for each in said["objects"]]
            for each in wanted:
                each["actions"] = {"upload": {"href": f"{self.address}/object/{each['oid']}"}}
            return {"transfer": "basic", "objects": wanted}
        if name == "object":
            assert hashlib.sha256(body).hexdigest() == place
            self.objects[place] = body
            return {}
        if name == "commit":
            self._commit(place, [json.loads(line) for line in body.splitlines()])
            return {"commitUrl": f"{self.address}/{place}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return {"errors": [], "warnings": []}

    def _commit(self, place: str, lines: list[dict[str, Any]]) -> None:
        files = self.files.setdefault(place, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line
                files[value["path"]] = self.objects[value["oid"]]


_ROUTES = {
    r"/api/repos/create": "create",
    r"/api/validate-yaml": "validate-yaml",
    r"/api/models/(.+)/preupload/main": "preupload",
    r"/(.+)\.git/info/lfs/objects/batch": "batch",
    r"/object/(\w+)": "object",
    r"/api/models/(.+)/commit/main": "commit",
}


@contextmanager
def hub_standin() -> Iterator[Hub]:
    """Yields a stand-in that listens on a free port of this machine until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self._body()
            found = ((re.fullmatch(route, self.path.partition("?")[0]), name) for route, name in _ROUTES.items())
            match, name = next(((match, name) for match, name in found if match), (None, self.path))
            hub.requests.append(name)
            status, said = next((why for key, why in hub.refused.items() if name.startswith(key)), (200, ""))
            bare = name in ("object", "validate-yaml")  # storage has its own keys, and a check needs none
            if not bare and self.headers["Authorization"] != f"Bearer {TOKEN}":
                status, said = 401, "Invalid credentials in Authorization header"
            if status == 200 and match is None:
                status, said = 404, "no such address"
            place = (match.groups() or ("",))[0] if match else ""
            content = json.dumps(hub.answer(name, place, body) if status == 200 else {"error": said}).encode()
            self.send_response(status)
            if said:
                self.send_header("X-Error-Message", said)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *arguments: Any) -> None:
            """Nothing: the requests are kept."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
