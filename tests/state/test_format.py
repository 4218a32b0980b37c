"""The state's format and history as pure functions, against the plainest way to say the same."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given, strategies as st

from ddpm_dist.engine.pieces import shares
from ddpm_dist.errors import DamagedStateError, StateError
from ddpm_dist.state.cut import RULES, Cut
from ddpm_dist.state.format import (
    ELEMENT_BYTES,
    File,
    Manifest,
    Part,
    StateId,
    check_complete,
    decode_manifest,
    encode_manifest,
    kept_states,
    last_of_each,
    states_within,
    valid_states,
)
from ddpm_dist.state.source import Source

KINDS = ["weights", "exp_avg", "ema"]


def manifest_of(shapes: dict[str, list[int]], owners: dict[str, list[int]], ranks: int) -> Manifest:
    """owners: name -> the rank of each element; equal neighbours make a piece."""
    pieces: list[list[tuple[str, int, int]]] = [[] for _ in range(ranks)]
    for name, ranks_of_elements in owners.items():
        start = 0
        for i in range(1, len(ranks_of_elements) + 1):
            if i == len(ranks_of_elements) or ranks_of_elements[i] != ranks_of_elements[start]:
                pieces[ranks_of_elements[start]].append((name, start, i - start))
                start = i
    parts = []
    for rank, owned in enumerate(pieces):
        size = ELEMENT_BYTES * len(KINDS) * sum(numel for _, _, numel in owned)
        parts.append(Part(owned, KINDS, [File(f"{rank:05d}-000.f32", size, "0" * 64, [0])] if size else []))
    return Manifest(StateId(7, 2), shapes, parts, {"optimizer_steps": 7}, {"step": 7, "loss": 0.1}, 64, 16)


def ruled(cut: Cut) -> Manifest:
    """What so many ranks wrote that followed the rule."""
    shapes = {name: [numel] for name, numel in cut.numels.items()}
    parts = []
    for rank, elements in enumerate(cut.elements().tolist()):
        size = ELEMENT_BYTES * len(KINDS) * elements
        parts.append(Part(None, KINDS, [File(f"{rank:05d}-000.f32", size, "0" * 64, [0])] if size else []))
    return Manifest(StateId(7, 2), shapes, parts, {"optimizer_steps": 7}, {"step": 7, "loss": 0.1}, 64, 16, cut)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    numels = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    rule = draw(st.sampled_from(sorted(set(RULES.values()))))
    return Cut(rule, draw(st.integers(1, 9)), {f"p{i}": numel for i, numel in enumerate(numels)})


@given(cuts())
def test_a_cut_gives_each_element_to_one_rank(cut: Cut) -> None:
    owned = [(name, i) for rank in range(cut.ranks) for name, at, n in cut.pieces(rank) for i in range(at, at + n)]
    assert sorted(owned) == sorted((name, i) for name, numel in cut.numels.items() for i in range(numel))
    assert cut.elements().tolist() == [sum(n for _, _, n in cut.pieces(rank)) for rank in range(cut.ranks)]
    if cut.rule == "even":
        assert [cut.pieces(rank) for rank in range(cut.ranks)] == [
            shares(dict(cut.numels), rank, cut.ranks) for rank in range(cut.ranks)
        ]


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    if draw(st.booleans()):
        return ruled(draw(cuts()))
    ranks = draw(st.integers(1, 4))
    numels = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    owners = {f"p{i}": draw(st.lists(st.integers(0, ranks - 1), min_size=n, max_size=n)) for i, n in enumerate(numels)}
    return manifest_of({f"p{i}": [n] for i, n in enumerate(numels)}, owners, ranks)


@given(manifests(), st.data())
def test_segments_find_every_element_where_it_was_put(manifest: Manifest, data: st.DataObject) -> None:
    place = {}  # (rank, position in its stream) -> what stands there
    for rank, part in enumerate(manifest.parts):
        pieces = manifest.pieces(rank)
        stream = [(kind, n, o + i) for kind in part.kinds for n, o, count in pieces for i in range(count)]
        place |= {(rank, position): element for position, element in enumerate(stream)}
    name = data.draw(st.sampled_from(sorted(manifest.shapes)))
    kind = data.draw(st.sampled_from(KINDS))
    numel = manifest.shapes[name][0]
    offset = data.draw(st.integers(0, numel - 1))
    count = data.draw(st.integers(1, numel - offset))
    found: dict[int, tuple[str, str, int]] = {}
    for segment in Source(manifest).segments(kind, name, offset, count):
        for i in range(segment.size // ELEMENT_BYTES):
            target = segment.target // ELEMENT_BYTES + i
            assert target not in found
            found[target] = place[segment.rank, segment.start // ELEMENT_BYTES + i]
    assert found == {i: (kind, name, offset + i) for i in range(count)}


@given(manifests())
def test_a_manifest_survives_its_encoding(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest), "here") == manifest


SMALL = manifest_of({"w": [2, 3], "b": [3]}, {"w": [0, 0, 0, 1, 1, 1], "b": [1, 1, 1]}, 2)


def test_small_manifests_are_what_they_were() -> None:
    """Byte for byte as version 0.1.0 wrote them, with all pieces."""
    body = {
        "step": 7, "attempt": 2, "shapes": SMALL.shapes, "parts": [asdict(part) for part in SMALL.parts],
        "scalars": SMALL.scalars, "meta": SMALL.meta, "file_bytes": 64, "block_bytes": 16,
    }  # fmt: skip
    text = json.dumps(body, separators=(",", ":")).encode()
    head, _, rest = encode_manifest(SMALL).partition(b"\n")
    assert rest == text + b"\n"
    assert json.loads(head)["version"] == 1
    assert json.loads(encode_manifest(ruled(Cut("each", 2, {"w": 3}))).partition(b"\n")[0])["version"] == 2


def test_a_rule_that_is_not_known_is_refused() -> None:
    data = encode_manifest(ruled(Cut("odd", 2, {"w": 3})))  # type: ignore[arg-type]
    with pytest.raises(DamagedStateError, match="odd"):
        decode_manifest(data, "m")


@pytest.mark.parametrize("keep", [0, 1, 40, 200, -2])
def test_a_truncated_manifest_is_refused(keep: int) -> None:
    with pytest.raises(DamagedStateError, match=r"^runs/x/manifest.json"):
        decode_manifest(encode_manifest(SMALL)[:keep], "runs/x/manifest.json")


def test_an_altered_or_foreign_manifest_is_refused() -> None:
    data = encode_manifest(SMALL)
    with pytest.raises(DamagedStateError, match="altered"):
        decode_manifest(data.replace(b'"step":7', b'"step":8'), "m")
    with pytest.raises(DamagedStateError, match="foreign"):
        decode_manifest(json.dumps({"weights": [1, 2]}).encode(), "m")
    with pytest.raises(DamagedStateError, match="foreign"):
        decode_manifest(b"\x80\x04pickled", "m")
    with pytest.raises(DamagedStateError, match="foreign format, 'other'"):
        decode_manifest(data.replace(b"ddpm_dist training state", b"other"), "m")
    with pytest.raises(StateError, match=r"version 3 .*reads 1 and 2") as error:
        decode_manifest(data.replace(b'"version": 1', b'"version": 3'), "m")
    assert not isinstance(error.value, DamagedStateError), "a newer program can read it, so no older one is taken"


def test_missing_and_doubled_elements_are_found() -> None:
    lost = Part(SMALL.pieces(1)[1:], KINDS, [File("f", 4 * 3 * 3, "", [0])])
    with pytest.raises(DamagedStateError, match="3 elements of w"):
        check_complete(Manifest(SMALL.id, SMALL.shapes, [SMALL.parts[0], lost], {}, {}, 64, 16), "m")
    with pytest.raises(DamagedStateError, match="elements 3 to 0 of w"):
        check_complete(Manifest(SMALL.id, SMALL.shapes, [SMALL.parts[0], *SMALL.parts], {}, {}, 64, 16), "m")


def ids(*pairs: tuple[int, int]) -> list[StateId]:
    return [StateId(*pair) for pair in pairs]


def test_state_names_sort_and_parse() -> None:
    assert str(StateId(1200, 3)) == "000001200-0003"
    assert StateId.parse("000001200-0003") == StateId(1200, 3)
    assert StateId.parse("owner") is None
    assert max(ids((10, 2), (20, 1), (20, 3))) == StateId(20, 3)


def test_what_an_older_attempt_writes_after_it_was_succeeded_is_void() -> None:
    claims = {1: None, 2: StateId(20, 1)}
    published = ids((10, 1), (20, 1), (30, 1), (30, 2))  # (30, 1) came from the zombie
    assert valid_states(claims, published) == ids((30, 2), (20, 1), (10, 1))


def test_history_is_followed_through_many_attempts() -> None:
    claims = {1: None, 2: StateId(20, 1), 3: StateId(40, 2), 4: StateId(40, 2), 5: StateId(60, 4)}
    published = ids((10, 1), (20, 1), (30, 1), (30, 2), (40, 2), (50, 2), (50, 3), (50, 4), (60, 4), (70, 4), (70, 5))
    assert valid_states(claims, published) == ids((70, 5), (60, 4), (50, 4), (40, 2), (30, 2), (20, 1), (10, 1))


@given(st.data())
def test_the_last_valid_state_of_each_attempt_tells_what_the_chain_of_claims_tells(data: st.DataObject) -> None:
    """Attempts that write some states, continue some valid one, and lose some to retention."""
    claims: dict[int, StateId | None] = {}
    published: list[StateId] = []
    for attempt in range(1, data.draw(st.integers(2, 7))):
        valid = valid_states(claims, published)
        continued = data.draw(st.sampled_from([*valid, None])) if valid else None
        older = [s for s in valid if continued is not None and s <= continued]
        claims[attempt] = continued
        start = continued.step if continued is not None else 0
        published += [StateId(start + 1 + i, attempt) for i in range(data.draw(st.integers(0, 3)))]
        published += [StateId(start + 2, zombie) for zombie in claims if StateId(start + 2, zombie) not in published]
        published = [s for s in published if data.draw(st.booleans()) or s.attempt == attempt or s == continued]
        limits = {attempt: float("inf"), **{s.attempt: float(s.step) for s in last_of_each(older)}}
        kept = [s for s in published if s.attempt == attempt or s in older]
        assert states_within(limits, kept) == valid_states(claims, kept)
        assert states_within(limits, [s for s in published if s not in kept]) == []


def test_planning_sums_each_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many segments are asked for: a real state has thousands."""
    sums = []
    elements = Part.elements
    monkeypatch.setattr(Part, "elements", property(lambda part: sums.append(part) or elements.fget(part)))  # type: ignore[attr-defined]
    source = Source(SMALL)
    for _ in range(20):
        for kind in KINDS:
            list(source.segments(kind, "w", 0, 6))
    assert len(sums) == len(SMALL.parts)


def test_a_new_beginning_voids_everything_before() -> None:
    assert valid_states({1: None, 2: None}, ids((10, 1), (5, 2))) == ids((5, 2))
    assert valid_states({}, ids((10, 1))) == []


def test_retention() -> None:
    states = ids(*((step, 1) for step in range(10, 110, 10)))
    assert kept_states(states, 2, None, []) == set(ids((100, 1), (90, 1)))
    assert kept_states(states, 3, 40, []) == set(ids((100, 1), (90, 1), (80, 1), (40, 1)))
    assert kept_states(states, 1, None, ids((30, 1), (35, 1))) == set(ids((100, 1), (90, 1), (30, 1)))
