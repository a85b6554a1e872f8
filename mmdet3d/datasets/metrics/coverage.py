"""Which samples a metric has seen, so that none is missing and none counts twice."""

from collections.abc import Iterable

from mmdet3d.utils.text import listing


class CoverageError(ValueError):
    """Samples are missing from an evaluation, or were added twice."""


class Coverage:
    """The tokens of the samples that were added, in order."""

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._tokens: dict[str, None] = {}
        for token in tokens:
            self.claim(token)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> list[str]:
        """All tokens, in the order in which they were added."""
        return list(self._tokens)

    def refuse_seen(self, token: str) -> None:
        """Raises CoverageError if ``token`` was claimed before, TypeError if it is no string."""
        if not isinstance(token, str):
            raise TypeError(f"a sample token is a string, got {token!r}")
        if token in self._tokens:
            raise CoverageError(f"sample {token} was added twice")

    def claim(self, token: str) -> None:
        """Note a sample; raises CoverageError if it was noted before."""
        self.refuse_seen(token)
        self._tokens[token] = None

    def merge(self, other: "Coverage") -> None:
        """Note all samples of ``other``; raises CoverageError, and notes nothing, if some were noted before."""
        if doubled := [token for token in other._tokens if token in self._tokens]:
            raise CoverageError(f"{len(doubled)} samples were added twice: {listing(doubled)}")
        self._tokens.update(other._tokens)

    def check(self, expected: Iterable[str]) -> None:
        """Raises CoverageError unless exactly the ``expected`` samples were added; lists those that differ."""
        wanted = dict.fromkeys(expected)
        problems = []
        if missing := [token for token in wanted if token not in self._tokens]:
            problems.append(f"{len(missing)} of {len(wanted)} samples are missing: {listing(missing)}")
        if unknown := [token for token in self._tokens if token not in wanted]:
            problems.append(f"{len(unknown)} samples do not belong to the split: {listing(unknown)}")
        if problems:
            raise CoverageError("; ".join(problems))
