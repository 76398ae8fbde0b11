"""`graphwalks`: breadth-first search and parents in a directed graph given as its list of edges.

Wording and scoring of OpenAI's GraphWalks (MIT, huggingface.co/datasets/openai/graphwalks) with its two later
corrections: a node is no parent of itself, and a search asks for the nodes at exactly a depth.  The graphs are drawn
anew, without loops or double edges, and every answer has at least one node.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from ..errors import TaskError
from ..model import Ids
from ..scoring import graphwalks
from ..task import Building, Cell, Json, Question, Sample, Text
from . import words
from .layout import Layout, finish, fits, while_they_fit
from .options import Options, grid, shared

_INTRODUCTION = """\
You will be given a graph as a list of directed edges. All nodes are at least degree 1. \
You will also get a description of an operation to perform on the graph.
Your job is to execute the operation on the graph and return the set of nodes that the operation results in. \
If asked for a breadth-first search (BFS), only return the nodes that are both reachable and exactly at that depth \
(not nodes at intermediate depths), and do not return the starting node. \
If asked for the parents of a node, only return the nodes that have an edge leading to the given node, \
do not return the given node itself.

Here is an example:
<begin example>

The graph has the following edges:
uvwx -> alke
abcd -> uvwx
abcd -> efgh
efgh -> uvwx

Example 1:
Operation:
Perform a BFS from node abcd and return only the nodes at exactly depth 1 (not nodes at intermediate depths).
Final Answer: [uvwx, efgh]

Example 2:
Operation:
Perform a BFS from node alke and return only the nodes at exactly depth 1 (not nodes at intermediate depths).
Final Answer: []

Example 3:
Operation:
Find the parents of node uvwx.
Final Answer: [abcd, efgh]

Example 4:
Operation:
Find the parents of node abcd.
Final Answer: []

<end example>
Here is the graph to operate on:
The graph has the following edges:
"""
_BFS = (
    "Perform a BFS from node {node} and return only the nodes at exactly depth {depth} "
    "(not nodes at intermediate depths)."
)
_PARENTS = "Find the parents of node {node}."
_CLOSING = """

You should immediately return the set of nodes that the operation results in, with no additional text. Return your \
final answer as a list of nodes in the very last line of your response. For example, if the operation returns the set \
of nodes [node1, node2, node3], your response should be:
Final Answer: [node1, node2, node3]
If the operation returns the empty set, your response should be:
Final Answer: []
"""
_HASH_LETTERS = 10
# Two edges leave a node on average, so that a search of depth 3 ends at about eight nodes.
_EDGES_OF_NODE = (1, 2, 3)
_MOST_NODES = 24
_LEAST_EDGES = 16


class GraphWalks:
    """Cells are lengths x samples x operations; the operations of a length and sample share their graph."""

    name = "graphwalks"
    max_tokens = 512

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """Options: operations (bfs, parents), bfs_depth (3)."""
        with Options(self.name, options) as given:
            operations = given.names("operations", ["bfs", "parents"])
            depth = given.integer("bfs_depth", 3, 1, 8)
        kinds: dict[str, dict[str, Json]] = {
            "bfs": {"operation": "bfs", "bfs_depth": depth},
            "parents": {"operation": "parents"},
        }
        return grid(self.name, lengths, samples, seed, [kinds[operation] for operation in operations])

    def build(self, cell: Cell, building: Building) -> Sample:
        text = building.text
        # A hash takes at most a token a letter; room for the longer question, so that the graph does not depend on it.
        asking = max(len(text.encode(_operation("", depth))) for depth in (0, 8)) + _HASH_LETTERS
        layout = Layout(text)
        layout.add(_INTRODUCTION)
        room = building.room(cell) - len(layout.ids) - asking - self.max_tokens
        lines, edges = _edges(text, shared(cell).rng("graph"), room)
        fits(cell, len(lines), "the graph (counted in edges)", _LEAST_EDGES)
        places = [layout.add(line) for line in lines]
        bfs_depth = cell.params.get("bfs_depth", 0)
        node, truth, used = _asked(cell.rng("operation"), edges, bfs_depth)
        facts = {
            "node": node,
            "edges": len(edges),
            "nodes": len({end for edge in edges for end in edge}),
            "needles": [{"needle": [places[i], places[i] + len(lines[i])]} for i in used],
        }
        question = Question(text.encode(_operation(node, bfs_depth)), truth, facts=facts)
        return finish(cell, building, layout.ids, [question], self.max_tokens)

    def score(self, question: Question, answer: str) -> float:
        """F1 of the nodes on the answer's last line."""
        return graphwalks(answer, question.expected)


def _operation(node: str, bfs_depth: int) -> str:
    asked = _BFS.format(node=node, depth=bfs_depth) if bfs_depth else _PARENTS.format(node=node)
    return f"\nOperation:\n{asked}{_CLOSING}"


def _edges(text: Text, rng: random.Random, room: int) -> tuple[list[Ids], list[tuple[str, str]]]:
    """Lines of edges that fit ``room`` tokens, grouped by where they begin as in the original, and the edges."""

    def draw() -> str:
        return words.letters(rng, _HASH_LETTERS, "0123456789abcdef")

    some = [len(text.encode(f"{draw()} -> {draw()}\n")) for _ in range(64)]
    taken: set[str] = set()
    nodes = words.unique(draw, max(8, int(room * len(some) / sum(some) / 2)), taken)
    edges: list[tuple[str, str]] = []

    def starts() -> Iterator[str]:
        # Where the estimate was too small, nodes follow that no edge leads to.
        yield from nodes
        while True:
            yield words.unique(draw, 1, taken)[0]

    def written() -> Iterator[Ids]:
        for node in starts():
            for target in rng.sample(nodes, rng.choice(_EDGES_OF_NODE)):
                if target != node:
                    edges.append((node, target))
                    yield text.encode(f"{node} -> {target}\n")

    lines = while_they_fit(written(), room)
    return lines, edges[: len(lines)]


def _asked(rng: random.Random, edges: Sequence[tuple[str, str]], bfs_depth: int) -> tuple[str, list[str], list[int]]:
    """A node with an answer of 1 to 24 nodes, the answer, and the edges (places in ``edges``) that show it."""
    children: dict[str, list[int]] = {}
    parents: dict[str, list[int]] = {}
    for i, (start, end) in enumerate(edges):
        children.setdefault(start, []).append(i)
        parents.setdefault(end, []).append(i)
    candidates = sorted(children) if bfs_depth else sorted(parents)
    rng.shuffle(candidates)
    for node in candidates:
        if bfs_depth:
            truth, used = _at_depth(edges, children, node, bfs_depth)
        else:
            truth, used = [edges[i][0] for i in parents[node]], parents[node]
        if 1 <= len(truth) <= _MOST_NODES:
            return node, truth, used
    raise TaskError("no node of the graph has an answer", "Choose a longer context or a smaller depth of the search.")


def _at_depth(
    edges: Sequence[tuple[str, str]], children: Mapping[str, Sequence[int]], node: str, depth: int
) -> tuple[list[str], list[int]]:
    """Nodes whose shortest path from ``node`` has ``depth`` edges, and the edges looked at on the way."""
    seen, front, used = {node}, [node], []
    for _ in range(depth):
        following: dict[str, None] = {}
        for start in front:
            for i in children.get(start, ()):
                used.append(i)
                if edges[i][1] not in seen:
                    following[edges[i][1]] = None
        seen.update(following)
        front = list(following)
    return front, used
