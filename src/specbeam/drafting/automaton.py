"""A suffix automaton: every part of a text, in linear space, growing token by token in amortised constant time.

Blumer et al. 1985; for drafting: SAM-Decoding (arXiv 2411.10666). See suffix.py.
"""

from __future__ import annotations

BORDER = -1  # between two texts of a corpus: matches nothing and is never proposed


class Automaton:
    """Of a growing text. State 0 is the empty match.

    State s stands for all parts of the text that occur at the same places: length[s] is the longest of them, link[s]
    the state of its longest end that occurs elsewhere too, place[s] an index of the text behind one occurrence.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.step: list[dict[int, int]] = [{}]
        self.length, self.link, self.place = [0], [-1], [0]
        self.last = 0  # the whole text

    def append(self, token: int) -> None:
        if token != BORDER:  # the latest occurrence of the match at the end so far: it goes on, with this token
            self.place[self.link[self.last]] = len(self.text)
        self.text.append(token)
        new, at = self._state({}, len(self.text), 0, len(self.text)), self.last
        while at >= 0 and token not in self.step[at]:
            self.step[at][token] = new
            at = self.link[at]
        if at >= 0:
            below = self.step[at][token]
            if self.length[below] != self.length[at] + 1:  # its shorter part now occurs more often: split it off
                longer, below = below, self._state(dict(self.step[below]), self.length[at] + 1, self.link[below],
                                                   self.place[below])
                self.link[longer] = below
                while at >= 0 and self.step[at].get(token) == longer:
                    self.step[at][token] = below
                    at = self.link[at]
            self.link[new] = below
        self.last = new

    def follow(self, state: int, length: int, token: int) -> tuple[int, int]:
        """The longest match once `token` has come behind a match of this state and length."""
        while state > 0 and token not in self.step[state]:
            state = self.link[state]
            length = self.length[state]
        below = self.step[state].get(token, 0)
        return below, length + 1 if below else 0

    def counts(self) -> list[int]:
        """How often the parts of each state occur in the text."""
        found, at = [0] * len(self.length), 0
        for token in self.text:
            at = self.step[at][token]
            found[at] = 1
        for state in sorted(range(1, len(found)), key=self.length.__getitem__, reverse=True):
            found[self.link[state]] += found[state]
        return found

    def _state(self, step: dict[int, int], length: int, link: int, place: int) -> int:
        self.step.append(step)
        self.length.append(length)
        self.link.append(link)
        self.place.append(place)
        return len(self.length) - 1
