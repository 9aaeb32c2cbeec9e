"""A W&B server for tests, on loopback and in memory: what wandb 0.31 asks for a sweep, its agents and their runs.

It plays the server's side of these, and of nothing else:

- GraphQL by the operation's name: the account (``Viewer``), a sweep registered and read (``UpsertSweep``,
  ``SweepWithRuns``, ``Sweep``), an agent and its heartbeats, each answered with the grid's next point
  (``CreateAgent``, ``Heartbeat``), a run created and updated (``UpsertBucket``, ``RunResumeStatus``), and a project's
  runs, page by page (``Runs``). Unknown operations get an error, as from a server that lacks them, and are noted.
- the file stream of a run: its history, summary and end. What is uploaded as a file is taken and thrown away.

There is one account with one key. A sweep's points come in the order of its parameters' names. Filters and orders of
queries are ignored; a grid is the only search it knows. What W&B's server does beyond (early stopping, other searches,
resuming a run, quotas, teams, web pages) is not played.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY, KEY = "lab", "0" * 40
PAGE = 2
"""Runs a page at most, so that a few runs take several pages."""


class WandbStandIn:
    """The server; ``with WandbStandIn() as server`` runs it in a thread."""

    def __init__(self) -> None:
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.agents: dict[str, str] = {}
        """Agent -> its sweep."""
        self.runs: dict[str, dict[str, Any]] = {}
        """Run -> what the server knows of it, under the names of W&B's schema."""
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes wandb's client speak to this server alone."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ENTITY": ENTITY,
            "WANDB_SILENT": "true",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_X_DISABLE_STATS": "true",
        }

    def __enter__(self) -> WandbStandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Hang up; from then on nobody listens there."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The response to a GraphQL request."""
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else "anonymous"
        play = getattr(self, "_play" + re.sub("([A-Z])", r"_\1", name).lower(), None)
        with self._lock:
            self.operations.append(name)
            if play is None:
                self.unknown.append(name)
                return {"errors": [{"message": f"the stand-in does not play {name}"}], "data": None}
            return {"data": play(variables)}

    # --- GraphQL, by the operation's name ---

    def _play_viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "viewer", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams}}

    def _play_upsert_sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        config = yaml.safe_load(variables["config"])
        choices = {
            name: spec["values"] if "values" in spec else [spec["value"]]
            for name, spec in sorted(config["parameters"].items())
        }
        points = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = {"project": variables["projectName"], "config": config, "points": points, "next": 0}
        entity = {"id": "entity", "name": variables.get("entityName") or ENTITY}
        project = {"id": "project", "name": variables["projectName"], "entity": entity}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def _play_sweep_with_runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = self.sweeps.get(variables["sweep"])
        if sweep is None:
            return {"project": {"sweep": None}}
        known = {"id": variables["sweep"], "name": variables["sweep"], "method": "grid", "state": "RUNNING"}
        config = yaml.safe_dump(sweep["config"])
        return {"project": {"sweep": {**known, "config": config, "runs": {"edges": []}}}}

    def _play_create_agent(self, variables: dict[str, Any]) -> dict[str, Any]:
        agent = f"agent{len(self.agents)}"
        self.agents[agent] = variables["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def _play_heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep_name = self.agents[variables["id"]]
        sweep = self.sweeps[sweep_name]
        busy = bool(json.loads(variables["runState"]))
        commands = [] if busy else [_next_command(sweep_name, sweep)]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _play_upsert_bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or base64.b64decode(variables["id"]).decode().split(":")[1]
        new = name not in self.runs
        run = self.runs.setdefault(name, {"name": name, "state": "running", "config": "{}", "summaryMetrics": "{}"})
        given = {"displayName": "displayName", "sweep": "sweepName", "groupName": "group", "project": "project"}
        run.update({ours: variables[theirs] for theirs, ours in given.items() if variables.get(theirs)})
        for key in ("config", "summaryMetrics"):
            if variables.get(key):
                run[key] = variables[key]
        project = {"id": "project", "name": run.get("project"), "entity": {"id": "entity", "name": ENTITY}}
        bucket = {
            "id": base64.b64encode(f"Run:{name}:{run.get('project')}:{ENTITY}".encode()).decode(),
            "name": name,
            "displayName": run.get("displayName"),
            "sweepName": run.get("sweepName"),
            "config": run["config"],
            "historyLineCount": 0,
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _play_run_resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"model": None}

    def _play_create_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _play_runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        runs = [run for run in self.runs.values() if run.get("project") == variables["project"]]
        if not runs or variables["entity"] != ENTITY:
            return {"project": None}
        first = int(variables.get("cursor") or 0)
        page = runs[first : first + min(PAGE, variables["perPage"])]
        edges = [{"node": _node(run), "cursor": str(first + n + 1)} for n, run in enumerate(page)]
        end = first + len(page)
        information = {"endCursor": str(end), "hasNextPage": end < len(runs)}
        return {
            "project": {
                "internalId": "1",
                "runCount": len(runs),
                "readOnly": False,
                "runs": {"edges": edges, "pageInfo": information},
            }
        }

    # --- the file stream ---

    def stream(self, run_name: str, body: dict[str, Any]) -> None:
        """A part of a run's files: the summary's last line counts; the end says how the run ended."""
        with self._lock:
            run = self.runs[run_name]
            for line in body.get("files", {}).get("wandb-summary.json", {}).get("content", []):
                run["summaryMetrics"] = line
            if body.get("complete"):
                run["state"] = "finished" if body.get("exitcode") == 0 else "failed"


def _next_command(name: str, sweep: dict[str, Any]) -> dict[str, Any]:
    number = sweep["next"]
    if number == len(sweep["points"]):
        return {"type": "exit"}
    sweep["next"] += 1
    arguments = {parameter: {"value": value} for parameter, value in sweep["points"][number].items()}
    return {"type": "run", "run_id": f"{name}run{number}", "program": sweep["config"]["program"], "args": arguments}


def _node(run: dict[str, Any]) -> dict[str, Any]:
    nothing = {
        "user": {"name": ENTITY, "username": ENTITY},
        "systemMetrics": "{}",
        "tags": [],
        "sweepName": None,
        "historyLineCount": 0,
    }
    return {**nothing, "id": run["name"], "projectId": "1", **run}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; everything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(server: WandbStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            if self.headers.get("Authorization") != f"Basic {base64.b64encode(f'api:{KEY}'.encode()).decode()}":
                self._send(401, {"errors": [{"message": "invalid key"}]})
            elif self.path == "/graphql":
                self._send(200, server.answer(body["query"], body.get("variables") or {}))
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], body)
                self._send(200, {})
            else:
                self._send(404, {})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._send(200, {})

        def do_GET(self) -> None:
            self._send(404, {})

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
