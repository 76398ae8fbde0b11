"""GraphWalks: the graph in the text, searched anew by another method, gives the expected nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest

from dsv4_evals.task import Building, Question, Sample
from dsv4_evals.tasks.graphwalks import GraphWalks
from support.sample_building import asked, building, built, span, spelt

TASK = GraphWalks()
Edge = tuple[str, str]


@pytest.fixture(scope="module")
def words() -> Building:
    return building()


def one(
    words: Building, operation: str, ctx: int = 6000, sample: int = 0, depth: int = 3
) -> tuple[Sample, Question, str]:
    (made,) = built(TASK, ctx, words, sample=sample, operations=[operation], bfs_depth=depth)
    return made, made.questions[0], spelt(words, made)


def edges_of(text: str) -> list[Edge]:
    return re.findall(r"^([0-9a-f]{10}) -> ([0-9a-f]{10})$", text.split("<end example>")[1], re.MULTILINE)


def distances(edges: Sequence[Edge], start: str) -> dict[str, int]:
    """Lengths of shortest paths, by relaxing every edge until nothing changes (Bellman and Ford)."""
    length = {start: 0}
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            if a in length and length[a] + 1 < length.get(b, len(edges) + 1):
                length[b] = length[a] + 1
                changed = True
    return length


@pytest.mark.parametrize("sample", range(4))
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_search_ends_at_exactly_its_depth(sample: int, depth: int, words: Building) -> None:
    made, question, text = one(words, "bfs", sample=sample, depth=depth)
    edges = edges_of(text)
    found = re.search(r"BFS from node (\w+) and return only the nodes at exactly depth (\d)", asked(words, question))
    assert found is not None and int(found[2]) == depth
    length = distances(edges, found[1])
    assert sorted(question.expected) == sorted(node for node in length if length[node] == depth)
    assert 1 <= len(question.expected) <= 24 and found[1] not in question.expected
    # The facts show every edge out of a node that is nearer than the depth.
    shown = [span(words, made, place["needle"]).strip().split(" -> ") for place in question.facts["needles"]]
    near = [list(edge) for edge in edges if length.get(edge[0], depth) < depth]
    assert sorted(shown) == sorted(near)


@pytest.mark.parametrize("sample", range(6))
def test_parents_are_all_nodes_with_an_edge_to_it(sample: int, words: Building) -> None:
    _, question, text = one(words, "parents", sample=sample)
    node = re.search(r"Find the parents of node (\w+)\.", asked(words, question))[1]  # type: ignore[index]
    assert sorted(question.expected) == sorted(a for a, b in edges_of(text) if b == node)
    assert len(question.expected) == len(question.facts["needles"]) >= 1


def test_the_graph_is_simple_and_has_two_edges_a_node(words: Building) -> None:
    _, question, text = one(words, "bfs", ctx=40_000)
    edges = edges_of(text)
    nodes = {end for edge in edges for end in edge}
    assert len(set(edges)) == len(edges) == question.facts["edges"] and not any(a == b for a, b in edges)
    assert len(nodes) == question.facts["nodes"] and 1.8 < len(edges) / len(nodes) < 2.2
    # Edges are grouped by where they begin, as in the original.
    begins = [a for a, _ in edges]
    assert sum(a != b for a, b in pairwise(begins)) + 1 == len(set(begins))


def test_both_operations_share_a_graph_and_follow_the_worked_examples(words: Building) -> None:
    search, searched, text = one(words, "bfs")
    parents, _, _ = one(words, "parents")
    assert search.prompt == parents.prompt
    # The examples in the prompt are true of the example graph.
    graph = [("uvwx", "alke"), ("abcd", "uvwx"), ("abcd", "efgh"), ("efgh", "uvwx")]
    assert all(f"{a} -> {b}\n" in text for a, b in graph)
    for start, named in re.findall(r"BFS from node (\w{4}) .*\nFinal Answer: \[(.*)\]", text):
        assert {n for n, d in distances(graph, start).items() if d == 1} == set(filter(None, named.split(", ")))
    for node, named in re.findall(r"parents of node (\w{4})\.\nFinal Answer: \[(.*)\]", text):
        assert {a for a, b in graph if b == node} == set(filter(None, named.split(", ")))
    assert TASK.score(searched, f"Final Answer: [{', '.join(searched.expected)}]") == 1
    assert TASK.score(searched, ", ".join(searched.expected)) == 0
