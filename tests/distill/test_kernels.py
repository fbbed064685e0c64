import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from sklearn.metrics.pairwise import rbf_kernel
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jacrev

from etflayers.distill import FeatureKernel, LinearKernel, NNGPKernel, NTKKernel, RBFKernel
from etflayers.errors import InvalidArgumentError

INFINITE = [NNGPKernel(2), NTKKernel(1), NTKKernel(2, weight_variance=1.5, bias_variance=0.2)]
INFINITE += [NTKKernel(2, parametrization="standard", width=8)]
KERNELS = [LinearKernel(), LinearKernel(bias_variance=0.5), RBFKernel(1.7), *INFINITE]


def samples(count, dtype=torch.float64):
    return torch.randn(count, 2, 2, dtype=dtype)


# A cone's tip, met with a rounding error of eps in the square of the angle: finite differences over h have
# errors of eps / h^2 and h, both 1e-5 at this h.
AT_A_TIP = {"eps": 1e-5, "atol": 1e-4}


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_is_symmetric_and_positive_semidefinite(kernel):
    x, y = samples(7), samples(5)
    torch.testing.assert_close(kernel(x, y), kernel(y, x).T)
    gram = kernel(x, x)
    assert torch.linalg.eigvalsh(gram).min() >= -1e-12 * gram.diagonal().max()


def test_rbf_agrees_with_scikit_learn_also_far_from_the_origin():
    x, y = samples(7) + 100, samples(5) + 100
    expected = rbf_kernel(x.flatten(1).numpy(), y.flatten(1).numpy(), gamma=1 / (2 * 1.7**2))
    torch.testing.assert_close(RBFKernel(1.7)(x, y), torch.from_numpy(expected), rtol=1e-10, atol=0)
    # 1e-5: float32 rounds the samples themselves, by 100 * 6e-8, and distances by as much.
    single = RBFKernel(1.7)(x.float(), y.float()).double()
    torch.testing.assert_close(single, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def gaussian_expectation(function, correlation):
    """``E[f(u) f(v)]`` for unit Gaussians of that correlation, integrated over the angle.

    ``(u, v) = r (cos a, cos(a - t))`` with ``r^2`` exponential of mean 2 and a uniform; f is homogeneous.
    """
    t = math.acos(correlation)
    degree = 1 if function(2.0) == 2.0 else 0
    kinks = sorted(
        angle % (2 * math.pi) for angle in (math.pi / 2, -math.pi / 2, t + math.pi / 2, t - math.pi / 2)
    )
    value, _ = quad(lambda a: function(math.cos(a)) * function(math.cos(a - t)), 0, 2 * math.pi, points=kinks)
    return value / (2 * math.pi) * (2.0 if degree else 1.0)


def integrated_kernels(correlation, depth, weight_variance, bias_variance):
    """NNGP and NTK of two samples of unit variance at the input, by the recursion and numerical integrals."""
    variance = weight_variance + bias_variance
    covariance = weight_variance * correlation + bias_variance
    tangents = covariance
    for _ in range(depth):
        rho = covariance / variance
        slopes = weight_variance * gaussian_expectation(lambda u: float(u > 0), rho)
        covariance = (
            weight_variance * variance * gaussian_expectation(lambda u: max(u, 0.0), rho) + bias_variance
        )
        variance = weight_variance * variance / 2 + bias_variance
        tangents = covariance + slopes * tangents
    return covariance, tangents


@pytest.mark.parametrize("correlation", [-0.9, -0.3, 0.0, 0.5, 0.99])
@pytest.mark.parametrize("network", [(1, 2.0, 0.0), (3, 1.5, 0.2)])
def test_infinite_width_agrees_with_numerical_integrals(correlation, network):
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64) * math.sqrt(2)
    y = torch.tensor([[correlation, math.sqrt(1 - correlation**2)]], dtype=torch.float64) * math.sqrt(2)
    covariance, tangents = integrated_kernels(correlation, *network)
    assert NNGPKernel(*network)(x, y).item() == pytest.approx(covariance, abs=1e-9)
    assert NTKKernel(*network)(x, y).item() == pytest.approx(tangents, abs=1e-9)


def test_one_hidden_layer_has_the_published_form_on_the_sphere():
    # Bietti and Mairal (2019, arXiv 1905.12173): u k0(u) + k1(u), arc-cosine kernels of degrees 0 and 1.
    u = torch.linspace(-0.999, 0.999, 21, dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)  # weight_variance 2 and p = 2 keep unit variance
    y = torch.stack((u, (1 - u**2).sqrt()), -1)
    k0 = (math.pi - u.arccos()) / math.pi
    k1 = (u * (math.pi - u.arccos()) + (1 - u**2).sqrt()) / math.pi
    torch.testing.assert_close(NTKKernel(1)(x, y)[0], u * k0 + k1, rtol=1e-10, atol=1e-12)
    # On the diagonal every layer adds the same: depth + 1.
    torch.testing.assert_close(NTKKernel(4)(x, x), torch.tensor([[5.0]], dtype=torch.float64))


class WideNetwork(nn.Module):
    def __init__(self, in_features, width, depth, weight_variance, bias_variance):
        super().__init__()
        sizes = [in_features, *[width] * depth, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(sizes))
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.scales = math.sqrt(weight_variance), math.sqrt(bias_variance)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = x if index == 0 else x.relu()
            scale = self.scales[0] / math.sqrt(layer.in_features)
            x = scale * x @ layer.weight.T + self.scales[1] * layer.bias
        return x


@pytest.mark.parametrize("network", [(1, 2.0, 0.0), (2, 1.5, 0.2)])
def test_ntk_is_the_limit_of_wide_networks(network):
    x = torch.randn(5, 4, dtype=torch.float64)
    limit = NTKKernel(*network)(x, x)

    def mean_deviation(width, draws=4):
        deviations = []
        for _ in range(draws):
            model = WideNetwork(4, width, *network)
            tangents = jacrev(functional_call, argnums=1)(model, dict(model.named_parameters()), (x,))
            rows = torch.cat([tangent.flatten(1) for tangent in tangents.values()], 1)
            deviations.append((rows @ rows.T - limit).norm() / limit.norm())
        return torch.stack(deviations).mean().item()

    # Each entry is a mean over the units of a layer: it deviates by some units over sqrt(width).
    narrow, wide = mean_deviation(64), mean_deviation(1024)
    assert wide < 4 / math.sqrt(1024)
    assert 2 < narrow / wide < 8  # sqrt(1024 / 64) = 4, known to a factor of 2 from four draws


def test_standard_parametrization_agrees_with_neural_tangents():
    # neural-tangents 0.6.5 on jax 0.4.30, float64: stax.serial of depth pairs Dense(16), Relu() and Dense(1)
    # with W_std=1.5**0.5, b_std=0.2**0.5, parameterization="standard" at the same samples.
    x, y = (torch.sin(offset + torch.arange(64, dtype=torch.float64) ** 1.5).view(2, 32) for offset in (0, 1))
    expected = {
        1: [[12.519588425871698, 5.001645376544101], [5.3081818750355865, 11.236499717291528]],
        2: [[14.470366934890635, 8.33685602884084], [8.636455019889324, 13.323515859565658]],
    }
    for depth, values in expected.items():
        kernel = NTKKernel(depth, 1.5, 0.2, parametrization="standard", width=16)
        torch.testing.assert_close(
            kernel(x, y), torch.tensor(values, dtype=torch.float64), rtol=1e-10, atol=0
        )


def test_standard_parametrization_weighs_the_layers_of_the_other():
    # One hidden layer: what the output layer adds to both is s_w^2 V + s_b^2 and N V + 1, what the first adds
    # is s_w^2 <x, y>/p + s_b^2 and <x, y> + 1 under the same map. At s_w^2 = N = p and s_b = 1 they are one.
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    plain = NTKKernel(1, weight_variance=6.0, bias_variance=1.0)
    standard = NTKKernel(1, weight_variance=6.0, bias_variance=1.0, parametrization="standard", width=6)
    torch.testing.assert_close(standard(x, y), plain(x, y))


def test_nngp_is_the_covariance_of_wide_networks():
    x = torch.randn(4, 3, dtype=torch.float64)
    network = (2, 1.5, 0.2)
    draws = 200
    outputs = torch.cat([WideNetwork(3, 64, *network)(x) for _ in range(draws)], 1)
    empirical = outputs @ outputs.T / draws
    limit = NNGPKernel(*network)(x, x)
    # The standard deviation of an empirical second moment is at most sqrt(2 / draws) of the variances.
    assert (empirical - limit).abs().max() < 4 * math.sqrt(2 / draws) * limit.diagonal().max()


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_derivatives(kernel):
    x, y = samples(3).requires_grad_(), samples(2).requires_grad_()
    assert gradcheck(kernel, (x, y), check_forward_ad=True)
    assert gradgradcheck(kernel, (x, y))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_derivatives_on_the_diagonal(kernel):
    x = samples(3).requires_grad_()
    assert gradcheck(lambda s: kernel(s, s), (x,), check_forward_ad=True)
    assert gradgradcheck(lambda s: kernel(s, s), (x,))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("factor", [1.0, -1.0, 2.5], ids=["coinciding", "opposite", "parallel"])
def test_derivatives_at_samples_on_one_line(kernel, factor):
    x = samples(2)
    y = (factor * x.clone()).requires_grad_()
    assert gradcheck(kernel, (x.requires_grad_(), y), **AT_A_TIP)


@pytest.mark.parametrize("kernel", [RBFKernel(1.7), NNGPKernel(2), LinearKernel()], ids=repr)
def test_second_derivatives_at_coinciding_samples(kernel):
    # NTK is left out: there it has a cone, and no second derivative.
    x = samples(2)
    assert gradgradcheck(kernel, (x.requires_grad_(), x.detach().clone().requires_grad_()))


@pytest.mark.parametrize("kernel", [NNGPKernel(1), NTKKernel(1), NTKKernel(3, bias_variance=0.1)], ids=repr)
def test_derivatives_at_a_black_image(kernel):
    x, y = samples(3), samples(2)
    x[0] = 0
    assert gradcheck(lambda s: kernel(s, s), (x.requires_grad_(),), **AT_A_TIP)
    assert gradcheck(kernel, (x, y.requires_grad_()), **AT_A_TIP)


@pytest.mark.parametrize("kernel", [NNGPKernel(3), NTKKernel(3)], ids=repr)
def test_a_black_image_gives_finite_derivatives_where_there_is_none(kernel):
    x = samples(3)
    x[0] = 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(x, x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kernel", INFINITE, ids=repr)
def test_float32_knows_its_diagonal(kernel):
    # In float32 the angle of a sample with itself is noise, and must not reach the derivative.
    x = torch.randn(20, 3, 32, 32)
    weights = torch.randn(20, 20)

    def gradient(samples):
        samples = samples.clone().requires_grad_()
        (kernel(samples, samples) * weights.to(samples)).sum().backward()
        return samples.grad

    exact = gradient(x.double())
    assert (gradient(x).double() - exact).norm() <= 1e-5 * exact.norm()
    expected = kernel(x.double(), x.double()).float()
    torch.testing.assert_close(kernel(x, x), expected, rtol=1e-5, atol=3e-7 * expected.max().item())


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_in_float32(kernel, dtype):
    x, y = samples(3, dtype), samples(2, dtype)
    expected = kernel(x.float(), y.float())
    torch.testing.assert_close(kernel(x, y), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(kernel(x.float(), y.float()), expected)


def test_features():
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh())
    x, y = samples(3, torch.float32), samples(2, torch.float32)
    torch.testing.assert_close(FeatureKernel(module)(x, y), module(x) @ module(y).T)
    base = RBFKernel(0.5)
    torch.testing.assert_close(FeatureKernel(module, base)(x, y), base(module(x), module(y)))
    # Samples in float64 pass through a float32 network, and come back as they were.
    assert FeatureKernel(module)(x.double(), y.double()).dtype == torch.float64
    module.double()
    arguments = (x.double().requires_grad_(), y.double().requires_grad_())
    assert gradcheck(FeatureKernel(module), arguments)
    assert gradgradcheck(FeatureKernel(module), arguments)


def test_features_of_one_set_are_computed_once():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    x = samples(4)
    gram = FeatureKernel(module)(x, x)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearKernel(bias_variance=-1.0),
        lambda: RBFKernel(bandwidth=0.0),
        lambda: RBFKernel(bandwidth=math.nan),
        lambda: NTKKernel(depth=0),
        lambda: NTKKernel(weight_variance=0.0),
        lambda: NNGPKernel(bias_variance=math.inf),
        lambda: NTKKernel(parametrization="mup"),
        lambda: NTKKernel(parametrization="standard", width=0),
        lambda: LinearKernel()(torch.zeros(2, 3), torch.zeros(2, 4)),
        lambda: LinearKernel()(torch.zeros(3), torch.zeros(3)),
        lambda: LinearKernel()(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)),
        lambda: NTKKernel()(torch.zeros(2, 0), torch.zeros(2, 0)),
        lambda: RBFKernel(1.0)(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)),
        lambda: FeatureKernel(nn.Flatten(0))(torch.zeros(2, 3), torch.zeros(2, 3)),
    ],
)
def test_refuses(make):
    with pytest.raises(InvalidArgumentError, match="got"):
        make()
