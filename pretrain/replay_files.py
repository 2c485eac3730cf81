"""The folder of a step that was computed again, and what there is to tell of it.

RUN/replay/step-00000012/
    step.json               what happened, and whether it agrees with what the run has logged and saved
    views.safetensors       view/0, view/1 (B, channels, S, S) as the networks saw them; index, labels (B,)
    outputs.safetensors     net/0/features, net/0/embedding, net/0/logits, net/key-0/embedding:
                            (processes, calls, rows, size)
    terms.safetensors       scl_hard, ...: (processes, micro-batches, M)
    gradients.safetensors   gradient of each parameter, by its name in a save
    views.png               the first images and their views

Dimensions: M networks, B batch of all processes, S side of the views in pixels.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from peerlearn.compute.resume import config_changes
from peerlearn.data.image_folders import DecodeError
from peerlearn.errors import UserError
from peerlearn.runs.files import replace_folder
from pretrain.config import PretrainConfig
from pretrain.method import method_class
from pretrain.preview import views_in_words
from pretrain.state import Training
from pretrain.training_data import view_recipes
from pretrain.view_sheet import Row, Sheet, draw_sheet, image_name

# Images of a batch that are drawn, and differences that are told.
_MOST_IMAGES, _MOST_TOLD = 8, 3


def write_step(
    temporary: Path,
    final: Path,
    facts: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
    training: Training,
) -> None:
    """Write the folder of a step, which takes the place of an older one once it is whole.

    Args:
        temporary: empty folder to write to.
        final: folder of the step.
        facts: content of step.json.
        files: tensors by file and name.
        training: training that did the step.

    Raises:
        UserError: the disk does not take it.
    """
    try:
        for name, tensors in files.items():
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            (temporary / f"{name}.safetensors").write_bytes(safetensors.torch.save(plain))
        draw_sheet(temporary / "views.png", _sheet(training, facts, files["views"]))
        (temporary / "step.json").write_text(json.dumps(_plain(facts), indent=2) + "\n")
        replace_folder(temporary, final)
    except OSError as error:
        raise unwritable(final, error) from error


def unwritable(folder: Path, error: OSError) -> UserError:
    """The error of a folder that the disk does not take."""
    return UserError(
        f"{folder} cannot be written ({error.strerror or error}): make room, or copy the run and replay the copy"
    )


def _plain(value: Any) -> Any:
    """The value with names for NaN and Inf, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _sheet(training: Training, facts: Mapping[str, Any], views: Mapping[str, Tensor]) -> Sheet:
    dataset, config = training.dataset, training.config
    mean, std = (torch.tensor(each)[:, None, None] for each in (dataset.mean, dataset.std))
    columns = [tensor.cpu() for name, tensor in views.items() if name.startswith("view/")]
    rows = []
    for number, index in enumerate(views["index"][:_MOST_IMAGES].tolist()):
        panels = [(view[number] * std + mean).clamp(0, 1) for view in columns]
        try:
            image = dataset.read(index)
        except DecodeError:
            # The views are those of its substitute.
            image = torch.zeros_like(panels[0])
        rows.append(Row(image_name(dataset, index), [image, *panels]))
    recipes = view_recipes(config, method_class(config.method).views)
    title = f"{facts['run']}, step {facts['step']} (epoch {facts['epoch']}, batch {facts['batch']})"
    shown = f"{len(rows)} of its {len(views['index'])} images"
    return Sheet(
        ["image", *(f"view {view + 1}" for view in range(len(columns)))],
        rows,
        "\n".join([f"{title}: {shown}", *views_in_words(recipes)]),
    )


def told(facts: Mapping[str, Any], config: PretrainConfig) -> Iterator[str]:
    """What step.json says, in lines for people."""
    step, agrees = facts["step"], facts["agrees"]
    yield f"{facts['run']}, step {step} (epoch {facts['epoch']}, batch {facts['batch']}), from {facts['from']}"
    yield from _skip_told(facts)
    if facts["first_not_finite"]:
        yield f"first tensor that is not finite: {facts['first_not_finite']}"
    if facts["anomaly"]:
        yield f"anomaly: {facts['anomaly']['in_words']}"
    if agrees["row"] is None:
        yield (
            f"metrics.jsonl has no row of step {step} to compare with "
            f"(monitor.log_every_steps {config.monitor.log_every_steps})"
        )
    else:
        different = [
            f"{key} {old!r} -> {new!r}" for key, (old, new) in agrees["row"]["differences"].items()
        ]
        yield _agreement(f"row of step {step}", agrees["row"]["figures"], "figures", different)
    if agrees["save"] is not None:
        save = agrees["save"]
        yield _agreement(f"save of step {step}", save["tensors"], "tensors", save["differences"])
    yield _machines(facts)


def _skip_told(facts: Mapping[str, Any]) -> Iterator[str]:
    training = facts["training"]
    theirs = training["reasons"][-1] if training["skipped"] else None
    if facts["skipped"] and theirs == facts["reason"]:
        yield f"skipped, as in training: {theirs}"
    elif facts["skipped"]:
        yield f"skipped: {facts['reason']}; in training: {theirs or 'not skipped'}"
    elif theirs:
        yield f"not skipped; training skipped it: {theirs}. That was the machine's fault, or the machines differ"
    elif facts["overflows"]:
        yield (
            f"fp16: the gradients overflow at the loss scale {facts['loss_scale']:g}: the optimiser left the step out "
            "and halved the scale"
        )


def _agreement(what: str, count: int, unit: str, different: list[str]) -> str:
    if not different:
        return f"{what}: its {count} {unit} are equal, bit for bit"
    more = f" and {len(different) - _MOST_TOLD} more" if len(different) > _MOST_TOLD else ""
    return f"{what}: {len(different)} of its {count} {unit} differ: {', '.join(different[:_MOST_TOLD])}{more}"


def _machines(facts: Mapping[str, Any]) -> str:
    trained, replayed = facts["trained_on"], facts["replayed_on"]
    cards = ", ".join(replayed["cuda_devices"])
    device = f"{facts['device']} ({cards})" if cards else facts["device"]
    here = f"{device}, {replayed['platform']}, torch {replayed['versions']['torch']}"
    if trained is None:
        return f"replayed on {here}; the run does not tell what it was trained on"
    changes = [f"{key} {a!r} -> {b!r}" for key, (a, b) in config_changes(trained, replayed)]
    if not changes:
        return f"trained and replayed on {here}"
    return f"replayed on {here}; since training has changed: {', '.join(changes)}"
