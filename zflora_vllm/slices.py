"""Slices of a task: read from a file, and cut for the shards of tensor parallel ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load

FORMAT, VERSION = "zflora_jax slices", 1
SAME = ("method", "dtype", "eps_z", "widths", "base")  # facts that tasks of one server share
Lines = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class SlicesError(ValueError):
    """Slices are damaged, or have another base, method, width, dtype or eps_z."""


@dataclass(frozen=True)
class Slices:
    """A task: the rows and columns that its adapter has in every kernel [out, in].

    Attributes:
      facts: Metadata of the file, such as "eps_z" and "sha256".
      rows: Tensor -> the indices of its rows [R] and their values [R, in].
      columns: Tensor -> the indices of its columns [C] and their values [out, C].
    """

    facts: Mapping[str, Any]
    rows: Lines
    columns: Lines

    def idle(self) -> Slices:
        """The task that computes the base: zeros at the same indices."""
        rows, columns = (
            {name: (at, torch.zeros_like(values)) for name, (at, values) in part.items()}
            for part in (self.rows, self.columns)
        )
        return Slices({**self.facts, "sha256": "idle"}, rows, columns)


def read_slices(data: bytes, what: str) -> Slices:
    """Reads the content of a file of `zf.save_slices`.

    Args:
      data: The file's content.
      what: The file's name, for messages.

    Raises:
      SlicesError: The file is damaged, or holds no slices.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header["__metadata__"]["zflora"])
        found = facts["format"], facts["version"]
        if found != (FORMAT, VERSION):
            raise SlicesError(f"{what} is {found}, and {(FORMAT, VERSION)} is read here.")
        tensors = load(data)
        if _digest(tensors, facts) != facts["sha256"]:
            raise SlicesError(f"{what} is damaged: its content does not have the recorded hash.")
        rows, columns = (
            {n: (_indices(at), tensors[f"{n}.{part}"]) for n, at in facts[part].items()}
            for part in ("rows", "columns")
        )
        counts = [len(at) == len(x) for at, x in rows.values()]
        counts += [len(at) == x.shape[1] for at, x in columns.values()]
        counts += [bool((at.diff() > 0).all()) for of in (rows, columns) for at, _ in of.values()]
        kinds = {str(x.dtype) for x in tensors.values()} - {f"torch.{facts['dtype']}"}
        if kinds or not all(counts) or rows.keys() != columns.keys() or set(SAME) - facts.keys():
            raise SlicesError(f"{what} contradicts itself: write it again.")
    except SlicesError:
        raise
    except Exception:  # whatever a damaged file makes the readers raise
        wanted = "give a file of zflora export --format slices."
        raise SlicesError(f"{what} holds no slices, or is damaged: {wanted}") from None
    return Slices(facts, rows, columns)


def _digest(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    """The hash of `zf.save_slices`, over the facts (without the hash) and the tensors."""
    said = {key: value for key, value in facts.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        kind = str(x.dtype).removeprefix("torch.")
        digest.update(f"{name} {tuple(x.shape)} {kind}".encode())
        digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_same(one: Mapping[str, Any], other: Mapping[str, Any], what: str, of: str) -> None:
    """Raises SlicesError with both values if two tasks, or a task and an export, do not match."""
    for key in SAME:
        if one[key] != other[key]:
            advice = " Write all slices with the smallest eps_z of the tasks (zflora export --eps)."
            raise SlicesError(
                f"{what} has {key} {one[key]}, and {of} has {other[key]}."
                + (advice if key == "eps_z" else "")
            )


def _indices(ranges: list[list[int]]) -> torch.Tensor:
    return torch.cat([torch.arange(*part) for part in ranges] or [torch.arange(0)])


# --- shards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The part of a tensor that a layer of a rank holds: some of its rows and columns. The rows are
    at `start` and after it in the layer's weight.
    """

    tensor: str
    rows: range
    columns: range
    start: int = 0


@dataclass(frozen=True)
class Write:
    """Values that replace some rows and columns of a weight [out, in]. Consecutive ones are slices,
    because copies of slices are several times as fast as copies by index.
    """

    place: tuple[slice | torch.Tensor, slice | torch.Tensor]
    values: torch.Tensor

    def into(self, weight: torch.Tensor) -> None:
        """Writes into a weight in place."""
        weight[self.place] = self.values.to(weight.device, weight.dtype)

    def kept(self, weight: torch.Tensor) -> Write:
        """Returns the write that puts the current values back."""
        return Write(self.place, weight[self.place].to("cpu", copy=True))


def writes(slices: Slices, part: Part) -> list[Write]:
    """Returns the writes that put a task into a part of a tensor."""
    at, values = slices.rows[part.tensor]
    here = (at >= part.rows.start) & (at < part.rows.stop)
    columns = slice(part.columns.start, part.columns.stop)
    lines = _place(at[here] - part.rows.start + part.start)
    rows = Write((lines, slice(None)), values[here, columns].contiguous())
    at, values = slices.columns[part.tensor]
    here = (at >= part.columns.start) & (at < part.columns.stop)
    of_part = values[part.rows.start : part.rows.stop, here].contiguous()
    held = slice(part.start, part.start + len(part.rows))
    lines = _place(at[here] - part.columns.start)
    lengths = rows.values.shape[1], len(of_part)
    if lengths != (len(part.columns), len(part.rows)):
        raise SlicesError(f"{part.tensor}: the slices are of lines of other lengths, {lengths}.")
    return [w for w in (rows, Write((held, lines), of_part)) if w.values.numel()]


def _place(lines: torch.Tensor) -> slice | torch.Tensor:
    """Sorted indices, as a slice if they have no gap."""
    first, last = (int(lines[0]), int(lines[-1])) if len(lines) else (0, -1)
    return slice(first, last + 1) if last + 1 - first == len(lines) else lines


def parts(layer: str, sizes: Mapping[str, int], rank: int, ranks: int) -> list[Part]:
    """The parts that one rank holds of a layer's kernel, in the order of its rows.

    Args:
      layer: Name of the layer in vLLM, such as "model.layers.0.self_attn.qkv_proj".
      sizes: "hidden", "mlp", "heads", "kv_heads" and "head_dim" of the export.
      rank: The rank.
      ranks: Number of ranks. If there are fewer key heads, several ranks hold the same one.
    """
    at, _, kind = layer.rpartition(".")
    hidden, k = sizes["hidden"], sizes["head_dim"]

    def share(of: int, count: int = ranks, index: int = rank) -> range:
        if of % count:
            raise SlicesError(f"{layer}: {of} lines are not divided by {count} ranks.")
        return range(index * (of // count), (index + 1) * (of // count))

    if kind in ("o_proj", "down_proj"):
        width = sizes["heads"] * k if kind == "o_proj" else sizes["mlp"]
        return [Part(f"{layer}.weight", range(hidden), share(width))]
    if kind == "gate_up_proj":
        held = {name: share(sizes["mlp"]) for name in ("gate_proj", "up_proj")}
    elif kind == "qkv_proj":
        copies = max(1, ranks // sizes["kv_heads"])
        keys = share(sizes["kv_heads"], ranks // copies, rank // copies)
        heads = {"q_proj": share(sizes["heads"]), "k_proj": keys, "v_proj": keys}
        held = {name: range(of.start * k, of.stop * k) for name, of in heads.items()}
    else:
        raise SlicesError(f"{layer} is no kernel that slices are written into.")
    found, start = [], 0
    for name, rows in held.items():
        found.append(Part(f"{at}.{name}.weight", rows, range(hidden), start))
        start += len(rows)
    return found
