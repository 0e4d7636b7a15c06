"""Reads the text of a compiled program: its operations, copies, cycles and collectives.

The text is XLA's optimized HLO, `compiled.as_text()`. Loops count as often as they run, if the
compiler knows it. Cycles are the TPU compiler's estimates.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

BETWEEN_SLICES = "between slices"

# Operations that run no kernel.
_FREE = (
    *("get-tuple-element", "constant", "bitcast", "tuple", "parameter", "after-all", "while"),
    *("conditional", "call", "partition-id"),
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\S.*)$")
_CODE = re.compile(r" ([\w\-]+)\(")
_ARRAY = re.compile(r"((?:pred|bf\d|[sufc]\d)\w*)\[([\d,]*)\]")  # a token is none
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[([^\]]*)\](?:, device_ids=\(.*?\))?"
    r" \{([^}]*)\})"
)
_CALLED = re.compile(
    r"(?:body|to_apply|calls|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)"
)


@dataclass(frozen=True)
class Op:
    """One operation of a computation.

    Attributes:
      name: Its name.
      code: Its opcode: "fusion", "copy", ...
      shape: Shape of its result, as text.
      line: Its whole text.
    """

    name: str
    code: str
    shape: str
    line: str

    @property
    def elements(self) -> int:
        """Number of elements of the largest array of its result."""
        return max((math.prod(dims) for _, dims in _arrays(self.shape)), default=0)

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 without one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(found[1]) if found else 0

    @property
    def is_async(self) -> bool:
        """Whether it starts or ends a copy in the background, or names the copy's result."""
        return self.code.endswith(("-start", "-done")) or '"ConcatBitcast"' in self.line


class Program:
    """The computations of a compiled program.

    Attributes:
      computations: Name -> its operations, in the order in which they run.
      entry: Name of the first computation.
      devices: Number of devices that the program runs on.
    """

    def __init__(self, text: str) -> None:
        partitions = re.search(r"num_partitions=(\d+)", text[:10000])
        self.devices = int(partitions[1]) if partitions else 1
        self.computations: dict[str, list[Op]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self.entry = name if header[1] else self.entry
                self.computations[name] = []
            elif line.rstrip() == "}":  # attributes of a kernel may go over several lines
                name = ""
            elif name and (found := _OP.match(line)):
                shape = _first_shape(found[2])
                if code := _CODE.match(found[2], len(shape)):
                    self.computations[name].append(Op(found[1], code[1], shape, line))

    def loop(self, called: str) -> list[Op]:
        """Returns the body of the loop whose source path ends with `called`, such as
        "decode_until)/while".

        Raises:
          ValueError: there is no such loop.
        """
        for ops in self.computations.values():
            for op in ops:
                path = re.search(r'op_name="([^"]*)"', op.line)
                if op.code == "while" and path and path[1].endswith(called):
                    body = re.search(r"body=%?([\w.\-]+)", op.line)
                    assert body is not None
                    return self.computations[body[1]]
        raise ValueError(f"the program has no loop {called!r}.")

    def runs(self, *, fused: bool = False) -> Iterator[tuple[Op, int]]:
        """Yields every operation that runs, and how often.

        Args:
          fused: Whether to include the operations inside fusions.
        """
        enters = ("while", "conditional", "call", *(["fusion", "async-start"] if fused else []))
        pending = [(self.entry, 1)]
        while pending:
            name, times = pending.pop()
            for op in self.computations.get(name, []):
                yield op, times
                if op.code not in enters:
                    continue
                called = _CALLED.findall(op.line)
                if branches := re.search(r"branch_computations=\{([^}]*)\}", op.line):
                    called = re.findall(r"%([\w.\-]+)", branches[1])
                if op.code == "conditional":  # the longest branch counts
                    called = [max(called, key=lambda name: len(self.computations.get(name, [])))]
                inner = times * self._trips(op)
                pending += [(callee, inner) for callee in called]

    def collectives(self) -> dict[str, int]:
        """Returns type -> bytes that one device sends per run, if each collective is a ring.

        A TPU's compiler spreads a collective over several fusions, which share its channel: it
        counts once, as often as the least frequent of them runs. Transfers between slices of TPUs
        go through the host: `BETWEEN_SLICES`.
        """
        found: dict[tuple[str, str], int] = {}
        for op, times in self.runs(fused=True):
            kind = op.code.removesuffix("-start")
            if op.code == "send" and "transfer_type=" in op.line:
                kind = BETWEEN_SLICES
            if kind in (*COLLECTIVES, BETWEEN_SLICES):
                channel = re.search(r"channel_id=(\d+)", op.line)
                key = kind, channel[1] if channel else op.name
                sent = times * self._sent(kind, op)
                found[key] = min(found.get(key, sent), sent)
        total: collections.Counter[str] = collections.Counter()
        for (kind, _), sent in found.items():
            total[kind] += sent
        return dict(total)

    def whole_copies(
        self,
        ops: Collection[Op],
        parameters: Collection[tuple[int, ...]],
        caches: Collection[tuple[int, ...]],
    ) -> list[Op]:
        """Returns the operations that rewrite a whole kernel, table or cache.

        Args:
          ops: Operations of this program.
          parameters: Shapes of kernels and tables. An operation that writes as many elements as the
            smallest of them is a copy, because the activations of a loop are smaller.
          caches: Shapes of the cache's arrays, or others. An operation that writes an array of
            these dimensions, in any order, is a copy, unless it updates a part in place.
        """
        smallest = min(map(math.prod, parameters), default=math.inf)
        like_caches = {_dims(shape) for shape in caches}

        def whole(op: Op) -> bool:
            arrays = (_dims(shape) for _, shape in _arrays(op.shape))
            return op.elements >= smallest or any(dims in like_caches for dims in arrays)

        return [op for op in kernels(ops) if whole(op) and not self._updates(op)]

    def _updates(self, op: Op) -> bool:
        """Whether it updates a part of its result in place: an update, or a fusion of one."""
        if op.code == "dynamic-update-slice":
            return True
        if op.code != "fusion":
            return False
        inside = (o for name in _CALLED.findall(op.line) for o in self.computations.get(name, []))
        return any(o.code == "dynamic-update-slice" and o.elements == op.elements for o in inside)

    def _sent(self, kind: str, op: Op) -> int:
        """Bytes that each device sends in a ring of the collective's devices."""
        size = _result_bytes(op)
        if kind in ("collective-permute", BETWEEN_SLICES):
            return size
        members = _members(op.line, self.devices)
        per_byte = {
            "all-gather": (members - 1) / members,
            "reduce-scatter": members - 1,
            "all-reduce": 2 * (members - 1) / members,
            "all-to-all": (members - 1) / members,
        }
        return int(per_byte[kind] * size)

    def _trips(self, op: Op) -> int:
        """How often a loop's body runs, by the compiler's statement or the limit in its condition;
        1 for other operations, or if neither is known.
        """
        if op.code != "while":
            return 1
        if known := re.search(r"known_trip_count[^\d]*(\d+)", op.line):
            return int(known[1])
        condition, body = (
            {o.name: o for o in self.computations.get(found[1], [])} if found else {}
            for found in (
                re.search(rf"{part}=%?([\w.\-]+)", op.line) for part in ("condition", "body")
            )
        )
        limits = [n for o in condition.values() if (n := _constant(o)) is not None]
        counters = [o for o in condition.values() if o.code == "get-tuple-element"]
        if len(limits) != 1 or len(counters) != 1 or not body:
            return 1
        index = re.search(r"index=(\d+)", counters[0].line)
        results = re.findall(r"%([\w.\-]+)", list(body.values())[-1].line.split(" tuple(")[-1])
        count = body.get(results[int(index[1])]) if index and len(results) > int(index[1]) else None
        steps = [
            n
            for name in re.findall(r"%([\w.\-]+)", count.line.split(" add(")[-1] if count else "")
            if name in body and (n := _constant(body[name])) is not None
        ]
        return limits[0] // max(steps[0], 1) if steps else limits[0]


def kernels(ops: Collection[Op]) -> list[Op]:
    """Returns the operations that run a kernel or, on a TPU, a bundle of instructions; copies that
    the compiler starts ahead in the background are left out.
    """
    return [op for op in ops if op.code not in _FREE and not op.is_async]


def async_bytes(ops: Collection[Op]) -> int:
    """Returns the bytes of the copies in the background."""
    return sum(_bytes(_arrays(op.shape)) for op in ops if op.code in ("copy-done", "slice-done"))


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions in order of size, without those of 1."""
    return tuple(sorted(n for n in shape if n > 1))


def _constant(op: Op) -> int | None:
    """The value of an integer constant, None of another operation."""
    found = re.search(r" constant\((\d+)\)", op.line)
    return int(found[1]) if found else None


def _first_shape(text: str) -> str:
    """The shape at the start of `text`: a word, or a tuple up to its closing bracket."""
    if not text.startswith("("):
        return text.split(" ", 1)[0]
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: at + 1]
    return text


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of each array in a shape's text."""
    return [
        (dtype, tuple(map(int, dims.split(","))) if dims else ())
        for dtype, dims in _ARRAY.findall(shape)
    ]


def _bytes(arrays: list[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of arrays; the first number in a dtype's name, as in f8e4m3fn or s4, is its bits."""
    bits = {name: int((re.search(r"\d+", name) or "8")[0]) for name, _ in arrays}
    return sum(math.prod(dims) * bits[name] for name, dims in arrays) // 8


def _result_bytes(op: Op) -> int:
    """Bytes of a collective's result; an operation that starts one names its operands, too."""
    arrays = [array for array in _arrays(op.shape) if array[1]]
    if op.code == "send":  # its operand, and a context without dimensions
        arrays = arrays[:1]
    elif op.code.endswith("-start") and not op.code.startswith("all-reduce"):
        arrays = arrays[len(arrays) // 2 :]
    return _bytes(arrays)


def _members(line: str, devices: int) -> int:
    """Number of devices of a collective, in any of the notations; `devices` without groups."""
    if "replica_groups={}" in line:
        return devices
    found = _GROUPS.search(line)
    if found is None:
        raise ValueError(f"no replica groups: {line[line.find('replica_groups') :][:120]}")
    count, listed, mesh, axes = found.groups()
    if count or listed:
        return int(count) if count else len(listed.split(","))
    sizes = dict(part.replace("'", "").split("=") for part in mesh.split(","))
    return math.prod(int(sizes[axis.strip().strip("'")]) for axis in axes.split(","))
