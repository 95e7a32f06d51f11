"""The least time that a program can take: its work over the published rates, term by term.

Every term runs on hardware of its own (matrix units, HBM, each kind of link), so in the best case
all overlap and the longest is the bound; their sum is what it takes when nothing overlaps. Latency
counts nothing, nor do kernels that reach less than the peak: a bound, not a forecast.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from train.planning.collectives import Collective
from train.planning.topology import Path


@dataclasses.dataclass(frozen=True)
class Term:
    """Time that one kind of hardware takes for its part of the work.

    name: "compute", "HBM", or the kind of link and the mesh axes, as "ICI fsdp". in_step: how many
    of these seconds a link works in step with a slower one, for collectives that go over both
    piece by piece; they do not come on top of that one's.
    """

    name: str
    seconds: float
    in_step: float = 0.0


@dataclasses.dataclass(frozen=True)
class Bound:
    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        """All terms at once: no run is faster."""
        return max(term.seconds for term in self.terms)

    @property
    def serial(self) -> float:
        """One term after the other; of links that work in step, the slowest."""
        return sum(term.seconds - term.in_step for term in self.terms)

    @property
    def limit(self) -> str:
        """The name of the longest term."""
        return max(self.terms, key=lambda term: term.seconds).name


def bound(
    flops: float,
    peak: float,
    moved: float,
    bandwidth: float,
    collectives: Iterable[Collective],
    links: Mapping[tuple[str, ...], Sequence[Path]],
    network: str = "",
) -> Bound:
    """The bound of a device's work: FLOPs over its peak, bytes over its HBM's bandwidth, and the
    collectives over each kind of link under their axes.

    network: the kind of link between hosts or slices, where there are several; it has a term of no
    time where nothing goes over it.
    """
    over: dict[str, Term] = {}
    for one in collectives:
        limiting, _ = slowest(one, links[one.axes])
        for path in links[one.axes]:
            seconds = _seconds(one, path)
            in_step = 0.0 if path.name == limiting else seconds
            name = f"{path.name} {','.join(one.axes)}"
            before = over.get(name, Term(name, 0.0))
            over[name] = Term(name, before.seconds + seconds, before.in_step + in_step)
    if network and not any(name.startswith(f"{network} ") for name in over):
        over[network] = Term(network, 0.0)
    terms = [Term("compute", flops / peak), Term("HBM", moved / bandwidth)]
    return Bound((*terms, *sorted(over.values(), key=lambda term: -term.seconds)))


def slowest(one: Collective, paths: Sequence[Path]) -> tuple[str, float]:
    """The kind of link that limits a collective, and its time there. Parts over several kinds of
    link follow each other piece by piece, so the slowest counts.
    """
    return max(((path.name, _seconds(one, path)) for path in paths), key=lambda found: found[1])


def _seconds(one: Collective, path: Path) -> float:
    """On a ring of n, an array of which each has a part makes n - 1 steps of a part each.

    An all-reduce scatters and then gathers. An all-to-all crosses a ring's or line's middle: a
    quarter of its length times what it moves (of an array per device, half goes to either side).
    """
    share = (path.size - 1) / path.size
    if one.kind in ("all-gather", "reduce-scatter"):
        return one.bytes * share / path.bandwidth
    if one.kind == "all-reduce":
        return 2 * one.bytes * share / path.bandwidth
    if one.kind == "all-to-all":
        return one.bytes * max(path.crossing / 4, share) / path.bandwidth
    if one.kind == "collective-permute":
        return one.bytes / path.one_way
    return one.bytes / path.bandwidth
