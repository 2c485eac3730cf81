"""What the model card of a trained network tells of its training: the recipe, and what the monitor has measured.

A card must be the same whenever it is written: here stands no time, no path, and no key that a resumed run may change.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from peerlearn.config import fixed_values, flat_config
from peerlearn.data.licences import licence_of
from peerlearn.data.titles import FOLDER
from peerlearn.runs.model_card import CardFacts, Figure, fenced
from peerlearn.runs.score_names import TOP1, TOP5, parse_score_name, protocol_of
from pretrain.cohort_config import RANDOM, TIMM
from pretrain.config import PretrainConfig

# What a kind of figures measures, and on which split.
_KINDS = {
    "knn": ("weighted kNN", "test"),
    "linear": ("linear classifier trained beside the networks", "test"),
    "episode": ("nearest centroid in few-shot episodes", "validation"),
    "validation": ("the network's classifier", "validation"),
    "test": ("the network's classifier", "test"),
}
_FIGURES = {TOP1: ("top-1", "accuracy"), TOP5: ("top-5", "top_5_accuracy")}
_LABEL_FREE = ("moco", "simclr")


def card_facts(
    config: PretrainConfig, *, title: str, network: str, row: Mapping[str, Any]
) -> CardFacts:
    """What the card of one network tells of its training.

    Args:
        config: config of the run.
        title: title of the data set that it was trained on.
        network: name of the network, as in score names.
        row: row of metrics.jsonl at the step of the weights; empty = nothing was measured there.
    """
    # The title of a folder of images is the folder's name, which may be that of a data set.
    dataset = FOLDER if config.data.name == FOLDER else title
    licence = licence_of(dataset)
    tags = [config.method, *(["self-supervised"] if config.method in _LABEL_FREE else [])]
    return CardFacts(
        tags=[*tags, "mutual-contrastive-learning"] if config.cohort.networks > 1 else tags,
        datasets=[licence.hub_id] if licence.hub_id else [],
        recipe=_recipe(config, dataset),
        figures=measured_figures(row, network, dataset=title),
        licence=licence.words,
    )


def measured_figures(row: Mapping[str, Any], network: str, *, dataset: str) -> list[Figure]:
    """The accuracies of one network in a row of metrics.jsonl, with their protocols."""
    figures = []
    for key, value in row.items():
        name = parse_score_name(key)
        if name is None or name.network != network:
            continue
        kind, ending = name.figure[: -len(TOP1)], name.figure[-len(TOP1) :]
        if kind in _KINDS and ending in _FIGURES:
            (words, split), (rank, metric) = _KINDS[kind], _FIGURES[ending]
            figures.append(
                Figure(
                    name=f"{rank} accuracy in percent, {words}",
                    metric=metric,
                    value=value,
                    dataset=dataset,
                    split=split,
                    protocol=protocol_of(row, kind),
                )
            )
    return figures


def recipe_file(config: PretrainConfig, dataset: str) -> dict[str, Any]:
    """The content of a config file that trains the same networks: what decides them and is not the default.

    Args:
        config: config of the run.
        dataset: name of the dataset, which is not the config's where that was not to be had.
    """
    defaults = flat_config(PretrainConfig())
    values = fixed_values(config) | {"data.name": dataset}
    if config.cohort.init is not None and not {*config.cohort.initial()} <= {RANDOM, TIMM}:
        del values["cohort.init"]
    if config.data.backend == "ffcv":
        # It needs a packed file, which is a path.
        del values["data.backend"]
    content: dict[str, Any] = {"method": config.method}
    for key, value in values.items():
        if value != defaults[key]:
            *groups, name = key.split(".")
            inner = content
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[name] = value
    return content


def _recipe(config: PretrainConfig, dataset: str) -> str:
    content = recipe_file(config, dataset)
    missing = ["`--data.root`, the folder of the images"] if dataset == FOLDER else []
    if config.cohort.init is not None and "init" not in content.get("cohort", {}):
        missing.append("`--cohort.init`, the weights that the origin names")
    needs = f" It also takes {' and '.join(missing)}." if missing else ""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return (
        "Trained by peerlearn with this config. Every key that is not named has its default:\n\n"
        f"{fenced(text, 'yaml')}\nWith the config as `recipe.yaml`, this command trains the network anew.{needs}\n\n"
        f"{fenced('peerlearn pretrain recipe.yaml', 'bash')}"
    )
