"""Exports for other libraries: torchvision's ResNets and Detectron2's backbones, made from timm's.

    NET-torchvision/  model.safetensors (strict)   config.json   README.md (the lines that load it)
    NET-detectron2/   model.pkl (numpy arrays)     README.md (the config it needs)

The same export always gives the same bytes.
"""

import io
import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from peerlearn.errors import UserError
from peerlearn.export import export_hash, load_export, view_words, write_folder
from peerlearn.runs.export_folders import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from peerlearn.runs.files import write_text
from peerlearn.runs.model_card import ORIGIN_TABLE, card_head, split_card

DETECTRON2_FILE = "model.pkl"


@dataclass(frozen=True, kw_only=True)
class ResNetShape:
    """The shape of one of torchvision's ResNets, different for each of them.

    Attributes:
        blocks: number of blocks in each stage.
        bottleneck: whether a block has three convolutions, and not two.
        groups: number of groups of the 3x3 convolutions.
        width_per_group: channels of each group in the first stage.
    """

    blocks: tuple[int, ...]
    bottleneck: bool = True
    groups: int = 1
    width_per_group: int = 64

    @property
    def depth(self) -> int:
        """The number in the network's name: all layers on the main path, with the classifier."""
        return 2 + (3 if self.bottleneck else 2) * sum(self.blocks)


RESNETS = {
    "resnet18": ResNetShape(blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetShape(blocks=(3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetShape(blocks=(3, 4, 6, 3)),
    "resnet101": ResNetShape(blocks=(3, 4, 23, 3)),
    "resnet152": ResNetShape(blocks=(3, 8, 36, 3)),
    "resnext50_32x4d": ResNetShape(blocks=(3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": ResNetShape(blocks=(3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": ResNetShape(blocks=(3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": ResNetShape(blocks=(3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": ResNetShape(blocks=(3, 4, 23, 3), width_per_group=128),
}


@dataclass(frozen=True, kw_only=True)
class _ResNetExport:
    """An export of one of `RESNETS`. Mean and std are those of images in [0, 1]; view: how they are resized."""

    folder: Path
    name: str
    small_images: bool
    in_chans: int
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    view: str
    backbone: nn.Module


def convert_export(export: Path, target: str) -> dict[str, bytes]:
    """The files of an export for another library: name -> content.

    Args:
        export: folder of the export.
        target: name of the library: timm (the export as it is), torchvision or detectron2.

    Raises:
        UserError: the export is not whole, or the library does not know its network.
    """
    if target == "timm":
        load_export(export)
        files = (export / name for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE))
        return {file.name: file.read_bytes() for file in files if file.is_file()}
    resnet = _load_resnet(export, target)
    return _torchvision_files(resnet) if target == "torchvision" else _detectron2_files(resnet)


def write_export(folder: Path, files: dict[str, bytes], *, renews_card: bool = False) -> bool:
    """Write the files of `convert_export`.

    Args:
        folder: folder of the files.
        files: content of each file by its name.
        renews_card: whether a folder that holds the same network gets this card in place of its own.

    Returns:
        Whether they were written; False if the folder holds them already.

    Raises:
        UserError: the folder holds something else.
    """
    if not folder.exists():
        write_folder(folder, files)
        return True
    for name, content in files.items():
        file = folder / name
        if name != CARD_FILE and not (file.is_file() and file.read_bytes() == content):
            raise UserError(
                f"{folder} is there and holds something else: remove it, or choose another place "
                "by --output"
            )
    if renews_card:
        write_text(folder / CARD_FILE, files[CARD_FILE].decode())
    return False


def how_to_load(folder: Path, target: str) -> str:
    """How a user loads the network, in one line for the terminal."""
    if target == "timm":
        return f'timm.create_model("local-dir:{folder}", pretrained=True), after `import peerlearn`'
    if target == "torchvision":
        return f"the lines of {folder / CARD_FILE}"
    return f"MODEL.WEIGHTS {folder / DETECTRON2_FILE}, with the config of {folder / CARD_FILE}"


def _load_resnet(export: Path, target: str) -> _ResNetExport:
    backbone: Any = load_export(export)
    config = backbone.pretrained_cfg
    architecture = config["architecture"]
    name = architecture.removesuffix("_small")
    if name not in RESNETS:
        raise UserError(
            f"{export.name}: {architecture} cannot be had for {target}, only torchvision's ResNets "
            f"can: {', '.join(RESNETS)}; --format timm takes any network"
        )
    channels, image_size, _ = config["input_size"]
    return _ResNetExport(
        folder=export,
        name=name,
        small_images=name != architecture,
        in_chans=channels,
        image_size=image_size,
        mean=config["mean"],
        std=config["std"],
        view=view_words(config),
        backbone=backbone,
    )


def _torchvision_files(resnet: _ResNetExport) -> dict[str, bytes]:
    # timm and torchvision have the same names for the tensors of these networks, so the weights stay as they are.
    config = {
        "library": "torchvision",
        "architecture": resnet.name,
        "num_features": resnet.backbone.num_features,
        "small_images": resnet.small_images,
        "input_size": [resnet.in_chans, resnet.image_size, resnet.image_size],
        "mean": list(resnet.mean),
        "std": list(resnet.std),
        "view": resnet.view,
    }
    return {
        WEIGHTS_FILE: (resnet.folder / WEIGHTS_FILE).read_bytes(),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        CARD_FILE: _torchvision_card(resnet).encode(),
    }


def _torchvision_card(resnet: _ResNetExport) -> str:
    return f"""\
{_head(resnet.folder, "torchvision")}# {resnet.name}, for torchvision

The features of one network, without projection head and classifier. {_expected_images(resnet)}

```python
import safetensors.torch
import torch
import torchvision

backbone = torchvision.models.{resnet.name}()
{_torchvision_stem(resnet)}backbone.fc = torch.nn.Identity()
backbone.load_state_dict(safetensors.torch.load_file("FOLDER/{WEIGHTS_FILE}"), strict=True)
backbone.eval()
```

{_known_of(resnet.folder)}"""


def _torchvision_stem(resnet: _ResNetExport) -> str:
    """The lines that replace torchvision's stem where the network has another one."""
    geometry = "kernel_size=3, padding=1" if resnet.small_images else "7, stride=2, padding=3"
    lines = ""
    if resnet.small_images or resnet.in_chans != 3:
        lines += (
            f"backbone.conv1 = torch.nn.Conv2d({resnet.in_chans}, 64, {geometry}, bias=False)\n"
        )
    if resnet.small_images:
        lines += "backbone.maxpool = torch.nn.Identity()\n"
    return lines


def _expected_images(resnet: _ResNetExport) -> str:
    return (
        f"It expects images of {resnet.image_size} x {resnet.image_size} pixels and "
        f"{resnet.in_chans} channel{'s' if resnet.in_chans > 1 else ''},\n{resnet.view},\nscaled to [0, 1] and "
        f"normalised by mean {_numbers(resnet.mean)} and standard deviation {_numbers(resnet.std)}."
    )


def _detectron2_files(resnet: _ResNetExport) -> dict[str, bytes]:
    if resnet.small_images:
        raise UserError(
            f"{resnet.folder.name}: Detectron2's ResNets have a 7x7 stem, this {resnet.name} has the "
            "small-image one; --format torchvision or timm takes it"
        )
    if resnet.in_chans not in DETECTRON2_IMAGE_FORMATS:
        raise UserError(
            f"{resnet.folder.name}: Detectron2 reads images of 1 or 3 channels, this {resnet.name} "
            f"takes {resnet.in_chans}; --format torchvision or timm takes it"
        )
    weights = {
        detectron2_name(name): tensor.numpy()
        for name, tensor in resnet.backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    content = {"model": weights, "__author__": "peerlearn", "matching_heuristics": True}
    return {
        DETECTRON2_FILE: pickle_arrays(content),
        CARD_FILE: _detectron2_card(resnet).encode(),
    }


# Detectron2's INPUT.FORMAT by the number of channels.
DETECTRON2_IMAGE_FORMATS = {1: "L", 3: "RGB"}


def detectron2_name(name: str) -> str:
    """Detectron2's name of a tensor: conv1.weight -> stem.conv1.weight, layer1.0.bn2.bias -> res2.0.conv2.norm.bias."""
    block = re.match(r"layer(\d)\.(\d+)\.", name)
    place = f"res{int(block[1]) + 1}.{block[2]}." if block else "stem."
    layer = name[block.end() :] if block else name
    layer = re.sub(r"^bn(\d)\.", r"conv\1.norm.", layer)
    layer = re.sub(r"^downsample\.0\.", "shortcut.", layer)
    return place + re.sub(r"^downsample\.1\.", "shortcut.norm.", layer)


def detectron2_resnet(shape: ResNetShape) -> dict[str, Any]:
    """The keys of Detectron2's MODEL.RESNETS that tell the shape."""
    common = {"DEPTH": shape.depth, "STRIDE_IN_1X1": False}
    if shape.bottleneck:
        return common | {"NUM_GROUPS": shape.groups, "WIDTH_PER_GROUP": shape.width_per_group}
    return common | {"RES2_OUT_CHANNELS": 64}


def pickle_arrays(content: dict[str, Any]) -> bytes:
    """A pickle that every numpy and every Python from 3.4 on can read."""
    buffer = io.BytesIO()
    _ArrayPickler(buffer, protocol=4).dump(content)
    return buffer.getvalue()


class _ArrayPickler(pickle.Pickler):
    """Pickles arrays as calls of numpy.ndarray. numpy's own way names modules that numpy 2 has moved."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        # A bytearray: arrays over bytes are read-only, and PyTorch warns of such arrays.
        return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))


def _detectron2_card(resnet: _ResNetExport) -> str:
    shape = RESNETS[resnet.name]
    rows = detectron2_resnet(shape).items()
    resnet_rows = "\n".join(f"    {key}: {value}" for key, value in rows)
    return f"""\
{_head(resnet.folder, "detectron2")}# {resnet.name}, for Detectron2

{_detectron2_uses(shape)} It needs

```yaml
MODEL:
  WEIGHTS: "FOLDER/{DETECTRON2_FILE}"
  PIXEL_MEAN: {_numbers([255 * value for value in resnet.mean])}
  PIXEL_STD: {_numbers([255 * value for value in resnet.std])}
  RESNETS:
{resnet_rows}
INPUT:
  FORMAT: "{DETECTRON2_IMAGE_FORMATS[resnet.in_chans]}"
```

Detectron2 leaves the stem and `res2` untrained and every batch norm frozen unless told otherwise. Frozen batch norm
with self-supervised weights can give NaN at the usual learning rate. MoCo's detection recipe (R50-C4) trains all of it:

```yaml
MODEL:
  BACKBONE:
    FREEZE_AT: 0
  RESNETS:
    NORM: "naiveSyncBN"
  ROI_HEADS:
    NAME: "Res5ROIHeadsExtraNorm"
TEST:
  PRECISE_BN:
    ENABLED: True
```

Its head is not Detectron2's: it is `Res5ROIHeads` with one more norm of the same kind after `res5`, as MoCo's
`detection/train_net.py` registers it. PreciseBN measures the statistics of the batch norms anew before each test.
With an FPN, set `MODEL.FPN.NORM: "naiveSyncBN"` instead of the head.

Like the files of Detectron2's model zoo, `{DETECTRON2_FILE}` is a pickle. It holds numpy arrays and plain values alone.

{_known_of(resnet.folder)}"""


def _detectron2_uses(shape: ResNetShape) -> str:
    """The models that the backbone fits, in words."""
    if shape.bottleneck:
        return (
            "A backbone for `build_resnet_backbone`, `build_resnet_fpn_backbone` and C4 models, "
            "with Detectron2's names."
        )
    return (
        "A backbone for `build_resnet_fpn_backbone`, with Detectron2's names. C4 models cannot use it: their head\n"
        "(`Res5ROIHeads`) builds `res5` of bottleneck blocks at every depth, and this network has basic blocks."
    )


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.7g}' for value in values)}]"


def _head(export: Path, library: str) -> str:
    """The head of the export's card, for another library. Only torchvision's files have a task on the Hub."""
    entries, _ = split_card(_card_of(export))
    feature_extraction = "image-feature-extraction"
    tags = entries["tags"] if isinstance(entries.get("tags"), list) else []
    others = [
        tag for tag in tags if tag not in ("timm", feature_extraction, "image-classification")
    ]
    return card_head(
        {
            **entries,
            "library_name": library,
            "pipeline_tag": feature_extraction if library == "torchvision" else None,
            "tags": [library, *others],
        }
    )


def _known_of(export: Path) -> str:
    """What the export's card knows of the network, from its origin on, and the hash of the export."""
    _, _, known = _card_of(export).partition(ORIGIN_TABLE)
    return f"## Origin\n\nMade from the timm export of SHA-256 {export_hash(export)}.\n\n{ORIGIN_TABLE}{known}"


def _card_of(export: Path) -> str:
    """The text of an export's card; "" if it has none."""
    card = export / CARD_FILE
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
