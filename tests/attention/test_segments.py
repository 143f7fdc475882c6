"""Which queries meet which keys: small rows worked out by hand, and any row by the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.attention import segments
from gmpo.attention.segments import (
    Piece,
    Places,
    Reach,
    Run,
    Segments,
    Tree,
    own_pieces,
    pieces,
    prompt_pieces,
    runs,
    seen,
)
from tests.attention.dense import visible

CPU = torch.device("cpu")
ROW = [Tree(3, (2, 1)), Tree(1, (1,))]  # a prompt of 3 with completions of 2 and 1; one of 1 with 1

EVERYTHING = """
    x.......
    xx......
    xxx.....
    xxxx....
    xxxxx...
    xxx..x..
    ......x.
    ......xx
"""
WINDOW_OF_TWO = """
    x.......
    xx......
    .xx.....
    ..xx....
    ...xx...
    ..x..x..
    ......x.
    ......xx
"""
CHUNKS_OF_TWO = """
    x.......
    xx......
    ..x.....
    ..xx....
    ....x...
    ..x..x..
    ......x.
    ......xx
"""


def drawn(text):
    return torch.tensor(
        [[mark == "x" for mark in line.strip()] for line in text.strip().splitlines()]
    )


def met(trees, reach):
    """How often each query meets each key, over all pieces, [L, L]."""
    length = sum(tree.tokens for tree in trees)
    count = torch.zeros(length, length, dtype=torch.int64)
    own, prompts = pieces(trees, reach)
    for piece in (*own, *prompts):
        queries = slice(piece.query, piece.query + piece.num_queries)
        keys = slice(piece.key, piece.key + piece.num_keys)
        count[queries, keys] += seen(piece, reach)
    return count


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        (Reach(), EVERYTHING),
        (Reach(window=2), WINDOW_OF_TWO),
        (Reach(chunk=2), CHUNKS_OF_TWO),
        (Reach(window=9), EVERYTHING),
    ],
)
def test_a_small_row_by_hand(reach, expected):
    assert torch.equal(met(ROW, reach), drawn(expected).long())


sizes = st.integers(min_value=0, max_value=7)
trees = st.lists(
    st.builds(Tree, st.integers(1, 7), st.lists(sizes, max_size=4).map(tuple)),
    min_size=1,
    max_size=3,
)
reaches = st.builds(Reach, st.none() | st.integers(1, 9), st.none() | st.integers(1, 9))


@settings(deadline=None)
@given(trees, reaches, st.integers(1, 5))
def test_any_row_meets_what_it_sees_once(trees, reach, queries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "QUERIES", queries)
        assert torch.equal(met(trees, reach), visible(trees, reach).long())


@settings(deadline=None)
@given(trees, reaches)
def test_every_token_asks_its_own_run_once_and_prompts_at_most_once(trees, reach):
    own, prompts = pieces(trees, reach)
    tokens = sum(tree.tokens for tree in trees)

    def asked(found):
        places = [place for p in found for place in range(p.query, p.query + p.num_queries)]
        return sorted(places)

    assert asked(own) == list(range(tokens))
    assert len(set(asked(prompts))) == len(asked(prompts))


def test_a_prompt_with_one_completion_is_one_run():
    assert runs(Tree(3, (0, 4)), 10) == [Run(10, 7)]
    assert runs(Tree(3, ()), 10) == [Run(10, 3)]
    assert runs(Tree(3, (2, 1)), 10) == [Run(10, 3), Run(13, 2, 3, 10), Run(15, 1, 3, 10)]


def test_all_completions_of_a_prompt_see_it_in_one_piece():
    completions = runs(Tree(3, (2, 1)), 10)[1:]
    assert prompt_pieces(completions, Reach()) == [Piece(13, 3, 10, 3, 3, 0, "full")]


def test_a_window_leaves_out_what_no_query_sees(monkeypatch):
    monkeypatch.setattr(segments, "QUERIES", 3)
    assert own_pieces(Run(10, 5), Reach(window=2)) == [
        Piece(10, 3, 10, 3, 0, 0, "masked"),
        Piece(13, 2, 12, 3, 3, 2, "masked"),
    ]
    completions = runs(Tree(3, (2, 1)), 10)[1:]
    assert prompt_pieces(completions, Reach(window=2)) == [
        Piece(13, 1, 12, 1, 3, 2, "masked"),
        Piece(15, 1, 12, 1, 3, 2, "masked"),
    ]


def test_pieces_of_one_shape_are_one_call():
    row = Segments((Tree(2, (3, 3)), Tree(4, (1, 3))), CPU)
    calls = row.calls(Reach())
    shapes = [(call.queries.count, call.queries.length, call.keys.length) for call in calls]
    # prompts of 2 and 4, three completions of 3, one of 1; then 6 queries to 2 keys, 4 to 4
    assert shapes == [(1, 2, 2), (3, 3, 3), (1, 4, 4), (1, 1, 1), (1, 6, 2), (1, 4, 4)]
    assert row.calls(Reach()) is calls


def test_a_call_holds_few_queries(monkeypatch):
    monkeypatch.setattr(segments, "CALL_TOKENS", 4)
    row = Segments((Tree(2, (3, 3)),), CPU)
    shapes = [(call.queries.count, call.queries.length) for call in row.calls(Reach())]
    # the prompt of 2; completions of 3, one in each call; their 6 queries to the prompt as 4 and 2
    assert shapes == [(1, 2), (1, 3), (1, 3), (1, 4), (1, 2)]


@pytest.mark.parametrize(("starts", "is_span"), [([4, 7], True), ([4, 8], False), ([7, 4], False)])
def test_places_take_put_and_add(starts, is_span):
    places = Places.of(starts, 3, CPU)
    assert (places.index is None) == is_span
    row = torch.arange(24.0).view(12, 2)  # 12 tokens, 2 heads
    expected = torch.stack([row[start : start + 3].T for start in starts])  # [2, heads, 3]
    assert torch.equal(places.take(row), expected)

    changed = row.clone()
    places.put(changed, expected * 10)
    places.add(changed, expected)
    outside = torch.ones(12, dtype=torch.bool)
    for start in starts:
        assert torch.equal(changed[start : start + 3], row[start : start + 3] * 11)
        outside[start : start + 3] = False
    assert torch.equal(changed[outside], row[outside])
