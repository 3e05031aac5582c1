"""Who is which rank where: places of actors into orders for ranks. Pure."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from semvid.launch.control.request import Request
from semvid.launch.env import Seat
from semvid.launch.ranks.rank_process import Order


class Where(NamedTuple):
    """Where an actor is."""

    node: str
    address: str
    gpus: tuple[str, ...]
    cores: int


def rank_order(places: Sequence[Where]) -> list[int]:
    """Returns the numbers of places in the order of ranks: host by host, GPU by GPU."""
    hosts = list(dict.fromkeys(place.node for place in places))

    def key(number: int) -> tuple[int, list[tuple[int, str]]]:
        place = places[number]
        # "10" comes after "9".
        return hosts.index(place.node), [(len(gpu), gpu) for gpu in place.gpus]

    return sorted(range(len(places)), key=key)


def meeting_place(places: Sequence[Where]) -> str:
    """Returns the address where the ranks meet, that of rank 0's host; nobody else can reach it if there is but one."""
    return "127.0.0.1" if len({place.node for place in places}) == 1 else places[0].address


def orders_of(folder: Path, request: Request, places: Sequence[Where], host: str, port: int) -> list[Order]:
    """Returns what each rank is told.

    Args:
        folder: the job's, on every host.
        request: what was asked for.
        places: of the ranks, in their order.
        host: where they meet, by `meeting_place`.
        port: there.
    """
    orders = []
    for rank, place in enumerate(places):
        mates = [number for number, other in enumerate(places) if other.node == place.node]
        orders.append(
            Order(
                folder=folder,
                seat=Seat(rank, len(places), mates.index(rank)),
                host=host,
                port=port,
                gpus=tuple(gpu for mate in mates for gpu in places[mate].gpus),
                threads=request.threads or max(1, place.cores // len(mates)),
                mesh=request.mesh,
                faults=request.faults,
                loopback=len(mates) == len(places),
            )
        )
    return orders
