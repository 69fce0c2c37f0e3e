"""Parser of optimized HLO (`compiled.as_text()`): collectives and memory traffic of a program.

Operations in loops are multiplied by the trip count. XLA's own `cost_analysis` counts a loop's body
once, so a model with scanned layers looks as cheap as one layer. Standard library only.
"""

import itertools
import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Opcodes that move no data themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "opt-barrier", "partition-id", "replica-id", "iota", "async-start"),
}
IN_PLACE = "dynamic-update-slice", "scatter"  # write into the buffer of their first operand
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations"
    r"|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


class Instruction(NamedTuple):
    """One line of a program: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        found = [several or one for several, one in CALLED.findall(self.attributes)]
        return tuple(name.lstrip("%") for names in found for name in names.split(", ") if name)


class Collective(NamedTuple):
    """A collective operation, as seen by one device.

    Attributes:
        kind: one of `KINDS`.
        bytes: size of its operands on one device.
        group: mesh positions of the participating devices, for the first group.
        times: executions in one call of the program.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int

    @property
    def wire(self) -> float:
        """Bytes that one device sends per execution with ring algorithms.

        Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication".
        """
        n = len(self.group)
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": n - 1,
            "reduce-scatter": (n - 1) / n,
            "all-to-all": (n - 1) / n,
        }
        return self.bytes * share.get(self.kind, 1)

    def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """The axes of a mesh (`mesh.shape`) along which the devices of the group differ."""
        places = [_place(device, tuple(mesh.values())) for device in self.group]
        return tuple(
            name for name, at in zip(mesh, zip(*places, strict=True), strict=True) if len({*at}) > 1
        )


class Program:
    """A parsed optimized HLO module.

    Args:
        text: the module, from `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry, current = "", []
        for line in text.splitlines():
            if (header := HEADER.match(line)) and " = " not in line.split("(", 1)[0]:
                current = self.computations[header[2]] = []
                entry = header[2] if header[1] else entry
            elif line.startswith(" ") and " = " in line and (instruction := _instruction(line)):
                current.append(instruction)
        self.times: defaultdict[str, int] = defaultdict(int)  # executions of each computation
        self._fused: set[str] = set()
        self._visit(entry, 1, fused=False)

    def _visit(self, name: str, times: int, fused: bool) -> None:
        self.times[name] += times
        if fused:
            self._fused.add(name)
        for instruction in self.computations.get(name, ()):
            loop = instruction.opcode == "while"
            rounds = self._trip_count(instruction) if loop else 1
            inside = fused or instruction.opcode not in ("while", "conditional", "call")
            for called in instruction.called:
                self._visit(called, times * rounds, inside)

    def _trip_count(self, loop: Instruction) -> int:
        """Iterations of a loop that counts from 0 to a constant; 1 if that cannot be determined."""
        if known := re.search(r'known_trip_count":?\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        [condition] = re.findall(r"condition=%?([\w.\-]+)", loop.attributes)
        instructions = {i.name: i for i in self.computations[condition]}
        root = self.computations[condition][-1]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return 1
        end = instructions.get(root.operands[1])
        limit = re.match(r"-?\d+$", end.operands[0]) if end and end.opcode == "constant" else None
        return max(1, int(limit[0])) if limit else 1

    def collectives(self) -> list[Collective]:
        """Every collective, one entry per instruction.

        A collective that the TPU compiler splits to overlap it with compute counts once.
        """
        found, channels = [], set()
        for name, instructions in self.computations.items():
            shapes = {i.name: i.shape for i in instructions}
            for i in instructions:
                kind = i.opcode.removesuffix("-start")
                if kind not in KINDS or not self.times[name]:
                    continue
                channel = re.search(r"channel_id=(\d+)", i.attributes)
                if channel and channel[1] in channels:
                    continue
                channels.add(channel[1] if channel else i.name)
                size = sum(_bytes(shapes.get(o, "")) for o in i.operands)
                found.append(Collective(kind, size, _group(i.attributes), self.times[name]))
        return found

    def executed(self, opcode: str) -> list[tuple[Instruction, int]]:
        """Every instruction of one kind, in fusions too, and how often one call executes it."""
        return [
            (i, self.times[name])
            for name, instructions in self.computations.items()
            for i in instructions
            if i.opcode == opcode and self.times[name]
        ]

    def kernels(self) -> int:
        """Operations of one call outside fusions that move data."""
        return sum(
            self.times[name]
            for name, instructions in self.computations.items()
            for i in instructions
            if name not in self._fused and i.opcode not in FREE
        )

    def traffic(self) -> int:
        """Bytes that one device reads from and writes to main memory in one call.

        Counts operands and results outside fusions; of an array that is only sliced, the slices.
        """
        total = 0
        for name, instructions in self.computations.items():
            if name in self._fused or not self.times[name]:
                continue
            shapes = {i.name: i.shape for i in instructions}
            total += self.times[name] * sum(self._moved(i, shapes) for i in instructions)
        return total

    def _moved(self, i: Instruction, shapes: dict[str, str]) -> int:
        if i.opcode in FREE or i.opcode.endswith("-done"):
            return 0
        given = [_bytes(shapes.get(o, ""), main=True) for o in i.operands]
        result = _bytes(i.shape, main=True)
        match i.opcode:
            case "dynamic-slice" | "slice" | "gather":
                return 2 * result
            case "dynamic-update-slice":
                return 2 * given[1]
            case "scatter":  # in place too: it reads, and writes, what the updates are added to
                return given[1] + 3 * given[2]
            case "fusion" if i.called and i.called[0] in self.computations:
                return self._fusion(self.computations[i.called[0]], given, result)
            case "custom-call" if not any(given):  # allocates a buffer, filled later
                return 0
            case "slice-start":  # to on-chip memory; the tuple repeats the operand
                return _bytes(i.shape) - _bytes(shapes.get(i.operands[0], ""))
        if i.opcode.endswith("-start"):
            return max(result, sum(given))
        return result + sum(given)

    def _fusion(self, body: list[Instruction], given: list[int], result: int) -> int:
        """Bytes read and written by a fusion; its intermediate values stay on chip."""
        users: defaultdict[str, list[Instruction]] = defaultdict(list)
        for i in body:
            for operand in i.operands:
                users[operand].append(i)
        shapes = {i.name: i.shape for i in body}
        made = {i.name: i for i in body}

        def read(name: str) -> int | None:
            """Bytes of the slices that are used; None: the whole array is."""
            total = 0
            for user in users[name]:
                if user.opcode == "bitcast":
                    part = read(user.name)
                elif user.opcode in ("dynamic-slice", "slice", "gather"):
                    part = _bytes(user.shape) if user.operands[0] == name else None
                elif user.opcode in IN_PLACE and user.operands[0] == name:
                    part = 0
                else:
                    part = None
                if part is None:
                    return None
                total += part
            return total

        moved = 0
        for i in body:
            if i.opcode == "parameter" and (at := int(i.operands[0])) < len(given):
                part = read(i.name)
                moved += given[at] if part is None else min(part, given[at])
        root = body[-1]
        while root.opcode in ("bitcast", "convert", "copy") and root.operands[0] in made:
            root = made[root.operands[0]]
        match root.opcode:
            case "dynamic-update-slice":
                result = min(result, _bytes(shapes.get(root.operands[1], "")))
            case "scatter":
                result = min(result, 2 * _bytes(shapes.get(root.operands[2], "")))
        return moved + result


def _instruction(line: str) -> Instruction | None:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    shape, rest = _balanced(rest) if rest.startswith("(") else tuple(rest.split(" ", 1))
    opcode, _, rest = rest.strip().partition("(")
    operands, attributes = _balanced("(" + rest)
    # The "operand" of a constant is its value, of a parameter its number.
    names = re.findall(r"%([\w.\-]+)", operands) or [operands.strip("()")]
    return Instruction(name.lstrip("%"), shape, opcode, tuple(names), attributes)


def _balanced(text: str) -> tuple[str, str]:
    """Split after the parenthesis that matches the first one."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: at + 1], text[at + 1 :]
    return text, ""


def _bytes(shape: str, main: bool = False) -> int:
    """Bytes of an array or a tuple; with `main`, only of the parts in main memory (TPU layouts mark
    other memory spaces as S(1), ...)."""
    total = 0
    for kind, sizes, layout in ARRAY.findall(shape):
        bits = re.search(r"\d+", kind)
        width = 8 if kind == "pred" else int(bits[0]) if bits else 0
        if not (main and re.search(r"S\(\d", layout)):
            total += math.prod(int(n) for n in sizes.split(",") if n) * width // 8
    return total


def _place(device: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Coordinates of a device in a mesh."""
    place = []
    for size in reversed(shape):
        device, at = divmod(device, size)
        place.append(at)
    return tuple(reversed(place))


def _group(attributes: str) -> tuple[int, ...]:
    """First device group of a collective, in any of HLO's notations."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _ring([tuple(map(int, p.split(","))) for p in re.findall(r"\d+,\d+", pairs[1])])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        [shape, source, order] = [_ints(text) for text in iota.groups()]
        return _transposed(source, order or tuple(range(len(source))))[: shape[-1]]
    ids = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"  # if not 0, 1, ...
    if named := re.search(rf"replica_groups=mesh\[(.*?)\]{ids} ?\{{(.*?)\}}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = re.findall(r"'(\w+)'", named[4])
        order = [n for n, name in enumerate(sizes) if name not in inside]
        order += [n for n, name in enumerate(sizes) if name in inside]
        count = math.prod(sizes[name] for name in inside)
        source = _ints(named[2]) or (math.prod(sizes.values()),)
        devices = _transposed(source, _ints(named[3]) or tuple(range(len(source))))
        return tuple(devices[n] for n in _transposed(tuple(sizes.values()), tuple(order))[:count])
    return (0,)


def _ring(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The cycle of devices that a permutation sends the first one's data through."""
    after = {a: b for a, b in pairs}
    seen = [pairs[0][0]] if pairs else [0]
    while (following := after.get(seen[-1])) is not None and following not in seen:
        seen.append(following)
    return tuple(seen)


def _ints(text: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",")) if text else ()


def _transposed(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """`arange(prod(shape)).reshape(shape).transpose(order).ravel()`."""
    strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    places = itertools.product(*(range(shape[n]) for n in order))
    return tuple(sum(i * strides[n] for i, n in zip(place, order, strict=True)) for place in places)
