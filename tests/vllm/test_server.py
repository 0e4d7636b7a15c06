"""The routes and the gate of tasks, as ASGI, before an engine that is none."""

import asyncio
import json
import types
from functools import partial

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from support.models import tiny_model
from support.serving import Rank, save_tasks, weights

import zflora_jax as zf
from zflora_vllm.server import Plugin


class Engine:
    """Two ranks, and requests that say whose weights they saw."""

    def __init__(self, monkeypatch, folder):
        monkeypatch.setenv("ZFLORA_TASKS", str(folder))
        self.ranks = [Rank(folder / "own", rank) for rank in range(2)]
        self.wanted = {
            task: [weights(folder / task, rank) for rank in range(2)] for task in ("own", "a", "b")
        }
        self.fails, self.errored, self.pauses, self.seen = [], False, 0, []
        self.app, self.plugin = FastAPI(), Plugin()
        for path in ("/v1/completions", "/tokenize", "/sleep"):
            self.app.add_api_route(path, self.complete, methods=["POST"])
        self.plugin.attach_router(self.app)
        args = types.SimpleNamespace(served_model_name=["m", "m:large"], model=str(folder / "own"))
        args.worker_extension_cls = "zflora_vllm.worker.Tasks"
        asyncio.run(self.plugin.init_state(self, None, args))

    @property
    def task(self):
        """The task whose weights all ranks have."""
        for task, ranks in self.wanted.items():
            pairs = zip(self.ranks, ranks, strict=True)
            if all(torch.equal(r.weights[n], x) for r, of in pairs for n, x in of.items()):
                return task
        return "another"

    async def complete(self, request: Request):
        body, by = await request.json(), self.task
        self.seen.append(by)
        await asyncio.sleep(body.get("seconds", 0))
        assert self.task == by
        return JSONResponse({"model": body["model"], "salt": body.get("cache_salt"), "by": by})

    async def collective_rpc(self, method, args=()):
        if method == "zflora_use" and args[0] in self.fails:
            return ["", "no memory"]
        return [getattr(rank, method)(*args) for rank in self.ranks]

    async def pause_generation(self, mode, clear_cache):
        assert (mode, clear_cache) == ("wait", False)
        self.pauses += 1
        while self.errored:
            await asyncio.sleep(9)

    async def resume_generation(self):
        pass

    async def ask(self, method, path, body=None, leaves=None, root=""):
        """(status, JSON) of an answer. leaves: after how many seconds the client does."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        scope = {"type": "http", "method": method, "path": path, "root_path": root}
        headers = [(b"content-length", b"%d" % len(data))]
        scope |= {"query_string": b"", "headers": headers, "app": self.app}
        sent, given, asked = [], [{"type": "http.request", "body": data}], asyncio.current_task()

        async def receive():
            if given:
                return given.pop()
            await asyncio.sleep(9 if leaves is None else leaves)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            self.seen += ["late"] * asked.done()

        await self.app(scope, receive, send)
        said = b"".join(m.get("body", b"") for m in sent[1:])
        return (sent[0]["status"], json.loads(said)) if sent else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, base = tmp_path_factory.mktemp("tasks"), tiny_model()
    wide, narrow = (zf.AdapterConfig("zflora-minimal", rank=r, extra_mlp_units=4) for r in (4, 3))
    save_tasks(made, wide, base, own=0.05, a=0.1, b=0.2)
    save_tasks(made, narrow, base, narrow=0.1)
    save_tasks(made, wide, base, eps_z=0.5, other=0.1)
    return made


@pytest.fixture
def engine(monkeypatch, folder):
    return Engine(monkeypatch, folder)


def test_requests_reach_the_engine_with_their_own_task(engine):
    async def play():
        ask = engine.ask
        models = ["m", "m:a", "m:b", "m:base", "m:large", "m:large:a"] * 2
        asked = [{"model": m, "seconds": 0.002 * (i % 3)} for i, m in enumerate(models)]
        found = await asyncio.gather(*(ask("POST", "/v1/completions", x) for x in asked))
        seen = {"m:base": "another", "m:a": "a", "m:b": "b", "m:large:a": "a"}
        salts = {}
        for model, (status, said) in zip(models, found, strict=True):
            assert (status, said["by"]) == (200, seen.get(model, "own"))
            assert said["model"] == ("m:large" if "large" in model else "m")
            salts.setdefault(said["by"], set()).add(said["salt"])
        assert salts["own"] == {None} and all(len(of) == 1 for of in salts.values())
        for task in ("m", "m:a"):  # a client's own salt is another one in each task
            body = {"model": task, "cache_salt": "mine"}
            salts[task] = {(await ask("POST", "/v1/completions", body))[1]["salt"]}
        assert len(set().union(*salts.values())) == 6
        for body, status, words in (
            ({"model": "m:c"}, 404, "no task 'c' is loaded; loaded are a, base, b, own"),
            ({"model": "m", "background": True}, 400, "background=true is not served"),
        ):
            found = await ask("POST", "/v1/completions", body)
            assert found[0] == status and words in found[1]["error"]["message"]
        pauses = engine.pauses
        assert (await ask("POST", "/nothing", {"model": "m:b"}))[0] == 404
        assert "/sleep is not served" in (await ask("POST", "/sleep"))[1]["error"]["message"]
        status, said = await ask("POST", "/tokenize", {"model": "m:b"})
        assert (status, said["model"], said["salt"]) == (200, "m", None)
        assert engine.pauses == pauses  # what computes nothing changes nothing
        use = ask("POST", "/api/v1/zflora/use", {"task": "a"}, root="/api")  # behind a proxy
        assert (await asyncio.wait_for(use, 5))[0] == 200

    asyncio.run(play())


def test_a_client_that_leaves_the_queue_and_a_task_that_does_change_nothing(engine):
    async def play():
        gate, ask = engine.plugin.gate, partial(engine.ask, "POST", "/v1/completions")
        runs = asyncio.ensure_future(ask({"model": "m", "seconds": 0.1}))
        await asyncio.sleep(0.02)
        assert await ask({"model": "m:a"}, leaves=0.01) is None
        waits = asyncio.ensure_future(ask({"model": "m:a"}))
        await asyncio.sleep(0)
        assert (await engine.ask("POST", "/v1/zflora/unload", {"task": "a"}))[0] == 200
        assert (await runs)[1]["by"] == "own" and engine.pauses == 0
        assert "is not loaded any more" in (await waits)[1]["error"]["message"]
        assert gate.running == 0
        cut = asyncio.ensure_future(ask({"model": "m:b", "seconds": 0.1}))
        while "b" not in engine.seen:
            await asyncio.sleep(0)
        cut.cancel()  # as a middleware may: the engine goes on, and its task stays until it ends
        await asyncio.wait([cut])
        assert gate.running == 1 and (await ask({"model": "m"}))[1]["by"] == "own"
        assert engine.seen == ["own", "b", "own"] and gate.running == 0

    asyncio.run(play())


def test_a_task_that_cannot_be_written_leaves_the_one_before(engine):
    async def play():
        await engine.ask("POST", "/v1/zflora/use", {"task": "a"})
        engine.fails = ["b"]
        status, said = await engine.ask("POST", "/v1/completions", {"model": "m:b"})
        assert status == 503 and "'b' could not be written: no memory" in said["error"]["message"]
        assert (await engine.ask("POST", "/v1/completions", {"model": "m:a"}))[1]["by"] == "a"
        engine.fails = ["a", "b"]  # nor the one before: nobody is served
        for model in ("m:b", "m:a", "m"):
            status, said = await engine.ask("POST", "/v1/completions", {"model": model})
            assert status == 503 and "may be half written" in said["error"]["message"]
        assert "half written" in (await engine.ask("GET", "/v1/zflora/tasks"))[1]["broken"]

    asyncio.run(play())


def test_an_engine_that_ends_holds_no_request(engine):
    async def play():
        bodies = {"model": "m", "seconds": 30}, {"model": "m:a"}  # it waits for the first
        asked = asyncio.gather(*(engine.ask("POST", "/v1/completions", body) for body in bodies))
        await asyncio.sleep(0.02)
        engine.errored = True  # and answers nothing, as vLLM may after SIGTERM
        for status, said in await asyncio.wait_for(asked, 5):
            assert status == 503 and said["error"]["message"].startswith("the engine has ended")

    asyncio.run(play())


def test_tasks_are_loaded_and_unloaded_from_one_folder(engine, folder, monkeypatch):
    async def play():
        ask, engine.plugin.known["narrow"] = engine.ask, "kept, if its file has become a wrong one"
        for task, status, words in (
            ("../a", 400, "is no name of a task"),
            ("base", 400, "not 'base', which is the base"),
            ("c", 404, "c.safetensors cannot be read from ZFLORA_TASKS: No such file"),
            ("narrow", 400, "has widths {'hidden_size': 67"),  # stored as wide as rank 4
            ("other", 400, r"has eps_z 0.5, and"),
        ):
            found = await ask("POST", "/v1/zflora/load", {"task": task})
            assert found[0] == status and words in found[1]["error"]["message"], found
        for name in ("a", "narrow"):
            data = (folder / f"{name}.safetensors").read_bytes()
            found = await ask("PUT", "/v1/zflora/slices/c", data[: -3 if name == "a" else None])
            assert found[0] == 400 and not [*folder.glob("c.*"), *folder.glob("*.part")]
        await ask("POST", "/v1/zflora/load", {"task": "a"})
        await ask("POST", "/v1/zflora/use", {"task": "a"})
        assert engine.task == "a"
        waits = asyncio.ensure_future(ask("POST", "/v1/zflora/unload", {"task": "a"}))
        assert (await waits)[0] == 200 and engine.task == "own"
        found = await ask("POST", "/v1/completions", {"model": "m:a"})
        assert found[0] == 404 and "loaded are base, b, own, narrow" in found[1]["error"]["message"]
        engine.ranks[1].weights["model.layers.1.mlp.down_proj"].resize_(0)  # as where vLLM packs
        found = await ask("POST", "/v1/zflora/load", {"task": "b"})
        assert found[0] == 400 and "--quantization zflora" in found[1]["error"]["message"]

    asyncio.run(play())
    path = folder / "a.safetensors"
    assert "a.safetensors has changed" in engine.ranks[0].zflora_load("a", str(path), "another")
    for option, value, words in (
        ("api_server_count", 2, "--api-server-count 2: the gate"),
        ("data_parallel_size", 2, "--data-parallel-size 2: the gate"),
        ("worker_extension_cls", "", "add --worker-extension-cls zflora_vllm.worker.Tasks"),
    ):
        args = types.SimpleNamespace(served_model_name=["m"], model="x", **{option: value})
        with pytest.raises(ValueError, match=words):
            asyncio.run(Plugin().init_state(engine, None, args))
    monkeypatch.setattr("zflora_vllm.server.os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(engine.ask("PUT", "/v1/zflora/slices/c", path.read_bytes()))
    assert not [*folder.glob("c.*"), *folder.glob("*.part")]
