"""Runs a LiteRT file on the CPU, as the package ai-edge-litert brings the runtime."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MASKED = float(np.finfo(np.float32).min)  # added to the scores of what a token does not see
_TFLITE, _PART = 3, "tf_lite_prefill_decode"  # of a .litertlm file: kind of data, name of the part


class LiteRTModel:
    """A model with the signatures prefill_N and decode, and its cache of keys and values.

    A prompt is read in pieces of N tokens, but its last token is taken by decode, which alone gives
    logits. Each call reads one set of cache buffers and writes another one.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        """Args:
        path: a *.tflite or *.litertlm file.
        threads: that compute.
        """
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import CpuOptions, Options

        options = Options(
            hardware_accelerators=HardwareAccelerator.CPU,
            cpu_options=CpuOptions(num_threads=threads),
        )
        with _quiet():
            if Path(path).suffix == ".litertlm":
                self._model = CompiledModel.from_buffer(_part(Path(path)), options=options)
            else:
                self._model = CompiledModel.from_file(os.fspath(path), options=options)
            self._make_buffers()
            self.clear()

    def _make_buffers(self) -> None:
        signatures = self._model.get_signature_list()
        [self._prefill] = [name for name in signatures if name.startswith("prefill")]
        self.piece = self._shapes(self._prefill)["tokens"][-1]
        shapes = self._shapes("decode")
        self.context = shapes["mask"][-1]
        self.vocab = self._model.get_output_tensor_details("decode")["logits"]["shape"][-1]
        caches = [name for name in shapes if name.startswith("kv_cache")]
        self._cache_sizes = {name: int(np.prod(shapes[name])) for name in caches}
        make_in, make_out = (
            self._model.create_input_buffer_by_name,
            self._model.create_output_buffer_by_name,
        )
        self._full = {name: make_in("decode", name) for name in caches}
        self._free = {name: make_out("decode", name) for name in caches}
        self._inputs = {
            (signature, name): make_in(signature, name)
            for signature in (self._prefill, "decode")
            for name in ("tokens", "input_pos", "mask")
        }
        self._logits = make_out("decode", "logits")

    def _shapes(self, signature: str) -> dict[str, tuple[int, ...]]:
        details = self._model.get_input_tensor_details(signature)
        return {name: tuple(found["shape"]) for name, found in details.items()}

    def clear(self) -> None:
        """Forget all tokens."""
        for name, size in self._cache_sizes.items():
            self._full[name].write(np.zeros(size, np.float32))

    def read(self, ids: list[int], start: int = 0) -> None:
        """Take tokens into the cache, the first at position `start`; there are no logits."""
        for at in range(0, len(ids), self.piece):
            piece = ids[at : at + self.piece]
            if start + at + self.piece > self.context:  # a whole piece would not fit
                for i, token in enumerate(piece):
                    self.step(token, start + at + i)
                continue
            # What fills the piece is written behind its tokens, and overwritten by later ones.
            tokens = np.zeros(self.piece, np.int32)
            tokens[: len(piece)] = piece
            self._run(self._prefill, tokens, start + at, {})

    def step(self, token: int, position: int) -> np.ndarray:
        """Take one token into the cache; returns the logits [V] that follow it."""
        self._run("decode", np.array([token], np.int32), position, {"logits": self._logits})
        return self._logits.read(self.vocab, np.float32)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [T, V] after each of T tokens."""
        self.clear()
        return np.stack([self.step(token, i).copy() for i, token in enumerate(ids)])

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The likeliest tokens after a prompt."""
        self.clear()
        self.read(prompt[:-1])
        found = [prompt[-1]]
        for i in range(new_tokens):
            found.append(int(self.step(found[-1], len(prompt) - 1 + i).argmax()))
        return found[1:]

    def _run(self, signature: str, tokens: np.ndarray, start: int, more: dict[str, Any]) -> None:
        places = np.arange(start, start + len(tokens), dtype=np.int32)
        if places[-1] >= self.context:
            raise ValueError(f"position {places[-1]}: the cache holds {self.context} tokens.")
        mask = np.where(np.arange(self.context) <= places[:, None], 0.0, MASKED)
        values = {"tokens": tokens, "input_pos": places, "mask": mask.astype(np.float32).ravel()}
        for name, value in values.items():
            self._inputs[signature, name].write(value)
        inputs = self._full | {name: self._inputs[signature, name] for name in values}
        self._model.run_by_name(signature, inputs, self._free | more)
        self._full, self._free = self._free, self._full


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the library writes to standard error, which is about accelerators that are not
    there; show it if the block fails.
    """
    own = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(own, held.read())
            raise
        finally:
            os.dup2(own, 2)
            os.close(own)


def _part(path: Path) -> bytes:
    """The model in a *.litertlm file."""
    from litert_lm_builder import litertlm_peek

    sections = litertlm_peek.read_litertlm_header(str(path), io.StringIO()).SectionMetadata()
    for i in range(sections.ObjectsLength()):
        one = sections.Objects(i)
        if one.DataType() == _TFLITE and litertlm_peek.get_model_type(one) == _PART:
            with path.open("rb") as file:
                file.seek(one.BeginOffset())
                return file.read(one.EndOffset() - one.BeginOffset())
    raise ValueError(f"{path} holds no model of the kind {_PART}.")
