"""Split batch norm against one plain batch norm per part."""

import copy

import pytest
import torch
from torch import nn

from pretrain.batch_norm import SplitBatchNorm2d, split_batch_norm


def test_each_part_is_normalised_by_its_own_statistics():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    split = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(split, 4)
    images = torch.randn(12, 3, 5, 2)
    parts = [copy.deepcopy(plain) for _ in range(4)]
    expected = torch.empty_like(images)
    for part, norm in enumerate(parts):
        expected[3 * part : 3 * part + 3] = norm(images[3 * part : 3 * part + 3])
    images = images.contiguous(memory_format=torch.channels_last)
    output = split(images)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last)
    mean = torch.stack([norm.running_mean for norm in parts]).mean(0)
    var = torch.stack([norm.running_var for norm in parts]).mean(0)
    torch.testing.assert_close(split[0].running_mean, mean)
    torch.testing.assert_close(split[0].running_var, var)
    assert int(split[0].num_batches_tracked) == 1


def test_gradients_equal_those_of_the_parts():
    torch.manual_seed(1)
    plain = nn.BatchNorm2d(2)
    split = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(split, 2)
    images = torch.randn(6, 2, 3, 3)
    weights = torch.randn(6, 2, 3, 3)
    a, b = images.clone().requires_grad_(), images.clone().requires_grad_()
    (split(a) * weights).sum().backward()
    parts = torch.empty_like(images)
    for part in (slice(3), slice(3, 6)):
        parts[part] = copy.deepcopy(plain)(b[part])
    (parts * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_eval_mode_and_state_are_those_of_plain_batch_norm():
    plain = nn.BatchNorm2d(3)
    plain.running_mean.normal_()
    split = nn.Sequential(copy.deepcopy(plain))
    split_batch_norm(split, 3)
    images = torch.randn(5, 3, 2, 2)
    assert torch.equal(split.eval()(images), plain.eval()(images))
    assert list(split[0].state_dict()) == list(plain.state_dict())
    assert isinstance(split[0], SplitBatchNorm2d)


def test_a_subclass_with_another_forward_is_refused():
    class Fused(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="0 is a Fused, which cannot be split"):
        split_batch_norm(nn.Sequential(Fused(2)), 2)
