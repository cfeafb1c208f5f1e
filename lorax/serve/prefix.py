"""`PrefixCache`: pages of keys and values by what they were computed from, to be used by prompts that begin alike.

A full page of a sequence is a node of a tree. Its key is its parent, its tokens, and at the root the adapter's content:

    node = (parent, tokens of the page)         root = digest of the adapter's contents, "" for the base alone

so two sequences share a page exactly if the same weights read the same tokens before it. A name would not do: another
adapter may have it tomorrow. Keys are compared, not hashed to a number: no two texts can be taken for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorax.serve.pages import PagePool

Root = str


class Node:
    """A page in the cache. users: sequences that hold it; children: nodes that continue it."""

    __slots__ = ("children", "key", "page", "parent", "used_at", "users")

    def __init__(self, parent: Node | None, key: tuple[Root | Node, tuple[int, ...]], page: int):
        self.parent, self.key, self.page = parent, key, page
        self.users = self.children = self.used_at = 0


class PrefixCache:
    """A tree of pages. Those without users are kept until somebody needs the room.

    Args:
        pool: where pages are given back to.
        page_tokens: tokens in a page.
        enabled: False keeps nothing.
    """

    def __init__(self, pool: PagePool, page_tokens: int, enabled: bool = True):
        self._pool, self._size, self.enabled = pool, page_tokens, enabled
        self._nodes: dict[tuple[Root | Node, tuple[int, ...]], Node] = {}
        # Nodes that nobody uses, in the order in which they were left: the oldest goes first.
        self._idle: dict[Node, None] = {}
        # Pages that sequences found, and pages that they could have found.
        self.hits = self.lookups = 0

    @property
    def idle(self) -> int:
        """Pages that can be had by `reclaim`."""
        return len(self._idle)

    @property
    def pages(self) -> int:
        """Pages in the tree, used or not."""
        return len(self._nodes)

    def acquire(self, root: Root, tokens: Sequence[int]) -> list[Node]:
        """The longest run of pages that `tokens` begins with, now used by the caller. At least one token is left over.

        root: the adapter's digest.
        """
        found: list[Node] = []
        at: Root | Node = root
        for i in range((len(tokens) - 1) // self._size):
            node = self._nodes.get((at, tuple(tokens[i * self._size : (i + 1) * self._size])))
            if node is None:
                break
            self._use(node)
            found.append(node)
            at = node
        return found

    def insert(self, root: Root, before: Sequence[Node], tokens: Sequence[int], page: int) -> Node:
        """Put a page that has just been filled into the tree; its owner uses it.

        before: the nodes of the pages before it. tokens: those of this page.

        Returns:
            The page's node, or the one that was there already: then its page holds the same, and the caller gives its
            own page back and takes that.
        """
        parent = before[-1] if before else None
        key = (root if parent is None else parent, tuple(tokens))
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(parent, key, page)
            if parent is not None:
                parent.children += 1
        self._use(node)
        return node

    def release(self, nodes: Sequence[Node]) -> None:
        """The caller no longer uses these."""
        # Ends first: a page is never older than what continues it.
        for node in reversed(nodes):
            node.users -= 1
            assert node.users >= 0, "a page of the prefix cache was released twice"
            if not node.users:
                self._idle[node] = None

    def reclaim(self, count: int) -> int:
        """Give up to `count` pages back to the pool, the longest unused first; how many were."""
        done = 0
        while done < count and self._idle:
            node = next((n for n in self._idle if not n.children), None)
            # A node's parents are used where it is used, so an idle end exists.
            assert node is not None, "the prefix cache has idle pages and no idle end"
            self._drop(node)
            done += 1
        return done

    def _use(self, node: Node) -> None:
        node.users += 1
        self._idle.pop(node, None)

    def _drop(self, node: Node) -> None:
        del self._idle[node]
        del self._nodes[node.key]
        if node.parent is not None:
            node.parent.children -= 1
        self._pool.give([node.page])
