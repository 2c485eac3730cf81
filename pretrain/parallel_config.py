"""Which processes train which networks: a group of `pretrain.config.PretrainConfig`."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from peerlearn.config import added, require

_TEAM = re.compile(r"(\d+)(?:-(\d+))?:(\d+)(?:-(\d+))?")


class Team(NamedTuple):
    """Networks that the same processes train.

    Attributes:
        networks: their numbers, rising.
        ranks: numbers of the processes, rising; each takes a part of every batch.
    """

    networks: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of a run share the work.

    Attributes:
        cohort: number of teams that the processes and the networks are dealt to, so that each process holds the
            networks of its team alone; 1 = every process holds all networks. Or what each team has, as
            NETWORKS:PROCESSES with single numbers or ranges from 0: `0:0-2 1:3` gives network 0 three processes and
            network 1 one.
    """

    cohort: int | list[str] = added(1)

    def __post_init__(self) -> None:
        if isinstance(self.cohort, int):
            require(self.cohort >= 1, f"parallel.cohort must be at least 1, got {self.cohort}")
            return
        require(bool(self.cohort), "parallel.cohort must name at least one team, got none")
        for text in self.cohort:
            require(
                _TEAM.fullmatch(text) is not None and all(map(_range_rises, text.split(":"))),
                f"parallel.cohort must be a number or teams such as 0:0-2 1:3, NETWORKS:PROCESSES, got {text!r}",
            )

    @property
    def is_split(self) -> bool:
        """Whether networks lie on different processes."""
        return self.cohort != 1 and (isinstance(self.cohort, int) or len(self.cohort) > 1)

    def teams(self, networks: int, processes: int) -> list[Team]:
        """The teams of so many networks and processes, in the order in which the config names them.

        Raises:
            ValueError: they do not fit. The message names the key and the fix.
        """
        if isinstance(self.cohort, int):
            return _equal_teams(self.cohort, networks, processes)
        most = max(networks, processes)
        teams = [Team(*(_numbers(part, most) for part in text.split(":"))) for text in self.cohort]
        for what, count, found in (
            ("network", networks, [n for team in teams for n in team.networks]),
            ("process", processes, [n for team in teams for n in team.ranks]),
        ):
            for number in range(max([count, *(n + 1 for n in found)])):
                times = found.count(number)
                there = "" if number < count else f", and the last is {count - 1}"
                if times != 1 or there:
                    raise ValueError(
                        f"parallel.cohort {' '.join(self.cohort)} must name each {what} once: it names {what} {number} "
                        f"{times} times{there}"
                    )
        return teams

    def layout(self, networks: int, processes: int) -> str:
        """The teams as `cohort` would name them, to compare; "" where all processes hold all networks."""
        teams = self.teams(networks, processes)
        words = (f"{','.join(map(str, n))}:{','.join(map(str, r))}" for n, r in sorted(teams))
        return f"networks:processes {' '.join(words)}" if len(teams) > 1 else ""


def _equal_teams(count: int, networks: int, processes: int) -> list[Team]:
    teams = "name teams such as 0:0-2 1:3 (NETWORKS:PROCESSES)"
    if networks % count:
        raise ValueError(
            f"parallel.cohort {count} must divide cohort.networks, {networks}: take another number, or {teams}"
        )
    if processes % count:
        raise ValueError(
            f"parallel.cohort {count} must divide the number of processes, {processes}: start a multiple of {count} by "
            f"torchrun or `peerlearn submit`, or {teams}"
        )
    n, p = networks // count, processes // count
    return [
        Team(tuple(range(t * n, (t + 1) * n)), tuple(range(t * p, (t + 1) * p)))
        for t in range(count)
    ]


def _ends(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _numbers(text: str, most: int) -> tuple[int, ...]:
    """The numbers of a range up to ``most``, which is too many already."""
    first, last = _ends(text)
    return tuple(range(min(first, most), min(last, most) + 1))


def _range_rises(text: str) -> bool:
    first, last = _ends(text)
    return first <= last
