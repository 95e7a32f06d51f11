"""Computes a lower bound on a program's time: its work divided by published rates, term by term.

Each term runs on its own hardware (matrix units, HBM, each kind of link). In the best case all
terms overlap and the longest is the bound; their sum is the time if nothing overlaps. Latency is
ignored, and so is the gap between a kernel's rate and the peak: this is a bound, not a forecast.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from train.planning.collectives import Collective
from train.planning.topology import Link


@dataclasses.dataclass(frozen=True)
class Term:
    """The time that a program spends on one kind of hardware.

    name: "compute", "HBM", or a kind of link with the mesh axes, such as "ICI fsdp".
    seconds: the time in seconds.
    in_step: the part of these seconds in which a link works at the same time as a slower link, for
        collectives that go over both piece by piece. The sum of all terms leaves it out.
    """

    name: str
    seconds: float
    in_step: float = 0.0


@dataclasses.dataclass(frozen=True)
class Bound:
    """The lower bound of a program's time, as terms that may overlap."""

    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        """The longest term: the time if all terms overlap. No run is faster."""
        return max(term.seconds for term in self.terms)

    @property
    def serial(self) -> float:
        """The time in seconds if no terms overlap, except links that share a collective."""
        return sum(term.seconds - term.in_step for term in self.terms)

    @property
    def limit(self) -> str:
        """The name of the longest term."""
        return max(self.terms, key=lambda term: term.seconds).name


def bound(
    flops: float,
    peak: float,
    *,
    moved: float,
    bandwidth: float,
    collectives: Iterable[Collective],
    links: Mapping[tuple[str, ...], Sequence[Link]],
    network: str = "",
) -> Bound:
    """Return the lower bound of a program's time, from the work of one device.

    flops: the FLOPs of the device.
    peak: the FLOP/s of the device.
    moved: the bytes that move to and from its HBM.
    bandwidth: the bytes/s of its HBM.
    collectives: the collectives in which the device takes part.
    links: for each combination of mesh axes, the links that carry its collectives.
    network: the kind of link between hosts or slices, or "" if there is one of them. It has a term
        of zero seconds if nothing goes over it.
    """
    over: dict[str, Term] = {}
    for one in collectives:
        limiting, _ = slowest(one, links[one.axes])
        for link in links[one.axes]:
            seconds = _seconds(one, link)
            in_step = 0.0 if link.name == limiting else seconds
            name = f"{link.name} {','.join(one.axes)}"
            before = over.get(name, Term(name, 0.0))
            over[name] = Term(name, before.seconds + seconds, before.in_step + in_step)
    if network and not any(name.startswith(f"{network} ") for name in over):
        over[network] = Term(network, 0.0)
    terms = [Term("compute", flops / peak), Term("HBM", moved / bandwidth)]
    return Bound((*terms, *sorted(over.values(), key=lambda term: -term.seconds)))


def slowest(one: Collective, links: Sequence[Link]) -> tuple[str, float]:
    """Return the name of the link that limits a collective, and the time in seconds on this link.

    links: the kinds of link that the collective goes over. It does so piece by piece, so the
    slowest kind sets the time.
    """
    return max(((link.name, _seconds(one, link)) for link in links), key=lambda found: found[1])


def _seconds(one: Collective, link: Link) -> float:
    """Return the time of a collective on one kind of link, in seconds.

    On a ring of n devices, an all-gather or reduce-scatter takes n - 1 steps of 1/n of the array
    each, and an all-reduce is one of each. An all-to-all is limited by the middle of a ring or
    line, which carries a quarter of the ring's length times the bytes of a device, because half of
    each array goes to either side.
    """
    share = (link.size - 1) / link.size
    if one.kind in ("all-gather", "reduce-scatter"):
        return one.bytes * share / link.bandwidth
    if one.kind == "all-reduce":
        return 2 * one.bytes * share / link.bandwidth
    if one.kind == "all-to-all":
        return one.bytes * max(link.crossing / 4, share) / link.bandwidth
    if one.kind == "collective-permute":
        return one.bytes / link.one_way
    return one.bytes / link.bandwidth
