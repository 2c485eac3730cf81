"""Teams of a run's processes: that they fit the networks, the batch and the machines."""

from collections import Counter
from collections.abc import Iterator, Sequence

from peerlearn.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.parallel_config import Team


def teams_of(config: PretrainConfig, processes: int) -> list[Team]:
    """Which of so many processes train which networks.

    Raises:
        UserError: the config's teams do not fit them.
    """
    try:
        return config.parallel.teams(config.cohort.networks, processes)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_share(config: PretrainConfig, processes: int) -> None:
    """Each rank's part of a micro-batch must give batch norm something to normalise, and losses their images.

    Raises:
        UserError: it does not.
    """
    images, accumulation = config.images_per_step, config.accumulation_steps
    teams = teams_of(config, processes)
    sizes = {len(team.ranks) for team in teams}
    splits = config.cohort.batch_norm_splits
    if len(sizes) > 1 and accumulation > 1:
        raise UserError(
            f"accumulation_steps must be 1, got {accumulation}, where parallel.cohort gives networks unlike numbers of "
            "processes: parts of the batch would be of other images for each"
        )
    for size in sorted(sizes):
        if splits > 1 and splits % size:
            raise UserError(
                f"cohort.batch_norm_splits {splits} cannot be shared by {size} processes: make it 1 or a multiple of "
                f"{size}"
            )
        parts = size * accumulation
        if images % parts or images // parts < 2:
            raise UserError(
                f"{config.step_in_words} must divide into {size} processes{' of a team' if len(teams) > 1 else ''} x "
                f"accumulation_steps {accumulation} = {parts} parts of at least 2 images"
            )
    if images % (processes * accumulation):
        raise UserError(
            f"{config.step_in_words} must divide into {processes} processes x accumulation_steps {accumulation}: each "
            "computes the losses of as many images"
        )


def check_not_shared(shared_stages: int | str, config: PretrainConfig) -> None:
    """Networks on different processes share no stages.

    Raises:
        UserError: they would, by the paper's rule for three or more networks.
    """
    if shared_stages and config.parallel.is_split:
        raise UserError(
            "cohort.share_stages must be 0 with parallel.cohort: these networks share stages by the paper's rule, and "
            "networks that do train on the same processes"
        )


def placement(teams: Sequence[Team], hosts: Sequence[str]) -> Iterator[str]:
    """Where each team lies, a line each, and which team is spread over machines though it would fit on one.

    Args:
        teams: the teams.
        hosts: name of the machine of each process.
    """
    room = max(Counter(hosts).values())
    for team in teams:
        own = list(dict.fromkeys(hosts[rank] for rank in team.ranks))
        line = f"{_numbered('network', team.networks)}: {_numbered('process', team.ranks)} on {', '.join(own)}"
        if len(own) > 1 and len(team.ranks) <= room:
            line += f", though one machine runs {room} processes: gradients cross the network"
        yield line


def _numbered(word: str, numbers: Sequence[int]) -> str:
    plural = f"{word}es" if word.endswith("s") else f"{word}s"
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    return f"{plural} {numbers[0]} to {numbers[-1]}"
