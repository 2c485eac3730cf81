"""An export: one network's backbone as a folder that this project and timm load alike.

    FOLDER/  model.safetensors (timm's key names)   config.json (timm's local-dir layout)   README.md

The bytes do not depend on when, where or in which attempt an export was written, and nothing is unpickled.
config.json holds the SHA-256 of the weights and of its own other entries: safetensors alone would load a flipped
byte in silence.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from peerlearn.backbones import TIMM_NETWORKS, create_backbone, size_arguments
from peerlearn.data.augment import resized_side
from peerlearn.errors import UserError
from peerlearn.runs.export_folders import (
    CARD_FILE,
    CONFIG_FILE,
    SEAL,
    WEIGHTS_FILE,
    refuse_detector,
)
from peerlearn.runs.files import file_sha256, load_tensors, replace_folder
from peerlearn.runs.json_files import read_json_object
from peerlearn.runs.model_card import (
    MODEL_INDEX,
    ORIGIN_TABLE,
    CardFacts,
    card_head,
    figure_table,
    model_index,
)
from peerlearn.runs.text import markdown_cell


def save_export(
    backbone: nn.Module,
    folder: Path,
    *,
    architecture: str,
    in_chans: int,
    small_images: bool,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    provenance: Mapping[str, object],
    origin: str = "pretrained by peerlearn",
    classifier: nn.Linear | None = None,
    seen_whole: bool | None = None,
    facts: CardFacts | None = None,
) -> str:
    """Write `folder` as a whole. An older folder of that name is replaced.

    Args:
        backbone: network that `create_backbone` made from the four arguments below. Floating-point
            tensors are stored as float32. Stages shared with other networks are stored in full.
        folder: folder of the export; missing parents are made.
        architecture: name of the network, as given to `create_backbone`.
        in_chans: channels of the images, as given to `create_backbone`.
        small_images: whether the network has a small-image stem, as given to `create_backbone`.
        image_size: height and width of the images in pixels, as given to `create_backbone`.
        mean: mean per channel by which the training images were normalised.
        std: standard deviation per channel by which the training images were normalised.
        provenance: facts about the training, name -> value, for README.md alone. Times and paths do not belong here.
        origin: words about the network's origin, for README.md's title after the network's name.
        classifier: layer from the backbone's features to class logits. It is stored under timm's name for it, so that
            timm's network gives logits. `load_export` leaves it out, because evaluations see the features.
        seen_whole: whether evaluation views show such images whole (`is_seen_whole`); None = unknown: images for
            networks of 64 pixels and more are taken for photographs, of which the centre is seen.
        facts: what README.md tells beside that; None = nothing is known.

    Returns:
        `export_hash(folder)`.
    """
    if seen_whole is None:
        seen_whole = image_size < 64
    view = _timm_view(image_size, seen_whole=seen_whole)
    config = _config(
        backbone, in_chans=in_chans, image_size=image_size, mean=mean, std=std, view=view
    )
    tensors = _stored_tensors(backbone)
    if classifier is not None:
        config["num_classes"] = config["pretrained_cfg"]["num_classes"] = classifier.out_features
        tensors |= _stored_tensors(classifier, prefix=f"{classifier_name(backbone)}.")
    call = (
        f"create_backbone({architecture!r}, in_chans={in_chans}, small_images={small_images}, "
        f"image_size={image_size})"
    )
    card = _model_card(
        config["architecture"],
        origin,
        call,
        provenance,
        facts or CardFacts(),
        pretrained_cfg=config["pretrained_cfg"],
        classifies=classifier is not None,
    )
    # Not save_file: only their owner could read its files. One entry of metadata, because the
    # order of several entries would differ from run to run.
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_folder(
        folder,
        {
            WEIGHTS_FILE: weights,
            CONFIG_FILE: (json.dumps(sealed(config, weights), indent=2) + "\n").encode(),
            CARD_FILE: card.encode(),
        },
    )
    return export_hash(folder)


def classifier_name(backbone: nn.Module) -> str:
    """timm's name for the classifier of this network.

    Raises:
        UserError: the network has no classifier, or several.
    """
    registered: Any = backbone.pretrained_cfg
    name = registered.get("classifier")
    if not isinstance(name, str):
        raise _without_classifier(registered["architecture"], f"timm names {name!r}")
    return name


def check_classifier(
    backbone: nn.Module, num_classes: int, *, in_chans: int, image_size: int
) -> None:
    """Make sure that timm's network has a linear classifier that an export can fill.

    Args:
        backbone: network that `create_backbone` made from `in_chans` and `image_size`.
        num_classes: number of classes.
        in_chans: channels of the images.
        image_size: height and width of the images in pixels.

    Raises:
        UserError: timm's network has another kind of classifier, none, or several.
    """
    registered: Any = backbone.pretrained_cfg
    architecture, name = registered["architecture"], f"{classifier_name(backbone)}.weight"
    with torch.device("meta"):
        network = timm.create_model(
            architecture,
            num_classes=num_classes,
            in_chans=in_chans,
            **size_arguments(architecture, image_size),
        )
    weight = network.state_dict().get(name)
    expected = (num_classes, backbone.num_features)
    if weight is None or tuple(weight.shape) != expected:
        shape = None if weight is None else tuple(weight.shape)
        raise _without_classifier(architecture, f"{name!r} is {shape} in timm, not {expected}")


def _without_classifier(architecture: str, why: str) -> UserError:
    return UserError(
        f"network {architecture} has no single linear classifier, so that it cannot be exported with one ({why}): "
        "choose another network"
    )


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `folder` with these files as a whole. An older folder is replaced; missing parents are made."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        replace_folder(temporary, folder)
    except BaseException:
        # Half a folder would only fill a full disk.
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def export_hash(folder: Path) -> str:
    """SHA-256 in hex of the two files that decide the features: the weights and config.json.

    Raises:
        UserError: one of the two files cannot be read.
    """
    digests = [_sha256_in_export(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def load_export(folder: Path | str) -> nn.Module:
    """The network of an export in eval mode, with `.num_features` and timm's `.pretrained_cfg`.

    Raises:
        UserError: a file is missing or damaged, the weights do not fit the network that config.json names, or the
            folder holds a detector.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from peerlearn.backbones import create_backbone
        >>> from peerlearn.export import load_export, save_export
        >>> folder = Path(tempfile.mkdtemp()) / "net-0"
        >>> sha256 = save_export(
        ...     create_backbone("resnet32", in_chans=1), folder, architecture="resnet32", in_chans=1,
        ...     small_images=False, image_size=28, mean=[0.286], std=[0.353], provenance={"dataset": "none"},
        ... )
        >>> network = load_export(folder)
        >>> network(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64])
    """
    folder = Path(folder)
    refuse_detector(folder)
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        config = read_json_object(config_file)
        architecture, pretrained_cfg = str(config["architecture"]), dict(config["pretrained_cfg"])
        in_chans, image_size, _ = pretrained_cfg["input_size"]
    except OSError as error:
        raise _unreadable(config_file, error) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{config_file}: not the config of an export ({type(error).__name__}: {error}); "
            "export the network again"
        ) from error
    try:
        backbone = create_backbone(architecture, in_chans=in_chans, image_size=image_size)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    try:
        weights = load_tensors(weights_file)
    except OSError as error:
        raise _unreadable(weights_file, error) from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{weights_file}: damaged ({error}); export the network again") from error
    if config.get("num_classes"):
        classifier = f"{pretrained_cfg.get('classifier')}."
        weights = {name: t for name, t in weights.items() if not name.startswith(classifier)}
    misfits = state_misfits(backbone.state_dict(), weights)
    if misfits:
        raise UserError(
            f"{weights_file}: does not fit {architecture}: {misfits[0]}"
            + (f", and {len(misfits) - 1} more" if len(misfits) > 1 else "")
        )
    for name in ("mean", "std"):
        values = pretrained_cfg.get(name)
        if not isinstance(values, list) or len(values) != in_chans:
            raise UserError(
                f"{config_file}: its {name} is {values!r}, not {in_chans} numbers; export the network again"
            )
    # The hashes come last: the messages above say more plainly what does not fit.
    check_seal(folder, config)
    backbone.load_state_dict(weights)
    backbone.pretrained_cfg = {  # type: ignore[assignment]
        **pretrained_cfg,
        "architecture": architecture,
    }
    return backbone.eval()


def sealed(config: dict[str, Any], weights: bytes) -> dict[str, Any]:
    """The config with the SHA-256 of the weights and of the config itself."""
    hashes = {WEIGHTS_FILE: hashlib.sha256(weights).hexdigest(), CONFIG_FILE: _digest(config)}
    return {**config, SEAL: hashes}


def check_seal(
    folder: Path, config: dict[str, Any], *, remedy: str = "export the network again"
) -> None:
    """Make sure that both files are as they were written. Exports by other programs have no hashes to compare.

    Args:
        folder: folder of the two files.
        config: content of config.json.
        remedy: what the message says is to be done with a damaged one.

    Raises:
        UserError: a file has changed since it was written.
    """
    if SEAL not in config:
        return
    hashes = config[SEAL] if isinstance(config[SEAL], dict) else {}
    rest = {key: value for key, value in config.items() if key != SEAL}
    if hashes.get(CONFIG_FILE) != _digest(rest):
        raise UserError(
            f"{folder / CONFIG_FILE}: its SHA-256 is not the one it was written with: {remedy}, or "
            f"remove {SEAL!r} from it if the change is meant"
        )
    if hashes.get(WEIGHTS_FILE) != _sha256_in_export(folder / WEIGHTS_FILE):
        raise UserError(
            f"{folder / WEIGHTS_FILE}: damaged, its SHA-256 is not that of {CONFIG_FILE}: {remedy}"
        )


def is_whole(folder: Path) -> bool:
    """Whether the folder holds an export of this project with the bytes that were written."""
    try:
        config = read_json_object(folder / CONFIG_FILE)
        check_seal(folder, config)
    except (OSError, ValueError, UserError):
        return False
    return SEAL in config


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _sha256_in_export(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(
        f"{file}: cannot be read ({error.strerror}); an export is a folder with {WEIGHTS_FILE} "
        f"and {CONFIG_FILE}"
    )


def state_misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor of a state dict that is missing, superfluous or of another shape; none if all fit."""
    lines = [f"{name!r} is missing" for name in expected if name not in given]
    lines += [f"{name!r} is not part of it" for name in given if name not in expected]
    return lines + [
        f"{name!r} is {tuple(given[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]


def _stored_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state dict in float32 and plain memory format, each tensor with memory of its own."""
    return {
        prefix + name: tensor.detach()
        .to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }


def _timm_view(image_size: int, *, seen_whole: bool) -> dict[str, Any]:
    """`peerlearn.data.augment.evaluation_view` in timm's terms."""
    if seen_whole:
        # "squash" lets go of the image's proportions, as we do.
        return {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    side = resized_side(image_size)
    share = image_size / side
    # timm rounds the quotient down, which a share that was rounded up would make one pixel too small.
    while math.floor(image_size / share) < side:
        share = math.nextafter(share, 0)
    return {"interpolation": "bilinear", "crop_pct": share, "crop_mode": "center"}


def view_words(pretrained_cfg: Mapping[str, Any]) -> str:
    """The evaluators' view of an image, for a card."""
    size = pretrained_cfg["input_size"][1]
    if pretrained_cfg.get("crop_mode") == "squash":
        return f"resized whole to {size} x {size} pixels"
    side = math.floor(size / pretrained_cfg.get("crop_pct", 0.875))
    return f"resized until the shorter side has {side} pixels, and the centre of {size} x {size} cut out"


def _config(
    backbone: Any,
    *,
    in_chans: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    view: dict[str, Any],
) -> dict[str, Any]:
    registered = backbone.pretrained_cfg
    architecture = registered["architecture"]
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": {"in_chans": in_chans, **size_arguments(architecture, image_size)},
        "pretrained_cfg": {
            "input_size": [in_chans, image_size, image_size],
            "fixed_input_size": registered.get("fixed_input_size", False),
            **view,
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
            "num_classes": 0,
            "pool_size": None,
            # With a name here, timm would adapt these weights as if they were made for RGB.
            "first_conv": None,
            # With a name here, timm adds a new classifier when it is asked for num_classes.
            "classifier": registered.get("classifier"),
        },
    }


def _model_card(
    timm_name: str,
    origin: str,
    call: str,
    provenance: Mapping[str, object],
    facts: CardFacts,
    *,
    pretrained_cfg: Mapping[str, Any],
    classifies: bool,
) -> str:
    title = f"{timm_name}, {origin}"
    registration = "import peerlearn  # timm learns of this network by it\n"
    rows = "\n".join(
        f"| {markdown_cell(name)} | {markdown_cell(value)} |" for name, value in provenance.items()
    )
    pipeline = "image-classification" if classifies else "image-feature-extraction"
    holds = (
        "One network with its classifier, without projection head."
        if classifies
        else "The features of one network, without projection head and classifier."
    )
    head = card_head(
        {
            "library_name": "timm",
            "pipeline_tag": pipeline,
            "tags": ["timm", "peerlearn", pipeline, *facts.tags],
            "datasets": facts.datasets,
            MODEL_INDEX: model_index(title, facts.figures),
        }
    )
    recipe = f"\n## Recipe\n\n{facts.recipe}" if facts.recipe else ""
    unmeasured = "Nothing was measured of these weights when they were written: unmeasured.\n"
    return f"""\
{head}# {markdown_cell(title)}

{holds} `config.json` holds the image
size, mean and standard deviation that it expects. Images are {view_words(pretrained_cfg)}.

With timm:

```python
{registration if timm_name in TIMM_NETWORKS else ""}import timm

backbone = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
```

With peerlearn, where it is `{call}`{" without the classifier" if classifies else ""}:

```python
from pathlib import Path

from peerlearn.export import load_export

backbone = load_export(Path("FOLDER"))
```

## Origin

{ORIGIN_TABLE}{rows}
{recipe}
## Measured in training

{figure_table(facts.figures) if facts.figures else unmeasured}
## Limits

{_limits(pretrained_cfg["input_size"])}
## Licence

Training images: {facts.licence}.

The licence of the weights is for those who publish them to choose: none is stated here.
"""


def _limits(input_size: Sequence[int]) -> str:
    """What a network is not for, in Markdown."""
    channels, side, _ = input_size
    small = f"It was made for small images, {side} x {side} pixels: of photographs it sees next to nothing."
    return f"""\
- {small if side < 64 else f"It was made for images of {side} x {side} pixels; other sizes are unmeasured."}
- It takes {channels} channel{"s" if channels > 1 else ""}, normalised as `config.json` says.
- It is a network for research. Nothing that it says of people is tested, and it is not for decisions about them.
- It has the biases of its training images, which nobody has measured here. Robustness to other cameras, noise and
  attacks is unmeasured too.
- Figures are those of one network of one seed; they show no spread over seeds.
"""
