"""What it costs to grow a language model that is sharded: a model, from counts of bytes, operations and launches.

Nothing is run. The counts are those of `fastmorph.distributed.morph`:

- Each tensor that changes is gathered once, and its successor, which the ranks keep in equal parts, once more, to be cut as the
  child is sharded: of both a rank receives all but its own part. A tensor that stays is copied where it is.
- A first and a second moment follow each changed tensor of a trained parent in the same way, but are cut as they are made.
- The weight of each equation is gathered; both kernels are sent to all and, kept in parts, gathered and cut like any tensor.
- Values are read once and written once at each of these steps. A widened tensor takes so many operators, an equation so many.
- Equations are dealt to the ranks; `Direct.cost` counts the operations of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from fastmorph.equation.bounds import smallest_dense
from fastmorph.equation.frame import make_frame
from fastmorph.equation.solvers.direct import Direct

OPERATORS_A_TENSOR, OPERATORS_AN_EQUATION = 32, 200  # upper bounds, which the tests count
EXCHANGES_A_TENSOR = 4  # in which ranks tell that they are well: two collectives each
_FLOAT64 = 8


class Sizes(NamedTuple):
    """A decoder as Llama's: its width, its feed-forward's, blocks, heads, those of keys and values, a head's size, words."""

    width: int
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head: int
    words: int

    @property
    def parameters(self) -> int:
        """How many it has: untied embeddings, attention, a gated feed-forward, two norms a block and one behind them."""
        attention = self.width * self.head * (2 * self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.width * self.hidden + 2 * self.width
        return 2 * self.words * self.width + self.blocks * block + self.width


# As their configurations have them: Llama 2 7B, Llama 3 70B, Llama 3.1 405B.
NETWORKS = {
    "7B": Sizes(4096, 11008, 32, 32, 32, 128, 32000),
    "70B": Sizes(8192, 28672, 80, 64, 8, 128, 128256),
    "400B": Sizes(16384, 53248, 126, 128, 8, 128, 128256),
}


@dataclass(frozen=True)
class Machine:
    """What a rank can do.

    Attributes:
        ranks: how many there are.
        bandwidth: bytes a second that a rank receives.
        memory_bandwidth: bytes a second that it reads or writes.
        flops: operations a second in a closed form.
        launch: seconds from one operator to the next.
        latency: seconds of a collective of a few bytes, a factor log2(ranks) apart.
        itemsize: bytes of a weight; moments have 4.
        trained: whether an optimizer with two moments comes along.
    """

    ranks: int = 64
    bandwidth: float = 50e9
    memory_bandwidth: float = 2e12
    flops: float = 1e13
    launch: float = 10e-6
    latency: float = 20e-6
    itemsize: int = 2
    trained: bool = True


@dataclass(frozen=True)
class Cost:
    """What a growth takes.

    Attributes:
        parameters: of the parent and of the child.
        received: bytes that a rank gets from others.
        moved: bytes that it reads and writes in its own memory.
        operations: floating-point operations, of the rank with the most.
        launches: operators that a rank launches.
        exchanges: collectives of a few bytes.
        held: bytes, at the peak, of a rank's memory, the parent's shards and moments included.
        seconds: all of it, one behind the other.
    """

    parameters: tuple[int, int]
    received: float
    moved: float
    operations: float
    launches: int
    exchanges: int
    held: float
    seconds: float


def cost_of(sizes: Sizes, machine: Machine, *, factor: float = 1.0, deepen: bool = False) -> Cost:
    """The cost of a feed-forward `factor` times as wide, or of every down projection split into two layers, in each block."""
    width, hidden = sizes.width, sizes.hidden
    if deepen:
        frame = make_frame((), ((), ()))
        middle = -(-smallest_dense(frame, width, hidden) // 8) * 8
        old, new = [width * hidden], [middle * hidden, width * middle]
        chunk_operations = Direct().cost(width, hidden, middle, frame, 0)
        workspace = _FLOAT64 * Direct().memory(width, hidden, middle, frame)
        after = sizes.parameters + sizes.blocks * (sum(new) - sum(old))
    else:
        wider = round(hidden * factor)
        old, new = [width * hidden] * 3, [width * wider] * 3
        chunk_operations, workspace = 0.0, 0
        after = sizes._replace(hidden=wider).parameters
    share, item = (machine.ranks - 1) / machine.ranks, machine.itemsize
    moments = 2 * 4 if machine.trained and not deepen else 0  # of an old weight; new layers start afresh
    sent = item * sum(new) if deepen else 0  # answers, which come whole
    gathered = item * (sum(old) + sum(new)) + moments * sum(old)
    received = sizes.blocks * (share * gathered + share * sent)
    touched = 2 * (gathered + sent) + item * sum(new) + moments * sum(new)
    moved = sizes.blocks * touched + 2 * item * sizes.parameters / machine.ranks
    solved = math.ceil(sizes.blocks / machine.ranks) * chunk_operations
    tensors = (len(old) + len(new)) * sizes.blocks * (3 if moments else 1)
    launches = tensors * OPERATORS_A_TENSOR + math.ceil(sizes.blocks / machine.ranks) * deepen * OPERATORS_AN_EQUATION
    exchanges = 2 * EXCHANGES_A_TENSOR * tensors
    state = item + (8 if machine.trained else 0)
    largest = max(item, 4 if moments else 0) * (max(old) + max(new))
    held = state * (sizes.parameters + after) / machine.ranks + largest + workspace
    seconds = (
        received / machine.bandwidth
        + moved / machine.memory_bandwidth
        + solved / machine.flops
        + launches * machine.launch
        + exchanges * machine.latency * max(1.0, math.log2(machine.ranks))
    )
    return Cost((sizes.parameters, after), received, moved, solved, launches, exchanges, held, seconds)


def table(machine: Machine, factor: float) -> list[tuple[str, ...]]:
    """Rows of texts, the head first: each network, grown wider and grown deeper."""
    rows: list[tuple[str, ...]] = [
        ("network", "grown", "parameters", "received a rank", "moved a rank", "operations", "launches", "peak a rank", "time")
    ]
    for name, sizes in NETWORKS.items():
        for told, cost in (
            (f"feed-forward x{factor:g}", cost_of(sizes, machine, factor=factor)),
            ("down projections in two", cost_of(sizes, machine, deepen=True)),
        ):
            before, after = cost.parameters
            received, moved, held = (f"{each / 1e9:.1f} GB" for each in (cost.received, cost.moved, cost.held))
            operations, launches = f"{cost.operations / 1e12:.2f} T", f"{cost.launches:,}"
            sized = f"{before / 1e9:.1f} B to {after / 1e9:.1f} B"
            rows.append((name, told, sized, received, moved, operations, launches, held, f"{cost.seconds:.1f} s"))
    return rows
