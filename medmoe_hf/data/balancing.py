"""Balanced sampling: groups of rows, how often each is drawn, and the order in which an epoch draws them.

Groups form a tree, with one level per key: modality, then source, then label, for example. On each level a group of n
rows has a share of its parent that is proportional to n^(1 - power): power 0 leaves the data as they are, 1 makes all
groups of a parent equally frequent.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medmoe_hf.errors import ArgumentError

DEFAULT_POWER = 0.5
"""A group that is 100 times smaller than another one is then drawn 10 times less often, and each of its rows 10 times
more often. With power 1, each of its rows would be drawn 100 times more often, and soon be known by heart."""

Group = tuple[str, ...]
"""The values of the keys of a group, one per level."""

_MAX_CHILDREN = 20  # groups of one parent that a report lists


def check_balance(balance: Sequence[str], power: float | Mapping[str, float], mixing: str, shuffle: bool) -> None:
    """Checks the settings of balanced sampling.

    Args:
        balance: Key of each level.
        power: Power of all levels, or of some by key.
        mixing: How sources are mixed otherwise.
        shuffle: Whether samples are shuffled.

    Raises:
        ValueError: For repeated or unknown keys, powers outside 0..1, and settings that contradict `balance`.
    """
    if repeated := [key for number, key in enumerate(balance) if key in balance[:number]]:
        raise ArgumentError(f"`balance` has the key `{repeated[0]}` twice")
    powers = power if isinstance(power, Mapping) else dict.fromkeys(balance, power)
    if unknown := sorted(powers.keys() - set(balance)):
        raise ArgumentError(f"`balance_power` has the key `{unknown[0]}`, which is not in `balance`")
    for one in powers.values():
        if not 0 <= one <= 1:
            raise ArgumentError(f"`balance_power` must be in 0..1, got {one}")
    if mixing == "modality":
        raise ArgumentError(
            "`mixing: modality` and `balance` contradict each other; use `balance: [modality]` and, for equal shares, "
            "`balance_power: 1`"
        )
    if not shuffle:
        raise ArgumentError("`balance` draws samples at random: raise `shuffle_buffer`")


def powers_of(balance: Sequence[str], power: float | Mapping[str, float]) -> list[float]:
    """Returns the power of each level of `balance`; that of keys without one is `DEFAULT_POWER`."""
    return [power.get(key, DEFAULT_POWER) if isinstance(power, Mapping) else power for key in balance]


def group_shares(
    counts: Mapping[Group, int],
    powers: Sequence[float],
    weights: Mapping[Group, float] | None = None,
    weighted: Collection[int] = (),
) -> dict[Group, float]:
    """Returns the share of each group of all draws.

    Args:
        counts: Number of rows of each group, above 0.
        powers: Power of each level, 0..1.
        weights: Weight of the rows of each group; None for 1. The mean weight of the rows of a group is a factor on
            its share of its parent.
        weighted: Levels on which weights count, from 0.

    Returns:
        Shares, which sum to 1.

    Example:
        >>> from medmoe_hf.data.balancing import group_shares
        >>> group_shares({("ct", "a"): 400, ("ct", "b"): 400, ("us", "c"): 200}, [0.5, 1.0])[("us", "c")]
        0.3333333333333333
    """
    shares = dict.fromkeys(counts, 1.0)
    for level, power in enumerate(powers):
        children: dict[Group, float] = {}
        mass: dict[Group, float] = {}
        for group, count in counts.items():
            child, weight = group[: level + 1], 1.0 if weights is None or level not in weighted else weights[group]
            children[child] = children.get(child, 0) + count
            mass[child] = mass.get(child, 0.0) + count * weight
        sizes = {child: count ** (1 - power) * mass[child] / count for child, count in children.items()}
        totals: dict[Group, float] = {}
        for child, size in sizes.items():
            totals[child[:-1]] = totals.get(child[:-1], 0.0) + size
        for group in counts:
            shares[group] *= sizes[group[: level + 1]] / totals[group[:level]]
    return shares


def _random_bits(seed: str, start: int, count: int) -> NDArray[np.uint64]:
    """Returns numbers `start` to `start + count - 1` of a sequence of random 64-bit integers (SplitMix64).

    Any part of the sequence can be computed by itself, and for thousands of small groups this is much faster than to
    seed a generator for each.
    """
    key = np.frombuffer(hashlib.sha256(seed.encode()).digest()[:8], dtype="<u8").astype(np.uint64)
    bits = key + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed


@dataclass(frozen=True)
class BalancedRows:
    """All rows of the data, by group.

    Attributes:
        keys: Name of each level. A further level divides the groups by entry of the YAML file.
        rows: Indices of the rows of each group.
        shares: Share of each group of all draws, in the same order; they sum to 1.
    """

    keys: tuple[str, ...]
    rows: dict[Group, NDArray[np.int64]]
    shares: dict[Group, float]

    @property
    def total(self) -> int:
        """Number of rows, and of draws in an epoch on average."""
        return sum(map(len, self.rows.values()))

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Returns the rows that an epoch draws, in order.

        Within a group, all rows are drawn once, in random order, before one is drawn again, also across epochs. The
        draws of a group are spread evenly over the epoch, so that every part of it has the expected shares.

        Args:
            seed: Seed of all choices.
            epoch: Number of the epoch, from 0.
        """
        drawn, times = [], []
        total = self.total
        for number, (group, rows) in enumerate(self.rows.items()):
            # Rounded, so that no difference in the last bit between machines changes the number of draws.
            rate = round(total * self.shares[group], 6)
            offset = _random_bits(f"{seed} balance {number} offset", 0, 1)[0] / 2**64
            start, stop = int(epoch * rate + offset), int((epoch + 1) * rate + offset)
            if start == stop:
                continue
            # Each line is one random order of all rows.
            size, first = len(rows), start // len(rows)
            lines = (stop - 1) // size + 1 - first
            bits = _random_bits(f"{seed} balance {number}", first * size, lines * size)
            orders = np.argsort(bits.reshape(lines, size), axis=1, kind="stable")
            drawn.append(rows[orders.ravel()[start - first * size : stop - first * size]])
            jitter = _random_bits(f"{seed} balance {number} epoch {epoch}", 0, stop - start) / 2**64
            times.append((np.arange(stop - start) + jitter) / (stop - start))
        order: NDArray[np.int64] = np.concatenate(drawn)[np.argsort(np.concatenate(times), kind="stable")]
        return order

    def lines(self) -> Iterator[str]:
        """Yields the lines of a report: of each group, its rows, its shares of rows and draws, and draws per row."""
        yield f"{'':<44}{'rows':>8}{'of rows':>9}{'of draws':>10}{'draws per row':>15}"
        yield from self._lines(())
        once = {group: self.shares[group] * self.total / len(rows) for group, rows in self.rows.items()}
        most = max(once, key=lambda group: once[group])
        name = " / ".join(filter(None, most[: len(self.keys)]))
        yield f"most often drawn: {name}, each row {once[most]:.3g} times per epoch"

    def _lines(self, parent: Group) -> Iterator[str]:
        level = len(parent)
        if level == len(self.keys):
            return
        children: dict[Group, list[Group]] = {}
        for group in self.rows:
            if group[:level] == parent:
                children.setdefault(group[: level + 1], []).append(group)
        sizes = {child: sum(len(self.rows[group]) for group in groups) for child, groups in children.items()}
        if level and len(children) == 1 and not next(iter(children))[-1]:
            return  # this level divides nothing
        for child in sorted(sizes, key=lambda one: -sizes[one])[:_MAX_CHILDREN]:
            rows, share = sizes[child], sum(self.shares[group] for group in children[child])
            name = f"{'  ' * level}{child[-1] or f'no {self.keys[level]}'}"
            name = name if len(name) <= 43 else f"{name[:40]}..."
            per_row = share * self.total / rows
            yield f"{name:<44}{rows:>8,}{rows / self.total:>9.1%}{share:>10.1%}{per_row:>15.3g}"
            yield from self._lines(child)
        if len(children) > _MAX_CHILDREN:
            yield f"{'  ' * level}... and {len(children) - _MAX_CHILDREN} more"
