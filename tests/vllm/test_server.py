"""The routes and the gate of tasks, as ASGI, before an engine that is none."""

import asyncio
import http.server
import json
import threading
import types

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from support.exports import perturbed_adapters
from support.models import tiny_model

import zflora_jax as zf
from zflora_jax.cli.main import main
from zflora_vllm.server import Plugin


class Engine:
    """Ranks that take tasks, and requests that say whose weights they saw."""

    def __init__(self, monkeypatch, folder):
        monkeypatch.setenv("ZFLORA_TASKS", str(folder))
        self.task, self.calls, self.fails, self.errored = "", [], [], False
        self.app, self.plugin = FastAPI(), Plugin()
        self.app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        self.plugin.attach_router(self.app)
        args = types.SimpleNamespace(api_server_count=1, served_model_name=["m"], model="x")
        asyncio.run(self.plugin.init_state(self, None, args))

    async def complete(self, request: Request):
        body = await request.json()
        await asyncio.sleep(body.get("seconds", 0))
        return JSONResponse(
            {"model": body["model"], "salt": body.get("cache_salt"), "by": self.task}
        )

    async def collective_rpc(self, method, args=()):
        self.calls.append((method, *args))
        if method == "zflora_use" and args[0] in self.fails:
            self.task = "half"
            return ["", "no memory"]
        if method == "zflora_use":
            self.task = args[0]
        return ["", ""]

    async def pause_generation(self, mode, clear_cache):
        assert (mode, clear_cache) == ("wait", False)
        while self.errored:
            await asyncio.sleep(9)

    async def resume_generation(self):
        pass

    async def ask(self, method, path, body=None):
        """(status, JSON) of an answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        scope = {"type": "http", "method": method, "path": path, "query_string": b""}
        scope |= {"headers": [(b"content-length", str(len(data)).encode())], "app": self.app}
        sent, given = [], [{"type": "http.request", "body": data}]

        async def receive():
            return given.pop() if given else await asyncio.sleep(9)

        async def send(message):
            sent.append(message)

        await self.app(scope, receive, send)
        return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))

    def load(self, *tasks):
        for task in tasks:
            assert asyncio.run(self.ask("POST", "/v1/zflora/load", {"task": task}))[0] == 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, base = tmp_path_factory.mktemp("tasks"), tiny_model()
    adapter = zf.AdapterConfig("zflora-minimal", rank=4)
    for task, std in (("a", 0.1), ("b", 0.2)):
        fused = zf.fuse(base, adapter, perturbed_adapters(base, adapter, std))
        zf.save_slices(made / f"{task}.safetensors", fused, eps_z=0.25)
    return made


@pytest.fixture
def engine(monkeypatch, folder):
    return Engine(monkeypatch, folder)


def test_requests_reach_the_engine_with_their_own_task(engine):
    engine.load("a", "b")

    async def play():
        models = ["m", "m:a", "m:b", "m:base"] * 3
        asked = [{"model": m, "seconds": 0.002 * (i % 3)} for i, m in enumerate(models)]
        found = await asyncio.gather(*(engine.ask("POST", "/v1/completions", x) for x in asked))
        for model, (status, said) in zip(models, found, strict=True):
            task = model.partition(":")[2]
            assert (status, said["model"], said["by"]) == (200, "m", task)
            assert said["salt"] == (engine.plugin.known[task] if task else None)
        salted = {"model": "m:a", "cache_salt": "mine"}
        _, said = await engine.ask("POST", "/v1/completions", salted)
        assert said["salt"] == f"{engine.plugin.known['a']}:mine"
        for body, status, words in (
            ({"model": "m:c"}, 404, "no task 'c' is loaded; loaded are a, base, b"),
            ({"model": "m:a", "background": True}, 400, "in the background"),
        ):
            found = await engine.ask("POST", "/v1/completions", body)
            assert found[0] == status and words in found[1]["error"]["message"]

    asyncio.run(play())


def test_a_task_that_cannot_be_written_leaves_the_one_before(engine):
    engine.load("a", "b")

    async def play():
        await engine.ask("POST", "/v1/zflora/use", {"task": "a"})
        engine.fails = ["b"]
        status, said = await engine.ask("POST", "/v1/completions", {"model": "m:b"})
        assert status == 503 and "'b' could not be written: no memory" in said["error"]["message"]
        assert (await engine.ask("POST", "/v1/completions", {"model": "m:a"}))[1]["by"] == "a"
        engine.fails = ["a", "b"]  # nor the one before: nobody is served
        for model in ("m:b", "m:a", "m"):
            status, said = await engine.ask("POST", "/v1/completions", {"model": model})
            assert status == 503 and "half written" in said["error"]["message"]
        assert "half written" in (await engine.ask("GET", "/v1/zflora/tasks"))[1]["broken"]

    asyncio.run(play())


def test_an_engine_that_ends_in_a_change_holds_no_request(engine):
    engine.load("a")
    engine.errored = True

    async def play():
        asked = engine.ask("POST", "/v1/completions", {"model": "m:a"})
        assert (await asyncio.wait_for(asked, 5))[0] == 503

    asyncio.run(play())


def test_tasks_are_loaded_and_unloaded_from_one_folder(engine, folder):
    async def play():
        ask = engine.ask
        for task, status, words in (
            ("../a", 400, "is no name of a task"),
            ("c", 404, "c.safetensors is not in ZFLORA_TASKS"),
        ):
            found = await ask("POST", "/v1/zflora/load", {"task": task})
            assert found[0] == status and words in found[1]["error"]["message"]
        found = await ask(
            "PUT", "/v1/zflora/slices/c", (folder / "a.safetensors").read_bytes()[:-3]
        )
        assert found[0] == 400 and [p.name for p in folder.iterdir()].count("c.safetensors") == 0
        assert not [*folder.glob("*.part")]
        await ask("POST", "/v1/zflora/load", {"task": "a"})
        found = await ask("POST", "/v1/zflora/load", {"task": "a"})
        assert found[0] == 409 and "unload it first" in found[1]["error"]["message"]
        await ask("POST", "/v1/zflora/use", {"task": "a"})
        await ask("POST", "/v1/zflora/unload", {"task": "a"})
        assert engine.task == "" and engine.calls[-2:] == [
            ("zflora_use", ""),
            ("zflora_unload", "a"),
        ]
        assert (await ask("POST", "/v1/completions", {"model": "m:a"}))[0] == 404

    asyncio.run(play())
    args = types.SimpleNamespace(api_server_count=2, served_model_name=["m"], model="x")
    with pytest.raises(ValueError, match="--api-server-count 2: the gate"):
        asyncio.run(Plugin().init_state(engine, None, args))


def test_push_sends_slices_to_a_server(engine, folder, tmp_path, capsys):
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, said = asyncio.run(engine.ask(self.command, self.path, data))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        do_GET = do_PUT = do_POST = answer

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for _ in range(2):  # the second replaces it
            words = ["push", str(folder / "a.safetensors"), "--server", url, "--task", "new"]
            assert main(words) == 0 and "use model NAME:new" in capsys.readouterr().out
        assert (folder / "new.safetensors").read_bytes() == (folder / "a.safetensors").read_bytes()
        (tmp_path / "x.safetensors").write_bytes(b"x")
        assert main(["push", str(tmp_path / "x.safetensors"), "--server", url]) == 2
        assert "x.safetensors holds no slices" in capsys.readouterr().err
    finally:
        server.shutdown()
        server.server_close()
    assert main(["push", str(folder / "a.safetensors"), "--server", url]) == 2
    assert "cannot be asked" in capsys.readouterr().err
