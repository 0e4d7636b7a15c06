"""Tasks in vLLM's API server: their routes, and a gate that lets each request run with its task's
weights (`VLLM_PLUGINS=zflora`). Model NAME:TASK is a task; NAME is the served export.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.routing import BaseRoute, Match

from zflora_vllm.gate import BrokenError, Gate, SwitchError
from zflora_vllm.slices import SlicesError, read_slices, require_same
from zflora_vllm.worker import BASE, OWN, export_facts

FOLDER = "ZFLORA_TASKS"  # environment: the only folder that slices are read from and written to
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ROUTES = "/v1/zflora"
LARGEST = 2**32  # most bytes of an uploaded file
# POST routes that compute nothing with the model, or end such computations.
FREE = re.compile(
    r"/(de)?tokenize|/ping|.*/(cancel|abort_requests|count_tokens)|/\w+_profile|/is_\w+"
)
# Routes that change the engine or its weights behind the gate, or lose the task's name.
REFUSED = re.compile(
    r"/(pause|resume|sleep|wake_up|(scale|release)_\w+)|.*/\w*weight\w*|.*/(de)?render"
)
ENDED = "the engine has ended: restart the server."
log = logging.getLogger("vllm.zflora")  # vLLM shows only its loggers
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
        self.export, self.routes = Path(), list[BaseRoute]()
        self.engine: Any = None
        self._changing = asyncio.Lock()  # for `known`

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
        self.routes = app.router.routes

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Stores the engine, and loads the existing tasks. Raises ValueError if requests could
        bypass the gate.
        """
        for option in ("api_server_count", "data_parallel_size"):
            if (count := getattr(args, option, None) or 1) > 1:
                raise ValueError(
                    f"--{option.replace('_', '-')} {count}: the gate of zflora knows the requests"
                    " of one API server and one engine. Start one of each."
                )
        if not args.worker_extension_cls:
            raise ValueError("add --worker-extension-cls zflora_vllm.worker.Tasks.")
        folder = os.environ.get(FOLDER, "")
        if not folder or not Path(folder).is_dir():
            raise ValueError(f"{FOLDER}={folder!r}: name the folder of the tasks' slices.")
        self.folder, self.engine = Path(folder).resolve(), engine_client
        self.names, self.export = args.served_model_name or [args.model], Path(args.model)
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                await self._loaded(path.stem)
            except (RefusedError, SlicesError) as error:
                log.warning("%s is not loaded: %s", path.name, error)

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
        """Checks a file of slices and stores it; it appears whole or not at all."""
        chunks, size = list[bytes](), 0
        async for chunk in request.stream():
            chunks.append(chunk)
            size += len(chunk)
            if size > LARGEST:
                raise RefusedError(413, f"slices have at most {LARGEST} bytes here.")
        # Checked after the body is read, because clients send before they listen.
        path = self._file(request.path_params["task"])
        async with self._changing:
            digest = await asyncio.to_thread(self._stored, b"".join(chunks), path)
        return {"task": path.stem, "sha256": digest}

    def _checked(self, data: bytes, path: Path) -> str:
        """Checks that slices fit the export, and returns their hash."""
        slices = read_slices(data, path.name)
        require_same(slices.facts, export_facts(self.export), path.name, str(self.export))
        return str(slices.facts["sha256"])

    def _stored(self, data: bytes, path: Path) -> str:
        """Puts slices that fit the export into the folder, and returns their hash."""
        digest = self._checked(data, path)
        staged = path.with_suffix(f".{os.getpid()}.part")
        try:
            staged.write_bytes(data)
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        return digest

    async def _load(self, request: Request) -> dict[str, Any]:
        return await self._loaded(await self._named(request))

    async def _loaded(self, task: str) -> dict[str, Any]:
        """Loads a task; one of the same name is replaced while no request runs."""
        path = self._file(task)
        async with self._changing:
            try:
                data = await asyncio.to_thread(path.read_bytes)
            except OSError as error:
                message = f"{path.name} cannot be read from {FOLDER}: {error.strerror}."
                raise RefusedError(404, message) from None
            digest = await asyncio.to_thread(self._checked, data, path)
            if task in self.known:
                async with self.gate.using(OWN):
                    await self._load_all(task, path, digest)
            else:
                await self._load_all(task, path, digest)
        return {"task": task, "sha256": digest}

    async def _load_all(self, task: str, path: Path, digest: str) -> None:
        """Loads a task in all ranks, or in none."""
        if errors := await self._call("zflora_load", task, str(path), digest):
            lost = f" Task {task!r} is not loaded any more." if self.known.pop(task, None) else ""
            await self._call("zflora_unload", task)
            raise RefusedError(400, errors[0] + lost)
        self.known |= {task: digest, BASE: BASE}

    async def _use(self, request: Request) -> dict[str, Any]:
        task = await self._named(request)
        async with self.gate.using(self._known(task)):
            return {"task": task}

    async def _unload(self, request: Request) -> dict[str, Any]:
        task = await self._named(request)
        async with self._changing:
            if self._known(task) in (OWN, BASE):
                raise RefusedError(400, f"task {task!r} belongs to the export that is served.")
            async with self.gate.using(OWN):
                self.known.pop(task)
                await self._call("zflora_unload", task)
        return {"task": task}

    async def _models(self, request: Request) -> JSONResponse:
        models = await request.app.state.openai_serving_models.show_available_models()
        found = models.model_dump()
        served = [model for model in found["data"] if model["id"] in self.names]
        found["data"] += [m | {"id": f"{m['id']}:{task}"} for m in served for task in self.known]
        return JSONResponse(found)

    async def _named(self, request: Request) -> str:
        try:
            return str((await request.json())["task"])
        except (ValueError, KeyError, TypeError):
            raise RefusedError(400, 'expected {"task": NAME}.') from None

    def _file(self, task: str) -> Path:
        if not NAME.fullmatch(task) or task == BASE:
            raise RefusedError(
                400,
                f"{task!r:.80} is no name of a task: give letters, digits, '.', '_' and '-', and"
                f" not {BASE!r}, which is the base.",
            )
        return self.folder / f"{task}.safetensors"

    def _known(self, task: str) -> str:
        if task != OWN and task not in self.known:
            names = ", ".join(self.known) or "none"
            raise RefusedError(404, f"no task {task!r:.80} is loaded; loaded are {names}.")
        return task

    # --- the engine -------------------------------------------------------------------------------

    async def _call(self, method: str, *args: str) -> list[str]:
        """Calls a method in all ranks, and returns their errors."""
        found = await self.while_alive(self.engine.collective_rpc(method, args=args))
        return [error for error in found if error]

    async def while_alive(self, call: Awaitable[Any]) -> Any:
        """Awaits a call to the engine. Raises BrokenError if the engine ends without an answer."""
        made = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait([made], timeout=0.5))[0]:
                if self.engine.errored:
                    raise BrokenError(ENDED)
            return made.result()
        finally:
            made.cancel()

    async def _switch(self, task: str) -> None:
        """Writes a task into every rank, or into none; otherwise the engine stays paused."""
        if task != OWN and task not in self.known:  # unloaded while its requests waited
            raise SwitchError(f"task {task!r} is not loaded any more.")
        try:
            await self.while_alive(self.engine.pause_generation(mode="wait", clear_cache=False))
        except Exception as error:
            text = f"the engine does not pause ({error}): restart the server."
            raise BrokenError(ENDED if self.engine.errored else text) from None
        errors = await self._call("zflora_use", task)
        if errors and await self._call("zflora_use", self.gate.task):
            raise RuntimeError(errors[0])
        await self.while_alive(self.engine.resume_generation())
        if errors:
            raise SwitchError(f"task {task!r} could not be written: {errors[0]}")

    def gated(self, scope: MutableMapping[str, Any]) -> bool:
        """True if vLLM answers a request with a model."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return False
        there = any(route.matches(scope)[0] == Match.FULL for route in self.routes)
        return there and not path_of(scope).startswith(f"{ROUTES}/")

    def task_of(self, body: Mapping[str, Any]) -> tuple[str, str | None]:
        """The task of a request, and the name of the model that vLLM knows."""
        if body.get("background"):
            raise RefusedError(400, "background=true is not served: leave it out.")
        model = str(body.get("model"))
        names = [name for name in self.names if model.startswith(f"{name}:")]
        if model in self.names or not names:
            return OWN, body.get("model")
        name = max(names, key=len)
        return self._known(model[len(name) + 1 :] or ":"), name

    def salted(self, body: Mapping[str, Any], task: str) -> str | None:
        """The salt that prevents the use of another task's cached prefix."""
        given = body.get("cache_salt")
        if task == OWN and given is None:
            return None
        return hashlib.sha256(f"{self.known.get(task, OWN)}:{given}".encode()).hexdigest()


def path_of(scope: MutableMapping[str, Any]) -> str:
    return str(scope["path"].removeprefix(scope.get("root_path", "")))


async def entered(gate: Gate, task: str, gone: asyncio.Future[Any]) -> bool:
    """True when a request of a task may run; False if its client left while it waited."""
    enter = asyncio.ensure_future(gate.enter(task))
    try:
        await asyncio.wait([enter, gone], return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        if enter.done() and not enter.cancelled() and enter.exception() is None:
            gate.leave()
        enter.cancel()
        raise
    if enter.done():
        await enter
        return True
    enter.cancel()
    return False


class Gated:
    """ASGI middleware: a request of the model runs while its task's weights are active."""

    def __init__(self, app: Any, plugin: Plugin) -> None:
        self.app, self.plugin = app, plugin

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if not self.plugin.gated(scope):
            await self.app(scope, receive, send)
            return
        chunks, more = [], True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        gone, sent = asyncio.ensure_future(receive()), []  # type: ignore[arg-type]

        async def sending(message: MutableMapping[str, Any]) -> None:
            if not gone.done():
                sent.append(message["type"])
                await send(message)

        try:
            await self._run(scope, b"".join(chunks), gone, sending)
        except (RefusedError, SwitchError, BrokenError) as error:
            if not sent:  # else the server closes the connection, as the answer is not whole
                await failed(error)(scope, receive, send)
        finally:
            gone.cancel()

    async def _run(self, scope: dict[str, Any], data: bytes, gone: Any, send: Send) -> None:
        """Answers a request with this body. gone: Done when its client has left."""
        plugin, task, path = self.plugin, OWN, path_of(scope)
        free, body = FREE.fullmatch(path), None
        if REFUSED.fullmatch(path):
            raise RefusedError(400, f"{path} is not served together with tasks.")
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(data)
        if isinstance(body, dict):
            task, _ = plugin.task_of(body)
        if not free and not await entered(plugin.gate, task, gone):
            return
        made = asyncio.ensure_future(self._answer(scope, data, body, gone, send))
        if not free:  # it leaves the gate when it ends, even if this call is cancelled before
            made.add_done_callback(lambda _: plugin.gate.leave())
        try:
            await plugin.while_alive(asyncio.shield(made))
        except BrokenError:
            made.cancel()
            raise

    async def _answer(
        self, scope: dict[str, Any], data: bytes, body: Any, gone: Any, send: Send
    ) -> None:
        """Lets vLLM answer a request under the name and with the salt of its task."""
        if isinstance(body, dict):
            task, model = self.plugin.task_of(body)  # it may have been unloaded by now
            body |= {"model": model} if task else {}
            if not FREE.fullmatch(path_of(scope)) and (salt := self.plugin.salted(body, task)):
                body["cache_salt"] = salt
            data = json.dumps(body).encode()
        first = [{"type": "http.request", "body": data, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            if not first:
                await asyncio.wait([gone])
            return first.pop() if first else {"type": "http.disconnect"}

        length = [(b"content-length", str(len(data)).encode())]
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        await self.app({**scope, "headers": headers + length}, again, send)


def failed(error: Exception) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    status = 503 if isinstance(error, SwitchError | BrokenError) else 400
    status = getattr(error, "status", status)
    fields = {"message": str(error), "type": type(error).__name__, "param": None, "code": status}
    return JSONResponse({"error": fields}, status)


def answered(handler: Callable[[Request], Awaitable[dict[str, Any]]]) -> Any:
    """A route that answers with JSON, or with an error."""

    async def route(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await handler(request))
        except (RefusedError, SlicesError, SwitchError, BrokenError) as error:
            return failed(error)

    return route
