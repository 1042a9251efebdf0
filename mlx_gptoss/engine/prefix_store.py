"""What has been computed and may be needed again: a trie over token timelines.

A node owns the full layers' KV of its own span of tokens, so branches of one document share what they have
in common. A new prompt starts from the longest common prefix with anything held, also when it diverges in
the middle of a message: a span may be used in part. WindowStates of the sliding layers lie along the way.
The least recently used leaves are dropped first; system prompts and tools are kept longest.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.engine.prefix_disk import PrefixDisk, Span
from mlx_gptoss.engine.runner import KVCache
from mlx_gptoss.model.sequence_cache import KVSpan, WindowState

logger = logging.getLogger("mlx_gptoss.engine")

# Longest span of one node, tokens: what an eviction drops at least.
SPAN = 1024
# Of the store's limit, the share that window states may take.
STATES_SHARE = 0.4
# Of the store's limit, the share that pinned prefixes may keep from ageing.
PINNED_SHARE = 0.25

# Whether parts of so many tokens, and window states, are of the model that is to use them.
Fits = Callable[[int, Sequence[mx.array], Iterable[WindowState]], bool]
# What was read from a file, as the model's caches take it.
Adopt = Callable[[Sequence[mx.array], Mapping[int, WindowState]], tuple[KVSpan, dict[int, WindowState]]]

_NOTHING = np.zeros(0, np.int32)


@dataclass(eq=False)
class Node:
    """`tokens` at positions [start, end) and the KV of them, after those of the parents.

    `parts` is what KVCache.export gives for them. `states` end within (start, end].
    """

    tokens: np.ndarray
    start: int
    parts: KVSpan
    parent: Node | None = None
    children: dict[int, Node] = field(default_factory=dict)
    states: dict[int, WindowState] = field(default_factory=dict)  # by end
    used: int = 0
    pinned: bool = False
    path: Path | None = None  # its file, when it is saved
    saved_states: frozenset[int] = frozenset()  # the ends of the states in that file
    loaded: bool = True  # False: `parts` and `states` are on disk only

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def saved(self) -> bool:
        """True when all of it is on disk."""
        return self.path is not None and self.states.keys() <= self.saved_states

    @property
    def kv_bytes(self) -> int:
        return self.parts.nbytes

    @property
    def state_bytes(self) -> int:
        return sum(s.nbytes for s in self.states.values())


@dataclass(frozen=True)
class Match:
    """The longest prefix held: `length` tokens, their KV in order, and the window states along them."""

    length: int = 0
    spans: list[KVSpan] = field(default_factory=list)
    states: list[WindowState] = field(default_factory=list)


class PrefixStore:
    """Timelines by their tokens, at most `limit` bytes of them. Used by the engine's thread only.

    fits, adopt: judge what is read from disk, and take it in (see ModelRunner).
    """

    def __init__(
        self,
        limit: int,
        disk: PrefixDisk | None = None,
        fits: Fits = lambda *_: True,
        adopt: Adopt = lambda parts, states: (KVSpan(parts), dict(states)),
    ) -> None:
        self.limit = limit
        self.nbytes = 0
        self._roots = dict[int, Node]()  # by the number of the adapter that the KV is computed with
        self._digests = dict[Node, str]()  # of the roots that are kept on disk, what their adapter is
        self._clock = 0
        self._disk = disk
        self._fits, self._adopt_span = fits, adopt
        self._unsaved: list[Node] = []
        self.open(0, "")

    @property
    def on_disk(self) -> bool:
        """Whether prefixes are kept on disk."""
        return self._disk is not None

    def open(self, adapter: int, digest: str) -> None:
        """Let an adapter have what was computed with it, also what is on disk. digest: of what it does."""
        root = self._roots.setdefault(adapter, Node(_NOTHING, 0, KVSpan()))
        self._digests[root] = digest
        if self._disk is not None:
            self._adopt(self._disk, root, digest)

    def __len__(self) -> int:
        """How many nodes are held."""
        return sum(1 for _ in self.nodes())

    def nodes(self) -> Iterator[Node]:
        """Every node, parents first."""
        waiting = [child for root in self._roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def common(self, tokens: np.ndarray, adapter: int = 0) -> int:
        """How many leading tokens of int32 [n] are held."""
        path = self._walk(tokens, adapter)
        return path[-1][0].start + path[-1][1] if path else 0

    def match(self, tokens: np.ndarray, adapter: int = 0) -> Match:
        """The longest common prefix of `tokens`, int32 [n], with anything held; counts as a use."""
        path = self._loaded(self._walk(tokens, adapter))
        spans: list[KVSpan] = []
        states: list[WindowState] = []
        for node, n in path:
            spans.append(node.parts.cut(0, n))
            states.extend(node.states.values())
        if not path:
            return Match()
        last, n = path[-1]
        length = last.start + n
        # States that end beyond the match serve too, if their history reaches back far enough.
        if n == len(last.tokens):
            states.extend(s for c in last.children.values() for s in c.states.values())
        return Match(length, spans, [s for s in states if s.start < length])

    def insert(
        self,
        tokens: np.ndarray,
        cache: KVCache,
        states: Sequence[WindowState],
        pinned: int = 0,
        adapter: int = 0,
    ) -> None:
        """Keep what `cache` holds of `tokens`, int32 [n <= cache.length], sharing what is already held.

        The first `pinned` tokens are evicted last. The cache is used up: its slabs are freed on the way.
        """
        path = self._loaded(self._walk(tokens, adapter))
        node, held = self._roots.setdefault(adapter, Node(_NOTHING, 0, KVSpan())), 0
        if path:
            node, n = path[-1]
            held = node.start + n
            if n < len(node.tokens) and (held < len(tokens) or any(s.end == held for s in states)):
                node = self._split(node, n)
        if held < len(tokens) and int(tokens[held]) in node.children:
            tokens = tokens[:held]  # what follows is on disk, and does not fit in memory
        fresh: list[Node] = []
        while held < len(tokens):
            end = min(len(tokens), held + SPAN, pinned if held < pinned else len(tokens))
            child = Node(tokens[held:end].copy(), held, KVSpan(), parent=node)
            node.children[int(tokens[held])] = child
            fresh.append(child)
            node, held = child, end
        spans = cache.export([(child.start, child.end) for child in fresh], release=True)
        for child, parts in zip(fresh, spans, strict=True):
            child.parts = parts
        added: list[mx.array] = []
        line = list(self._lineage(node))
        for state in states:
            owner = next((n for n in line if n.start < state.end <= n.end), None)
            if owner is not None and state.end not in owner.states:
                owner.states[state.end] = state
                self.nbytes += state.nbytes
                if state.data is not None:
                    added.append(state.data)
        for owner in line:
            owner.used = self._clock
            owner.pinned = owner.pinned or owner.end <= pinned
        mx.eval(added)
        self.nbytes += sum(child.kv_bytes for child in fresh)
        if self._disk is not None and self._roots[adapter] in self._digests:
            self._unsaved += [n for n in reversed(line) if not n.saved]
        self.shrink(self.limit)

    def shrink(self, limit: int, keep: Collection[Node] = ()) -> None:
        """Drop what was used longest ago until at most `limit` bytes are held; the limit itself stays.

        The KV of `keep`, nodes with all their parents, is not dropped.
        """
        states = sum(n.state_bytes for n in self.nodes())
        if states > STATES_SHARE * limit or self.nbytes > limit:
            self._thin_states(states, STATES_SHARE * limit)
        kept = self._kept_longest()
        leaves = [
            (n in kept, n.used, id(n), n)
            for n in self.nodes()
            if n.loaded and n not in keep and self._outermost(n)
        ]
        heapq.heapify(leaves)
        while leaves and self.nbytes > max(0, limit):
            leaf = heapq.heappop(leaves)[3]
            parent = self._drop(leaf)
            if parent.parent is not None and parent not in keep and self._outermost(parent):
                heapq.heappush(leaves, (parent in kept, parent.used, id(parent), parent))
        self._unsaved = [n for n in dict.fromkeys(self._unsaved) if n.loaded]

    def _kept_longest(self) -> set[Node]:
        """Pinned nodes, those used last, up to their share of the limit: pins must not fill the store."""
        kept: set[Node] = set()
        room = PINNED_SHARE * self.limit
        for node in sorted((n for n in self.nodes() if n.pinned), key=lambda n: (-n.used, n.start)):
            room -= node.kv_bytes
            if room < 0:
                break
            kept.add(node)
        return kept

    def save(self) -> bool:
        """Write one node that is not on disk yet; False when there is none (or no disk)."""
        while self._disk is not None and self._unsaved:
            node = self._unsaved.pop(0)
            if node.saved or not node.loaded:
                continue
            before = [n.tokens for n in reversed(list(self._lineage(node)))][:-1]
            states = {end: state.whole() for end, state in node.states.items()}
            span = Span(node.tokens, node.parts.whole(), states)
            try:
                tokens, digest = np.concatenate([_NOTHING, *before]), self._digests[self._root_of(node)]
                node.path = self._disk.write(tokens, node.start, span, digest)
            except OSError as error:
                logger.warning("a prefix is not kept on disk: %s", error)
                return True
            node.saved_states = frozenset(node.states)
            if not self._unsaved:
                self._disk.trim()
            return True
        return False

    def clear(self) -> None:
        """Forget everything that is in memory."""
        for root in self._roots.values():
            root.children.clear()
        self._unsaved.clear()
        self.nbytes = 0

    def reset(self) -> None:
        """Forget everything that is in memory; what is on disk is found again."""
        self.clear()
        if self._disk is not None:
            for root, digest in self._digests.items():
                self._adopt(self._disk, root, digest)

    def forget(self, adapter: int) -> None:
        """Forget what was computed with an adapter, which is another one from now on."""
        root = self._roots.pop(adapter, None)
        if root is not None:
            self._digests.pop(root, None)
            for node in list(root.children.values()):
                self._forget(node)

    @staticmethod
    def _adopt(disk: PrefixDisk, root: Node, digest: str) -> None:
        """Take in what is on disk, by its headers; the rest is read when it is used."""
        by_name = {disk.name(_NOTHING, digest): root}
        for saved in disk.index():
            parent = by_name.get(saved.before)
            first = int(saved.tokens[0])
            if parent is None or parent.end != saved.start or first in parent.children:
                continue  # what it continued is gone or was split; or another process holds it otherwise
            node = Node(saved.tokens, saved.start, KVSpan(), parent=parent, path=saved.path, loaded=False)
            parent.children[first] = by_name[saved.upto] = node

    def _loaded(self, path: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
        """The path as far as it fits in the limit and is in memory or can be read; counts as a use."""
        self._clock += 1
        held = missing = fits = 0
        for node, _ in path:
            node.used = self._clock
            if node.path is not None and self._disk is not None:
                self._disk.touch(node.path)
            size = node.kv_bytes + node.state_bytes if node.loaded else _file_size(node.path)
            if not node.loaded and held + missing + size > self.limit:
                break
            held, missing = (held + size, missing) if node.loaded else (held, missing + size)
            fits += 1
        path = path[:fits]
        if missing:  # room is made before anything is read
            self.shrink(self.limit - missing, {node for node, _ in path})
        for i, (node, _) in enumerate(path):
            if node.loaded:
                continue
            span = None if self._disk is None or node.path is None else self._disk.read(node.path)
            if span is None or not self._holds(span, node):
                self._forget(node)
                return path[:i]
            node.parts, node.states = self._adopt_span(span.parts, span.states)
            node.loaded = True
            node.saved_states = frozenset(span.states)
            self.nbytes += node.kv_bytes + node.state_bytes
        return path

    def _holds(self, span: Span, node: Node) -> bool:
        """Whether a span that was read is the node's, in this model's shapes."""
        inside = all(node.start < state.end <= node.end for state in span.states.values())
        fits = self._fits(len(node.tokens), span.parts, span.states.values())
        return bool(np.array_equal(span.tokens, node.tokens)) and inside and fits

    @staticmethod
    def _outermost(node: Node) -> bool:
        """True when nothing in memory continues the node."""
        return not any(child.loaded for child in node.children.values())

    def _forget(self, node: Node) -> None:
        """Take a node and all that continues it out of the trie."""
        assert node.parent is not None
        for child in list(node.children.values()):
            self._forget(child)
        if node.loaded:
            self.nbytes -= node.kv_bytes + node.state_bytes
        # It may still be in line to be saved, and must not keep its memory there.
        node.parts, node.states, node.loaded = KVSpan(), {}, False
        del node.parent.children[int(node.tokens[0])]

    def _walk(self, tokens: np.ndarray, adapter: int) -> list[tuple[Node, int]]:
        """The nodes that `tokens` runs through, each with how many of its tokens agree (>= 1)."""
        path: list[tuple[Node, int]] = []
        node, at = self._roots.get(adapter, Node(_NOTHING, 0, KVSpan())), 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                break
            n = common_prefix(child.tokens, tokens[at:])
            path.append((child, n))
            if n < len(child.tokens):
                break
            node, at = child, at + n
        return path

    def _lineage(self, node: Node) -> Iterator[Node]:
        """The node and its parents, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def _root_of(self, node: Node) -> Node:
        while node.parent is not None:
            node = node.parent
        return node

    def _split(self, node: Node, n: int) -> Node:
        """Cut a node after its first n tokens; the front part, now the parent of the rest."""
        assert node.parent is not None
        middle = node.start + n
        # Compact copies: a view would keep the whole span alive after one half is dropped.
        head = Node(node.tokens[:n].copy(), node.start, node.parts.cut(0, n, compact=True))
        head.parent, head.used, head.pinned = node.parent, node.used, node.pinned
        head.states = {e: s for e, s in node.states.items() if e <= middle}
        node.parent.children[int(head.tokens[0])] = head
        node.parts = node.parts.cut(n, len(node.tokens), compact=True)
        node.tokens, node.start, node.parent = node.tokens[n:].copy(), middle, head
        node.states = {e: s for e, s in node.states.items() if e > middle}
        if node.path is not None:
            node.path.unlink(missing_ok=True)
            node.path = None
        if self._disk is not None and self._root_of(head) in self._digests:
            self._unsaved += [head, node]
        head.children[int(node.tokens[0])] = node
        mx.eval(head.parts, node.parts)
        return head

    def _drop(self, leaf: Node) -> Node:
        """Free an outermost node's memory, and forget it unless it can be read again; its parent."""
        assert leaf.parent is not None
        if leaf.path is None:
            self._forget(leaf)
        else:
            self.nbytes -= leaf.kv_bytes + leaf.state_bytes
            leaf.parts, leaf.states, leaf.loaded = KVSpan(), {}, False
        return leaf.parent

    def _thin_states(self, held: int, limit: float) -> None:
        """Drop window states, oldest use first, until they take `limit` bytes; ends of leaves last."""
        entries = [
            (end == node.end and not node.children, node.used, end, node)
            for node in self.nodes()
            for end in node.states
        ]
        for _, _, end, node in sorted(entries, key=lambda e: e[:3]):
            if held <= limit:
                return
            size = node.states.pop(end).nbytes
            held -= size
            self.nbytes -= size


def _file_size(path: Path | None) -> int:
    """Bytes of a file, 0 when there is none (any more)."""
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading entries of two vectors agree."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
