"""The mesh: parsed, chosen, refused, and who is where."""

import itertools
from collections.abc import Sequence

import pytest

from semvid.parallel.mesh import Mesh, Place, check, choose, crossing, parse


def on_hosts(*counts: int) -> list[str]:
    """The hosts of ranks that fill one host after the other."""
    return [f"host{i}" for i, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("cfg=2,ring=3,ulysses=4", Mesh(cfg=2, ring=3, ulysses=4)),
        ("ulysses=24", Mesh(ulysses=24)),
        (" ring=6 , cfg=2,ulysses=2", Mesh(cfg=2, ring=6, ulysses=2)),
        ("cfg=1,ring=24", Mesh(ring=24)),
    ],
)
def test_what_is_left_out_is_one(text: str, mesh: Mesh) -> None:
    assert parse(text, 24) == mesh


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "2",
        "ulysses",
        "ulysses=",
        "=2",
        "ulysses=0",
        "ulysses=-2",
        "ulysses=2.0",
        "ulysses=two",
        "ulysses==2",
        "ulysses=2,",
        "ulysses=2,ulysses=1",
        "ulysses=2;ring=1",
        "Ulysses=2",
        "tp=2",
    ],
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--mesh is .*; accepted: degrees such as cfg=2,ring=1,ulysses=2") as error:
        parse(text, 2)
    assert repr(text) in str(error.value)


def test_the_text_of_a_mesh_is_read_back() -> None:
    mesh = Mesh(cfg=2, ring=3, ulysses=2)
    assert parse(str(mesh), 12) == mesh


@pytest.mark.parametrize(
    "mesh", [Mesh(), Mesh(cfg=2), Mesh(ring=3, ulysses=4), Mesh(cfg=2, ring=3, ulysses=5)], ids=str
)
def test_every_place_has_one_rank(mesh: Mesh) -> None:
    places = [mesh.place(rank) for rank in range(mesh.world_size)]
    every = [Place(*place) for place in itertools.product(range(mesh.cfg), range(mesh.ring), range(mesh.ulysses))]
    # Ulysses is innermost, cfg outermost.
    assert places == every
    shards = [place.sequence(mesh) for place in places]
    assert shards == list(range(mesh.sequence)) * mesh.cfg


@pytest.mark.parametrize("world_size", range(1, 17))
@pytest.mark.parametrize("guided", [True, False])
def test_on_one_host_branches_are_parted_and_the_rest_is_ulysses(world_size: int, guided: bool) -> None:
    cfg = 2 if guided and world_size % 2 == 0 else 1
    expected = Mesh(cfg=cfg, ulysses=world_size // cfg)
    assert choose(world_size, guided=guided) == expected
    assert choose(world_size, guided=guided, hosts=["one"] * world_size) == expected


HOSTS = [
    (1, 1),
    (2, 2),
    (4, 4),
    (8, 8),
    (3, 3),
    (1, 3),
    (3, 5),
    (2, 4),
    (5, 5),
    (4, 4, 4),
    (6, 6),
    (4, 4, 4, 4),
    (7, 9),
]


@pytest.mark.parametrize("counts", HOSTS, ids=str)
@pytest.mark.parametrize("guided", [True, False])
def test_the_chosen_ulysses_groups_stay_on_their_hosts_and_are_the_longest_that_do(
    counts: Sequence[int], guided: bool
) -> None:
    hosts = on_hosts(*counts)
    mesh = choose(len(hosts), guided=guided, hosts=hosts)
    check(mesh, len(hosts), guided=guided, hosts=hosts)
    groups = [hosts[first : first + mesh.ulysses] for first in range(0, len(hosts), mesh.ulysses)]
    assert all(len(set(group)) == 1 for group in groups)
    for longer in range(mesh.ulysses + 1, mesh.sequence + 1):
        if mesh.sequence % longer == 0:
            other = Mesh(cfg=mesh.cfg, ring=mesh.sequence // longer, ulysses=longer)
            assert crossing(other, hosts) is not None


@pytest.mark.parametrize(
    ("counts", "guided", "mesh"),
    [
        # The branches are on a host each: only they talk across.
        ((4, 4), True, Mesh(cfg=2, ulysses=4)),
        ((4, 4), False, Mesh(ring=2, ulysses=4)),
        ((8, 8), False, Mesh(ring=2, ulysses=8)),
        ((4, 4, 4, 4), True, Mesh(cfg=2, ring=2, ulysses=4)),
        ((2, 2, 2), False, Mesh(ring=3, ulysses=2)),
        ((3, 3, 3), True, Mesh(ring=3, ulysses=3)),
        ((1, 1, 1), True, Mesh(ring=3)),
        ((2, 4), True, Mesh(cfg=2, ring=3)),
    ],
    ids=str,
)
def test_cfg_and_then_ring_cross_hosts(counts: Sequence[int], guided: bool, mesh: Mesh) -> None:
    hosts = on_hosts(*counts)
    assert choose(len(hosts), guided=guided, hosts=hosts) == mesh


def test_ranks_that_alternate_between_hosts_share_no_ulysses_group() -> None:
    assert choose(6, guided=False, hosts=["a", "b"] * 3) == Mesh(ring=6)


@pytest.mark.parametrize(
    ("mesh", "world_size", "guided", "hosts", "message"),
    [
        (Mesh(cfg=2, ulysses=4), 6, True, [], "is 2 x 1 x 4 = 8 ranks, but there are 6; accepted here, .*ulysses=3"),
        (Mesh(), 2, True, [], "is 1 x 1 x 1 = 1 ranks, but there are 2; accepted here, .*: cfg=2,ring=1,ulysses=1"),
        (Mesh(cfg=4), 4, True, [], "two branches for cfg to share, not 4; .*: cfg=2,ring=1,ulysses=2"),
        (Mesh(cfg=3), 3, False, [], "two branches for cfg to share, not 3; .*: cfg=1,ring=1,ulysses=3"),
        (Mesh(cfg=2), 2, False, [], "without guidance there is one branch and cfg must be 1; .*cfg=1,.*ulysses=2"),
        (
            Mesh(ulysses=6),
            6,
            False,
            on_hosts(3, 3),
            r"ranks 0 \.\. 5 lies on several hosts \(host0, host1\); .*cfg=1,ring=2,ulysses=3",
        ),
        (Mesh(ring=2, ulysses=2), 4, False, on_hosts(2, 1, 1), r"ranks 2 \.\. 3 lies .*\(host1, host2\); .*ring=4"),
    ],
)
def test_what_cannot_be_is_refused_with_numbers_and_with_what_works(
    mesh: Mesh, world_size: int, guided: bool, hosts: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=f"--mesh is {mesh}, .*{message}") as error:
        check(mesh, world_size, guided=guided, hosts=hosts)
    works = parse(str(error.value).rpartition(": ")[2], world_size)
    check(works, world_size, guided=guided, hosts=hosts)


def test_parse_refuses_another_number_of_ranks() -> None:
    with pytest.raises(ValueError, match="is 2 x 1 x 2 = 4 ranks, but there are 3; accepted here, for example: cfg=1,"):
        parse("cfg=2,ulysses=2", 3)
