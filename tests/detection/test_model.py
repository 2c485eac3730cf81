"""Each way in which Detectron2's detector differs from torchvision's, one by one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detection.model import (
    CounterSampler,
    FixedAnchors,
    RegionPooler,
    box_loss,
    build_detector,
    set_draws,
)
from peerlearn.counter_random import DETECTION_ANCHORS
from tests.detection.parts import CLASSES, body, small


@pytest.fixture(scope="module")
def seeded():
    torch.manual_seed(0)
    return build_detector(small(), body(), CLASSES)


def maps_of(strides, height, width, channels=2):
    return [torch.zeros(1, channels, -(-height // s), -(-width // s)) for s in strides]


def batch():
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 80)]
    targets = [
        {
            "boxes": torch.tensor([[8.0, 8, 40, 48], [30, 20, 90, 60]]),
            "labels": torch.tensor([1, 4]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return images, targets


class TestAnchors:
    def test_corners_are_exact_and_in_detectron2s_order(self):
        (corners,) = FixedAnchors([(32,)], [4]).cell_anchors
        # Detectron2: area = size ** 2, w = sqrt(area / ratio), h = ratio * w, for the ratios 0.5, 1, 2.
        sides = [(math.sqrt(32**2 / r), r * math.sqrt(32**2 / r)) for r in (0.5, 1.0, 2.0)]
        expected = [(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides]
        torch.testing.assert_close(corners, torch.tensor(expected), rtol=1e-6, atol=0)
        assert corners[0].tolist() == pytest.approx(
            [-22.6274, -11.3137, 22.6274, 11.3137], abs=1e-4
        )
        # torchvision rounds them.
        (rounded,) = AnchorGenerator(((32,),), ((0.5, 1.0, 2.0),)).cell_anchors
        assert rounded[0].tolist() == [-23, -11, 23, 11]

    def test_strides_are_fixed_where_torchvision_divides_the_sides(self):
        strides = [4, 8, 16, 32, 64]
        maps = maps_of(strides, 800, 1088)
        images = ImageList(torch.zeros(1, 3, 800, 1088), [(800, 1088)])
        (ours,) = FixedAnchors([(s,) for s in (32, 64, 128, 256, 512)], strides)(images, maps)
        theirs_of = AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((1.0,),) * 5)
        (theirs,) = theirs_of(images, maps)
        rows, columns = maps[-1].shape[-2:]
        own = ours[-rows * columns * 3 :].view(rows, columns, 3, 4)
        other = theirs[-rows * columns :].view(rows, columns, 4)
        centre = (own[..., 1, :2] + own[..., 1, 2:]) / 2
        assert centre[1, 1].tolist() == [64, 64]
        assert ((other[1, 1, :2] + other[1, 1, 2:]) / 2).tolist() == [64, 61]
        assert len(ours) == sum(3 * m.shape[-1] * m.shape[-2] for m in maps)

    def test_c4_has_all_sizes_at_every_place(self):
        generator = FixedAnchors([(32, 64)], [16])
        images = ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)])
        (anchors,) = generator(images, maps_of([16], 32, 32))
        sides = (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt().view(4, 6)
        assert sides.round().tolist() == [[32.0] * 3 + [64.0] * 3] * 4


class TestRegionPooler:
    @given(st.floats(4, 40), st.floats(4, 40), st.floats(16, 60), st.floats(16, 60))
    def test_of_a_ramp_every_bin_is_its_own_centre(self, x, y, width, height):
        # Pixel (i, j) of the finest map has its centre at stride * (i + 0.5): that is what `aligned` means.
        stride = 4
        columns = stride * (torch.arange(64) + 0.5)
        ramp = torch.stack([columns.expand(64, 64), columns[:, None].expand(64, 64)])[None]
        box = torch.tensor([[x, y, x + width, y + height]])
        pooled = RegionPooler([stride], 7)({"0": ramp}, [box], [(256, 256)])
        bins = (torch.arange(7) + 0.5) / 7
        torch.testing.assert_close(pooled[0, 0], (x + width * bins).expand(7, 7), rtol=0, atol=2e-3)
        torch.testing.assert_close(
            pooled[0, 1], (y + height * bins)[:, None].expand(7, 7), rtol=0, atol=2e-3
        )

    def test_a_bin_is_the_mean_of_all_its_pixels(self):
        torch.manual_seed(0)
        features = torch.rand(1, 3, 56, 56)
        whole = torch.tensor([[0.0, 0, 224, 224]])
        pooled = RegionPooler([4], 7)({"0": features}, [whole], [(224, 224)])
        torch.testing.assert_close(pooled, nn.functional.avg_pool2d(features, 8))

    def test_the_level_is_that_of_the_pyramid_paper(self):
        strides = [4, 8, 16, 32]
        maps = {
            str(n): torch.full((1, 1, 512 // s, 512 // s), float(n)) for n, s in enumerate(strides)
        }
        sides = [16, 111.9, 112.1, 223.9, 224.1, 447.9, 448.1, 500]
        boxes = torch.tensor([[0.0, 0, side, side] for side in sides])
        pooled = RegionPooler(strides, 7)(maps, [boxes], [(512, 512)])
        levels = [min(max(math.floor(4 + math.log2(side / 224)), 2), 5) - 2 for side in sides]
        assert levels == [0, 0, 1, 1, 2, 2, 3, 3]
        # Away from the border, where RoIAlign fades out.
        assert pooled[:, 0, 3, 3].tolist() == levels

    def test_regions_belong_to_their_images_and_p6_is_not_pooled(self):
        maps = {name: torch.zeros(2, 1, 16 // 2**n, 16 // 2**n) for n, name in enumerate("01")}
        maps["0"][1] = 7
        maps["pool"] = torch.full((2, 1, 2, 2), 99.0)
        boxes = [torch.tensor([[0.0, 0, 32, 32]]), torch.tensor([[8.0, 8, 24, 24]] * 2)]
        pooled = RegionPooler([4, 8], 2)(maps, boxes, [(64, 64)] * 2)
        assert pooled.amax((1, 2, 3)).tolist() == [0, 7, 7]


class TestSampler:
    def matched(self, seed=0):
        return torch.from_numpy(np.random.default_rng(seed).choice([-1, 0, 0, 0, 1], 400)).float()

    def draw(self, matched, words, number=64, share=0.25):
        sampler = CounterSampler(DETECTION_ANCHORS, number, share)
        sampler.words = [words]
        (positive,), (negative,) = sampler([matched])
        return positive, negative

    @pytest.mark.parametrize(("number", "share"), [(64, 0.25), (256, 0.5), (1000, 0.5), (8, 0.01)])
    def test_it_draws_as_many_of_each_kind_as_torchvisions(self, number, share):
        matched = self.matched()
        positive, negative = self.draw(matched, (0, 0, 0), number, share)
        theirs = BalancedPositiveNegativeSampler(number, share)([matched])
        assert [int(positive.sum()), int(negative.sum())] == [int(each[0].sum()) for each in theirs]
        assert (matched[positive > 0] >= 1).all()
        assert (matched[negative > 0] == 0).all()

    def test_the_global_generator_has_no_part_in_it(self):
        draws = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            draws.append(torch.stack(self.draw(self.matched(), (3, 5, 2))))
        assert torch.equal(*draws)

    @pytest.mark.parametrize("other", [(4, 5, 2), (3, 6, 2), (3, 5, 3)])
    def test_seed_step_and_place_each_change_it(self, other):
        one, two = (torch.stack(self.draw(self.matched(), w)) for w in ((3, 5, 2), other))
        assert not torch.equal(one, two)

    def test_every_candidate_is_as_likely(self):
        matched = torch.tensor([1.0] * 5 + [0.0] * 20)
        counts = sum(
            torch.stack(self.draw(matched, (0, step, 0), 8, 0.25)).int() for step in range(2000)
        )
        # Of 2 of 5, and of 6 of 20: five binomial deviations.
        assert (counts[0][:5] / 2000 - 0.4).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 2000)
        assert (counts[1][5:] / 2000 - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 2000)

    def test_a_batch_needs_the_words_of_each_image(self, seeded):
        images, targets = batch()
        set_draws(seeded, [(0, 0, 0)])
        with pytest.raises(ValueError, match="shorter"):
            seeded.train()(images, targets)


class TestBoxLoss:
    def test_beta_0_is_l1_and_torchvisions_is_not(self):
        difference = torch.tensor([[0.0, 0.05, -0.2, 3.0]])
        zeros = torch.zeros_like(difference)
        assert float(box_loss(difference, zeros, 0.0)) == pytest.approx(3.25)
        beta = 1 / 9
        expected = 0.5 * 0.05**2 / beta + (0.2 - beta / 2) + (3.0 - beta / 2)
        assert float(box_loss(difference, zeros, beta)) == pytest.approx(expected)

    def test_both_losses_of_boxes_take_it(self):
        images, targets = batch()
        losses = []
        for beta in (0.0, 1 / 9):
            torch.manual_seed(0)
            detector = build_detector(small(box_loss_beta=beta), body(), CLASSES).train()
            set_draws(detector, [(0, 0, 0), (0, 0, 1)])
            losses.append({k: v.detach() for k, v in detector(images, targets).items()})
        l1, smooth = losses
        for name in ("loss_classifier", "loss_objectness"):
            assert l1[name] == smooth[name]
        for name in ("loss_box_reg", "loss_rpn_box_reg"):
            assert l1[name] > smooth[name] > 0


def test_the_losses_are_those_of_the_regions_and_anchors_drawn(seeded):
    """The four losses again, from what the parts of the detector give."""
    images, targets = batch()
    words = [(0, 7, 0), (0, 7, 1)]
    seeded.train()
    set_draws(seeded, words)
    with torch.no_grad():
        losses = seeded(images, targets)
        inputs, _ = seeded.transform(images)
        features = seeded.backbone(inputs.tensors)
        logits, deltas = seeded.rpn.head(list(features.values()))
        anchors = seeded.rpn.anchor_generator(inputs, list(features.values()))
        rows = [m.permute(0, 2, 3, 1).reshape(2, -1) for m in logits]
        objectness = torch.cat(rows, 1).double()
        offsets = torch.cat(
            [
                d.view(2, 3, 4, *d.shape[-2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, 4)
                for d in deltas
            ],
            1,
        ).double()
        is_object, boxes, drawn = 0.0, 0.0, 0
        for image, target in enumerate(targets):
            labels, matched = _matched(anchors[image].double(), target["boxes"].double())
            seeded.rpn.fg_bg_sampler.words = [words[image]]
            (positive,), (negative,) = seeded.rpn.fg_bg_sampler([labels])
            chosen = (positive | negative) > 0
            values, wanted = objectness[image][chosen], labels[chosen].double()
            is_object += nn.functional.softplus(values).sum() - (values * wanted).sum()
            drawn += int(chosen.sum())
            if len(target["boxes"]):
                goal = _encoded(matched, anchors[image].double())[positive > 0]
                boxes += (offsets[image][positive > 0] - goal).abs().sum()
    assert float(losses["loss_objectness"]) == pytest.approx(float(is_object) / drawn, rel=1e-4)
    assert float(losses["loss_rpn_box_reg"]) == pytest.approx(float(boxes) / drawn, rel=1e-4)
    # Of new heads: nearly uniform classes.
    assert float(losses["loss_classifier"]) == pytest.approx(math.log(CLASSES + 1), rel=0.1)


def test_a_region_learns_the_box_of_its_class(seeded):
    images, targets = batch()
    words = [(0, 9, 0), (0, 9, 1)]
    seeded.train()
    with torch.no_grad():
        inputs, kept = seeded.transform(images, targets)
        features = seeded.backbone(inputs.tensors)
        proposals = [
            torch.tensor([[10.0, 10, 42, 50], [0, 0, 20, 20]]),
            torch.tensor([[0.0, 0, 9, 9]]),
        ]
        set_draws(seeded, words)
        _, _, labels, goals = seeded.roi_heads.select_training_samples(list(proposals), kept)
        predictor = seeded.roi_heads.box_predictor
        before = predictor.bbox_pred.weight.clone(), predictor.bbox_pred.bias.clone()
        predictor.bbox_pred.weight.zero_()
        # The deltas of class c are all c / 10.
        predictor.bbox_pred.bias.copy_(torch.arange(CLASSES + 1).repeat_interleave(4) / 10)
        set_draws(seeded, words)
        _, losses = seeded.roi_heads(features, list(proposals), inputs.image_sizes, kept)
        for parameter, value in zip(
            (predictor.bbox_pred.weight, predictor.bbox_pred.bias), before, strict=True
        ):
            parameter.copy_(value)
    label, goal = torch.cat(labels), torch.cat(goals)
    positive = label > 0
    # Both objects are regions too, and one proposal is near the first.
    assert sorted(label.tolist()) == [0, 0, 1, 1, 4]
    expected = (label[positive, None] / 10 - goal[positive]).abs().sum() / len(label)
    assert float(losses["loss_box_reg"]) == pytest.approx(float(expected), rel=1e-5)


def test_without_regions_the_losses_are_no_numbers_and_the_step_can_be_skipped(seeded):
    empty = torch.zeros(0, 4)
    targets = [{"boxes": empty, "labels": torch.zeros(0, dtype=torch.int64)}]
    maps = {name: torch.zeros(1, 16, 8, 8) for name in ("0", "1", "2", "3", "pool")}
    set_draws(seeded, [(0, 0, 0)])
    _, losses = seeded.train().roi_heads(maps, [empty], [(64, 64)], targets)
    assert all(bool(loss.isnan()) for loss in losses.values())


@pytest.mark.parametrize("kind", ["d2_fpn", "d2_c4", "torchvision_fpn"])
def test_in_half_precision_losses_boxes_and_scores_stay_float32(kind):
    torch.manual_seed(0)
    sizes = {"anchor_sizes": [16, 64]} if kind == "d2_c4" else {}
    sizes |= {"head_features": 1024} if kind == "torchvision_fpn" else {}
    # A stage of C4 works on each region, and processors without units for bf16 take minutes for a thousand.
    config = small(detector=kind, rpn_proposals_test=30, **sizes)
    detector = build_detector(config, body(c4=kind == "d2_c4"), CLASSES)
    detector.roi_heads.score_thresh = 0.0
    images, targets = batch()
    set_draws(detector, [(0, 0, 0), (0, 0, 1)])
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(images, targets)
        with torch.no_grad():
            found = detector.eval()(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for each in found:
        assert len(each["boxes"]) > 10
        for key in ("boxes", "scores"):
            # Not numbers that bf16 could hold, either.
            assert each[key].dtype == torch.float32
            assert not torch.equal(each[key].bfloat16().float(), each[key])


def test_the_detector_is_put_together_by_its_config():
    config = small(
        rpn_candidates_train=7, rpn_candidates_test=6, rpn_proposals_train=5, rpn_proposals_test=4
    )
    rpn = build_detector(config, body(), CLASSES).rpn
    assert rpn._pre_nms_top_n == {"training": 7, "testing": 6}
    assert rpn._post_nms_top_n == {"training": 5, "testing": 4}
    assert rpn.anchor_generator._strides == [4, 8, 16, 32, 64]
    assert rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    # The small-image stem keeps the first map as large as the image.
    finer = build_detector(config, body(architecture="resnet18_small"), CLASSES)
    assert finer.rpn.anchor_generator._strides == [1, 2, 4, 8, 16]
    c4 = build_detector(small(detector="d2_c4", anchor_sizes=[16, 64]), body(c4=True), CLASSES)
    assert c4.rpn.anchor_generator._strides == [16]
    assert c4.rpn.anchor_generator.sizes == ((16, 64),)


def test_c4_pools_14_by_14_and_its_head_ends_in_a_norm_and_a_mean():
    torch.manual_seed(0)
    detector = build_detector(
        small(detector="d2_c4", anchor_sizes=[16, 64]), body(c4=True), CLASSES
    )
    head = detector.roi_heads.box_head.eval()
    regions = torch.rand(3, 256, 14, 14)
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.running_mean)
    with torch.no_grad():
        deep = head.layer4(regions)
        assert deep.shape == (3, 512, 7, 7)
        scale = head.norm.weight / (head.norm.running_var + head.norm.eps).sqrt()
        normed = (deep.mean((2, 3)) - head.norm.running_mean) * scale + head.norm.bias
        torch.testing.assert_close(head(regions), normed, rtol=1e-4, atol=1e-5)
    assert detector.roi_heads.box_roi_pool._side == 14
    assert detector.backbone.out_channels == 256


def _matched(anchors, boxes):
    """RPN's rule: 1 from an IoU of 0.7 on and for the best anchors of each box, 0 below 0.3, else -1."""
    if not len(boxes):
        return torch.zeros(len(anchors)), torch.zeros(len(anchors), 4)
    low = torch.maximum(anchors[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(anchors[:, None, 2:], boxes[None, :, 2:])
    inside = (high - low).clamp_min(0).prod(2)
    area = [(b[:, 2:] - b[:, :2]).prod(1) for b in (anchors, boxes)]
    iou = inside / (area[0][:, None] + area[1][None] - inside)
    best, which = iou.max(1)
    labels = torch.full((len(anchors),), -1.0)
    labels[best < 0.3] = 0
    labels[best >= 0.7] = 1
    labels[(iou >= iou.max(0).values - 1e-9).any(1)] = 1
    return labels, boxes[which]


def _encoded(boxes, anchors):
    sides, own = (b[:, 2:] - b[:, :2] for b in (boxes, anchors))
    centres, places = ((b[:, 2:] + b[:, :2]) / 2 for b in (boxes, anchors))
    return torch.cat([(centres - places) / own, (sides / own).log()], 1)


class TestInitialWeights:
    def test_of_the_heads(self):
        torch.manual_seed(1)
        heads = build_detector(small(head_features=256, fpn_channels=32), body(), 20).roi_heads
        for layer in (heads.box_head.fc6, heads.box_head.fc7):
            # c2_xavier: uniform within sqrt(3 / fan_in).
            bound = math.sqrt(3 / layer.in_features)
            assert 0.98 * bound < float(layer.weight.abs().max()) <= bound
            assert float(layer.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert not layer.bias.any()
        for layer, std in (
            (heads.box_predictor.cls_score, 0.01),
            (heads.box_predictor.bbox_pred, 0.001),
        ):
            assert float(layer.weight.std()) == pytest.approx(std, rel=0.05)
            assert not layer.bias.any()

    def test_of_pyramid_and_rpn(self, seeded):
        for layer in (*seeded.rpn.head.modules(),):
            if isinstance(layer, nn.Conv2d):
                assert float(layer.weight.std()) == pytest.approx(0.01, rel=0.1)
                assert not layer.bias.any()
        for layer in seeded.backbone.fpn.modules():
            if isinstance(layer, nn.Conv2d):
                fan_in = layer.in_channels * layer.kernel_size[0] ** 2
                assert float(layer.weight.abs().max()) <= math.sqrt(3 / fan_in)


def test_what_is_equal_on_both_sides(seeded):
    rpn, regions = seeded.rpn, seeded.roi_heads
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert rpn.proposal_matcher.allow_low_quality_matches
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (
        256,
        0.5,
    )
    matcher = regions.proposal_matcher
    assert (matcher.high_threshold, matcher.low_threshold) == (0.5, 0.5)
    assert not matcher.allow_low_quality_matches
    assert regions.fg_bg_sampler.positive_fraction == 0.25
    assert (rpn.nms_thresh, regions.nms_thresh) == (0.7, 0.5)
    assert (regions.score_thresh, regions.detections_per_img) == (0.05, 100)
    assert regions.box_coder.weights == (10.0, 10.0, 5.0, 5.0)
    assert regions.box_predictor.bbox_pred.out_features == 4 * (CLASSES + 1)


class TestImages:
    def test_they_are_normalised_and_padded_with_the_mean_and_not_resized(self, seeded):
        images, targets = batch()
        seen, kept = seeded.transform(images, targets)
        assert seen.tensors.shape == (2, 3, 64, 96)
        assert seen.image_sizes == [(64, 96), (64, 80)]
        mean, std = (torch.tensor(v)[:, None, None] for v in (body().mean, body().std))
        torch.testing.assert_close(seen.tensors[1, :, :, :80], (images[1] - mean) / std)
        # The mean colour is 0 after it.
        assert not seen.tensors[1, :, :, 80:].any()
        assert torch.equal(kept[0]["boxes"], targets[0]["boxes"])

    def test_sides_are_multiples_of_32_for_a_pyramid_alone(self, seeded):
        images = [torch.rand(3, 50, 70), torch.rand(3, 60, 40)]
        assert seeded.transform(images)[0].tensors.shape == (2, 3, 64, 96)
        config = small(detector="d2_c4", anchor_sizes=[16, 64])
        c4 = build_detector(config, body(c4=True), CLASSES).eval()
        assert c4.transform(images)[0].tensors.shape == (2, 3, 60, 70)
        # Maps are as large as it takes to hold the whole image.
        assert c4.backbone(torch.zeros(1, 3, 60, 70))["0"].shape == (1, 256, 4, 5)
