"""Gate and attention by numbers worked out by hand, and the scaled gradient."""

import math

import pytest
import torch

from pretrain.gates import EnsembleGate, PeerAttention, scale_gradient


class TestEnsembleGate:
    def test_by_hand(self):
        gate = EnsembleGate(2, 3).eval()
        with torch.no_grad():
            gate.fc.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
            gate.fc.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
            gate.norm.running_mean.copy_(torch.tensor([0.0, 1.0, 0.0]))
            gate.norm.running_var.copy_(torch.tensor([1.0, 4.0, 1.0]) - gate.norm.eps)
        # Channel means ln 2 and 2 ln 3: scores ln 2, (2 ln 3 + 1 - 1) / 2 = ln 3, and a negative one, cut to 0.
        features = torch.empty(1, 2, 2, 2)
        features[0, 0] = torch.tensor([[0.0, 2.0], [2.0, 0.0]]) * math.log(2)
        features[0, 1] = torch.tensor([[1.0, 3.0], [4.0, 0.0]]) * math.log(3)
        torch.testing.assert_close(gate(features), torch.tensor([[2 / 6, 3 / 6, 1 / 6]]))

    def test_pooled_features_are_taken_as_they_are(self):
        gate = EnsembleGate(2, 3).eval()
        features = torch.randn(4, 2, 3, 3)
        torch.testing.assert_close(gate(features.mean((2, 3))), gate(features))

    def test_in_training_the_batch_normalises(self):
        gate = EnsembleGate(1, 2)
        with torch.no_grad():
            gate.fc.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            gate.fc.bias.zero_()
        features = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        # Normalised to -1, 1 for the first network and 1, -1 for the second; then cut at 0.
        e = math.e
        expected = torch.tensor([[1 / (1 + e), e / (1 + e)], [e / (1 + e), 1 / (1 + e)]])
        torch.testing.assert_close(gate(features), expected, rtol=1e-4, atol=1e-5)

    def test_rows_are_mixtures_and_every_parameter_learns(self):
        torch.manual_seed(0)
        gate = EnsembleGate(8, 4)
        out = gate(torch.randn(16, 8, 3, 5))
        assert out.shape == (16, 4)
        torch.testing.assert_close(out.sum(1), torch.ones(16))
        (out * torch.arange(4.0)).sum().backward()
        for name in ("fc.weight", "norm.weight", "norm.bias"):
            assert gate.get_parameter(name).grad.abs().max() > 0, name


class TestPeerAttention:
    def test_by_hand(self):
        attention = PeerAttention(2, 2)
        with torch.no_grad():
            attention.query.weight.copy_(torch.tensor([[1.0, 0.0]]))
            attention.key.weight.copy_(torch.tensor([[0.0, 1.0]]))
        # q = ln 2, 1; k = 1, 2: scores of peer 0 ln 2, 2 ln 2, of peer 1 1, 2.
        features = torch.tensor([[[math.log(2), 1.0]], [[1.0, 2.0]]])
        e = math.e
        expected = torch.tensor([[[1 / 3, 2 / 3], [1 / (1 + e), e / (1 + e)]]])
        torch.testing.assert_close(attention(features), expected)

    def test_by_loops(self):
        torch.manual_seed(0)
        attention = PeerAttention(16, 3).double()
        features = torch.randn(3, 5, 16, dtype=torch.float64)
        assert attention.query.weight.shape == attention.key.weight.shape == (2, 16)
        assert [name for name, _ in attention.named_parameters()] == ["query.weight", "key.weight"]
        with torch.no_grad():
            out = attention(features)
        assert out.shape == (5, 3, 3)
        for b in range(5):
            for i in range(3):
                query = attention.query.weight @ features[i, b]
                scores = [
                    math.exp(torch.dot(query, attention.key.weight @ features[j, b]).item())
                    for j in range(3)
                ]
                expected = [score / sum(scores) for score in scores]
                assert out[b, i].tolist() == pytest.approx(expected, rel=1e-10)

    def test_few_features_still_have_a_projection(self):
        assert PeerAttention(4, 2).query.weight.shape == (1, 4)

    def test_other_numbers_of_peers_are_refused(self):
        with pytest.raises(ValueError, match=r"features must be \(3, B, D\), got \(2, 5, 8\)"):
            PeerAttention(8, 3)(torch.zeros(2, 5, 8))


class TestScaleGradient:
    def test_forward_is_the_identity_to_the_bit(self):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        assert torch.equal(scale_gradient(x, 1 / 3), x)

    def test_gradient_is_multiplied(self):
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        (scale_gradient(x, 0.25) ** 2).sum().backward()
        torch.testing.assert_close(x.grad, torch.tensor([0.5, 1.0, 1.5]))

    def test_heads_on_a_trunk_average(self):
        x = torch.tensor([2.0], requires_grad=True)
        heard = scale_gradient(x, 1 / 3)
        (1 * heard + 2 * heard + 6 * heard).sum().backward()
        torch.testing.assert_close(x.grad, torch.tensor([3.0]))
