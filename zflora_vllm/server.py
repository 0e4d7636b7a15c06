"""Tasks in vLLM's API server: their routes, and a gate that each request passes with the weights of
its own task (`VLLM_PLUGINS=zflora`). Model NAME:TASK is a task; NAME is the export that is served.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from zflora_vllm.gate import BrokenError, Gate, SwitchError
from zflora_vllm.slices import SlicesError, read_slices
from zflora_vllm.worker import BASE, OWN

FOLDER = "ZFLORA_TASKS"  # environment: the only folder that slices are read from and written to
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ROUTES = "/v1/zflora"
FREE = ("/tokenize", "/detokenize", ROUTES)  # POST routes that compute nothing with the model
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Plugin:
    """The endpoint plugin."""

    name = "zflora"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.gate = Gate(self._switch)
        self.known = dict[str, str]()  # task -> hash of its slices
        self.names: list[str] = []
        self.engine: Any = None
        self._changing = asyncio.Lock()  # of `known`

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes and the gate."""
        for path, method, handler in (
            ("tasks", "GET", self._tasks),
            ("load", "POST", self._load),
            ("use", "POST", self._use),
            ("unload", "POST", self._unload),
            ("slices/{task}", "PUT", self._put),
        ):
            app.add_api_route(f"{ROUTES}/{path}", answered(handler), methods=[method])
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_middleware(Gated, plugin=self)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Takes the engine. Raises ValueError where requests could pass the gate by."""
        if (args.api_server_count or 1) > 1:
            raise ValueError(
                f"--api-server-count {args.api_server_count}: the gate of zflora knows the requests"
                " of one API server. Start one."
            )
        folder = os.environ.get(FOLDER, "")
        if not folder or not Path(folder).is_dir():
            raise ValueError(f"{FOLDER}={folder!r}: name the folder of the tasks' slices.")
        self.folder, self.engine = Path(folder).resolve(), engine_client
        self.names = args.served_model_name or [args.model]

    # --- routes -----------------------------------------------------------------------------------

    async def _tasks(self, request: Request) -> dict[str, Any]:
        gate = self.gate
        found = [{"task": task, "sha256": digest} for task, digest in self.known.items()]
        return {
            "task": gate.task,
            "tasks": found,
            "running": gate.running,
            "switches": gate.switches,
            "broken": gate.broken or None,
        }

    async def _put(self, request: Request) -> dict[str, Any]:
        """Stores a file of slices; it appears whole or not at all."""
        path, data = self._file(request.path_params["task"]), await request.body()
        slices = await asyncio.to_thread(read_slices, data, path.name)
        handle, staged = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(staged, path)
        except BaseException:
            os.unlink(staged)
            raise
        return {"task": path.stem, "sha256": slices.facts["sha256"]}

    async def _load(self, request: Request) -> dict[str, Any]:
        task = await self._named(request)
        path = self._file(task)
        async with self._changing:
            if task in self.known:
                raise RefusedError(409, f"task {task!r} is loaded: unload it first.")
            if not path.is_file():
                raise RefusedError(404, f"{path.name} is not in {FOLDER}: put it there first.")
            facts = (await asyncio.to_thread(read_slices, path.read_bytes(), path.name)).facts
            if errors := await self._call("zflora_load", task, str(path)):
                await self._call("zflora_unload", task)
                raise RefusedError(400, errors[0])
            self.known |= {task: facts["sha256"], BASE: BASE}
        return {"task": task, "sha256": facts["sha256"]}

    async def _use(self, request: Request) -> dict[str, Any]:
        task = await self._named(request)
        async with self.gate.using(self._known(task)):
            return {"task": task}

    async def _unload(self, request: Request) -> dict[str, Any]:
        task = self._known(await self._named(request))
        if task in (OWN, BASE):
            raise RefusedError(400, f"task {task!r} belongs to the export that is served.")
        async with self._changing:
            digest = self.known.pop(task)  # from here on its requests are refused
            try:
                async with self.gate.using(OWN):
                    await self._call("zflora_unload", task)
            except BaseException:
                self.known[task] = digest
                raise
        return {"task": task}

    async def _models(self, request: Request) -> JSONResponse:
        models = await request.app.state.openai_serving_models.show_available_models()
        found = models.model_dump()
        first = found["data"][0]
        found["data"] += [first | {"id": f"{first['id']}:{t}"} for t in self.known]
        return JSONResponse(found)

    async def _named(self, request: Request) -> str:
        try:
            return str((await request.json())["task"])
        except (ValueError, KeyError, TypeError):
            raise RefusedError(400, 'expected {"task": NAME}.') from None

    def _file(self, task: str) -> Path:
        if not NAME.fullmatch(task) or task == BASE:
            raise RefusedError(
                400, f"{task!r:.80} is no name of a task: letters, digits, '.', '_' and '-'."
            )
        return self.folder / f"{task}.safetensors"

    def _known(self, task: str) -> str:
        if task != OWN and task not in self.known:
            names = ", ".join(self.known) or "none"
            raise RefusedError(404, f"no task {task!r:.80} is loaded; loaded are {names}.")
        return task

    # --- the engine -------------------------------------------------------------------------------

    async def _call(self, method: str, *args: str) -> list[str]:
        """The errors of all ranks."""
        found = await self._while_alive(self.engine.collective_rpc(method, args=args))
        return [error for error in found if error]

    async def _while_alive(self, call: Awaitable[Any]) -> Any:
        """The result of a call to the engine, which answers none after its end."""
        made = asyncio.ensure_future(call)
        while not (await asyncio.wait([made], timeout=0.5))[0]:
            if self.engine.errored:
                made.cancel()
                raise BrokenError("the engine has ended")
        return made.result()

    async def _switch(self, task: str) -> None:
        """Writes a task into every rank, or none; else the engine stays paused."""
        await self._while_alive(self.engine.pause_generation(mode="wait", clear_cache=False))
        errors = await self._call("zflora_use", task)
        if errors and await self._call("zflora_use", self.gate.task):
            raise RuntimeError(errors[0])
        await self._while_alive(self.engine.resume_generation())
        if errors:
            raise SwitchError(f"task {task!r} could not be written: {errors[0]}")

    def prepared(self, body: dict[str, Any]) -> str:
        """The task of a request, whose body is changed to what vLLM takes: the name of the model
        without the task, and a salt, so that no cached prefix of another task is used.
        """
        model = body.get("model")
        name = next((n for n in self.names if str(model).startswith(f"{n}:")), None)
        if name is None:
            return OWN
        if body.get("background"):
            raise RefusedError(400, "a task's answer cannot be made in the background.")
        task = self._known(str(model)[len(name) + 1 :])
        body["model"] = name
        salt = body.get("cache_salt")
        body["cache_salt"] = f"{self.known.get(task, '')}{f':{salt}' if salt else ''}"
        return task


class Gated:
    """ASGI middleware: a request of the model runs while its task's weights are in place."""

    def __init__(self, app: Any, plugin: Plugin) -> None:
        self.app, self.plugin = app, plugin

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        free = scope["type"] != "http" or scope["method"] != "POST"
        if free or scope["path"].startswith(FREE):
            await self.app(scope, receive, send)
            return
        data, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            data, more = data + message.get("body", b""), message.get("more_body", False)
        try:
            task, data = OWN, data
            try:
                body = json.loads(data)
            except ValueError:
                body = None
            if isinstance(body, dict):
                task = self.plugin.prepared(body)
                data = json.dumps(body).encode()
            sent = [{"type": "http.request", "body": data, "more_body": False}]

            async def again() -> MutableMapping[str, Any]:
                return sent.pop() if sent else await receive()

            length = [(b"content-length", str(len(data)).encode())]
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
            async with self.plugin.gate.using(task):
                await self.app({**scope, "headers": headers + length}, again, send)
        except (RefusedError, SwitchError, BrokenError) as error:
            await failed(error)(scope, receive, send)


def failed(error: Exception) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    status = error.status if isinstance(error, RefusedError) else 400
    status = 503 if isinstance(error, SwitchError | BrokenError) else status
    fields = {"message": str(error), "type": type(error).__name__, "param": None, "code": status}
    return JSONResponse({"error": fields}, status)


def answered(handler: Callable[[Request], Awaitable[dict[str, Any]]]) -> Any:
    """A route that answers with JSON, and says what is wrong."""

    async def route(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await handler(request))
        except (RefusedError, SlicesError, SwitchError, BrokenError) as error:
            return failed(error)

    return route
