"""Norm layers of a detector, and the stages that are fixed with them."""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from detection.model import (
    build_detector,
)
from detection.norms import parameter_groups, prepare_norms
from peerlearn.compute.dist import Ranks
from peerlearn.compute.sync_batch_norm import SyncBatchNorm2d
from peerlearn.errors import UserError
from tests.detection.parts import CLASSES, body, small


class TestNorms:
    def prepared(self, detector="d2_fpn", **changes):
        sizes = {"anchor_sizes": [16, 32]} if detector == "d2_c4" else {}
        config = small(detector=detector, **sizes, **changes)
        made = build_detector(config, body(c4=detector == "d2_c4"), CLASSES)
        prepare_norms(config, made, Ranks(torch.device("cpu")))
        return made

    def kinds(self, module):
        kinds = (nn.BatchNorm2d, FrozenBatchNorm2d)
        return {type(child) for child in module.modules() if isinstance(child, kinds)}

    def test_sync_is_in_the_network_and_in_the_pyramid(self):
        detector = self.prepared(norm="sync")
        assert self.kinds(detector.backbone.body) == {SyncBatchNorm2d}
        assert self.kinds(detector.backbone.fpn) == {SyncBatchNorm2d}
        assert all(p.requires_grad for p in detector.parameters())
        # A conv before a norm has no bias.
        assert detector.backbone.fpn.inner_blocks[0][0].bias is None

    def test_sync_is_in_res5_and_after_it(self):
        head = self.prepared("d2_c4", norm="sync").roi_heads.box_head
        assert self.kinds(head.layer4) == {SyncBatchNorm2d}
        assert type(head.norm) is SyncBatchNorm2d

    def test_frozen_has_none_in_the_pyramid(self):
        detector = self.prepared(norm="frozen")
        assert self.kinds(detector.backbone.body) == {FrozenBatchNorm2d}
        assert self.kinds(detector.backbone.fpn) == set()
        assert detector.backbone.fpn.inner_blocks[0][0].bias is not None

    def test_frozen_computes_what_the_export_did_in_eval_mode(self):
        torch.manual_seed(3)
        network = body()
        for norm in network.network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 2)
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            expected = network.network.eval()(images)
            config = small(norm="frozen")
            detector = build_detector(config, network, CLASSES)
            prepare_norms(config, detector)
            for one, other in zip(detector.train().backbone.body(images), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_three_trained_stages_are_detectron2s_freeze_at_2(self):
        network = self.prepared(trainable_stages=3).backbone.body
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}
        assert type(network.bn1) is FrozenBatchNorm2d
        assert self.kinds(network.layer1) == {FrozenBatchNorm2d}
        assert self.kinds(network.layer2) == {SyncBatchNorm2d}

    def test_other_networks_have_no_such_stages(self):
        config = small(trainable_stages=3, norm="batch")
        detector = build_detector(config, body(architecture="convnext_atto"), CLASSES)
        with pytest.raises(UserError, match=r"trainable_stages 3 needs a ResNet.*set it to 5"):
            prepare_norms(config, detector)

    def test_norms_do_not_decay(self):
        detector = self.prepared()
        decayed, others = parameter_groups(detector, weight_decay=1e-4, norm_weight_decay=0.0)
        assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)
        norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {id(p) for p in others["params"]} == {id(p) for m in norms for p in m.parameters()}
        assert len(decayed["params"]) + len(others["params"]) == len(list(detector.parameters()))
        # Biases of other layers decay, as in Detectron2.
        assert any(p is detector.rpn.head.cls_logits.bias for p in decayed["params"])

    def test_norms_of_other_kinds_do_not_decay_either(self):
        network = body(architecture="convnext_atto")
        detector = build_detector(small(norm="batch"), network, CLASSES)
        _, others = parameter_groups(detector, weight_decay=1e-4, norm_weight_decay=0.0)
        norms = [m for m in network.network.modules() if isinstance(m, nn.LayerNorm)]
        assert len(norms) == 16
        assert {id(p) for m in norms for p in m.parameters()} < {id(p) for p in others["params"]}
