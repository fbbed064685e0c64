"""Kernels of infinitely many channels: another library, finite networks, limits, derivatives, blocks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jacrev

from etflayers.distill import ConvNNGPKernel, ConvNTKKernel, NNGPKernel, NTKKernel
from etflayers.errors import InvalidArgumentError

# What the two ways through the pixels, and pooling, can make of a network.
NETWORKS = [(2, (), "flatten"), (2, (), "average"), (3, (1, 3), "flatten"), (2, (2,), "average")]
FLAT, POOLED = ConvNTKKernel(2, bias_variance=0.1), ConvNTKKernel(2, (1,), "average")
KERNELS = [
    FLAT,
    POOLED,
    ConvNNGPKernel(2),
    ConvNNGPKernel(1, (1,), weight_variance=1.5, bias_variance=0.2),
    replace(FLAT, parametrization="standard", width=8),
]
AT_A_TIP = {"eps": 1e-5, "atol": 1e-4}  # as for the kernels without convolutions


def samples(count, size=3, dtype=torch.float64):
    return torch.randn(count, 2, size, size, dtype=dtype)


def fixed_samples(count, offset):
    numbers = torch.arange(count * 32, dtype=torch.float64)
    return torch.sin(offset + numbers**1.5).view(count, 2, 4, 4)


# From neural-tangents 0.6.5 on jax 0.4.30 in float64, with the same images (channels last), by
#     options = dict(W_std=1.5**0.5, b_std=0.2**0.5, parameterization=parametrization)
#     layers = []
#     for layer in range(1, depth + 1):
#         layers += [stax.Conv(16, (3, 3), padding="SAME", **options), stax.Relu()]
#         layers += [stax.AvgPool((2, 2), (2, 2))] if layer in pool_after else []
#     layers += [stax.Flatten() if readout == "flatten" else stax.GlobalAvgPool(), stax.Dense(1, **options)]
#     kernel = stax.serial(*layers)[2](x, y, ("nngp", "ntk"))
REFERENCE = {
    (2, (), "flatten"): (
        [[0.575780863046302, 0.5169539938815797], [0.5314463313271014, 0.5762665250621032]],
        [[0.9868417252585491, 0.7680798301656808], [0.8042525898042688, 0.9888043888041566]],
        [[83.41814013091195, 65.67873412591372], [69.38414832185333, 83.57217742620222]],
    ),
    (2, (), "average"): (
        [[0.4939229463001986, 0.48546774588981756], [0.491742474685531, 0.4906114322148831]],
        [[0.7063278560598927, 0.6830914382929216], [0.6906152881161098, 0.6955669207052027]],
        [[12.129240012759038, 11.256756191422891], [11.512887557230702, 11.712732492435478]],
    ),
    (3, (1, 3), "flatten"): (
        [[0.3983611430581258, 0.39702623774298107], [0.39746114584220593, 0.3975825152502124]],
        [[0.5896956906573616, 0.5830086748770948], [0.583664544895416, 0.5881247521126531]],
        [[8.183016096596113, 7.870511768345116], [7.9165363302447, 8.096055976482862]],
    ),
}
REFERENCE[2, (2,), "average"] = REFERENCE[2, (), "average"]  # a mean of means, which that library finds too


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_agrees_with_neural_tangents(network):
    x, y = fixed_samples(2, 0.0), fixed_samples(2, 1.0)
    variances = {"weight_variance": 1.5, "bias_variance": 0.2}
    found = (
        ConvNNGPKernel(*network, **variances),
        ConvNTKKernel(*network, **variances),
        ConvNTKKernel(*network, **variances, parametrization="standard", width=16),
    )
    for kernel, expected in zip(found, REFERENCE[network], strict=True):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(kernel(x, y), expected, rtol=1e-11, atol=0)


class ConvNetwork(nn.Module):
    """A network of ``factor`` times ``width`` channels in the parametrization of a kernel."""

    def __init__(self, kernel, channels, pixels, width, factor):
        super().__init__()
        self.kernel = kernel
        standard = kernel.parametrization == "standard"
        shapes, k = [], kernel.kernel_size
        for layer in range(kernel.depth):
            shapes.append((factor * width, factor * width if layer else channels, k, k))
        shapes.append((1, factor * width * pixels))
        self.weights, self.biases, self.scales = nn.ParameterList(), nn.ParameterList(), []
        for index, shape in enumerate(shapes):
            fan_in = math.prod(shape[1:])
            spread = factor if index else 1  # the share of the width that stands in front of the weights
            weight_scale = math.sqrt(kernel.weight_variance / fan_in)
            bias_scale = math.sqrt(kernel.bias_variance)
            drawn = (weight_scale * math.sqrt(spread), bias_scale) if standard else (1.0, 1.0)
            self.weights.append(nn.Parameter(drawn[0] * torch.randn(shape, dtype=torch.float64)))
            self.biases.append(nn.Parameter(drawn[1] * torch.randn(shape[0], dtype=torch.float64)))
            self.scales.append((1 / math.sqrt(spread), 1.0) if standard else (weight_scale, bias_scale))

    def forward(self, x):
        *filters, last = zip(self.weights, self.biases, self.scales, strict=True)
        for layer, (weight, bias, (w, b)) in enumerate(filters, 1):
            x = F.conv2d(x, w * weight, b * bias, padding=weight.shape[-1] // 2).relu()
            x = F.avg_pool2d(x, 2) if layer in self.kernel.pool_after else x
        x = x.flatten(1) if self.kernel.readout == "flatten" else x.mean((2, 3))
        weight, bias, (w, b) = last
        return F.linear(x, w * weight, b * bias)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "pixels"),
    [
        (ConvNTKKernel(2, weight_variance=1.5, bias_variance=0.2), 25),
        (
            ConvNTKKernel(2, (1,), weight_variance=1.5, bias_variance=0.2),
            4,
        ),  # 5 halved is 2: one is left over
        (ConvNTKKernel(2, (), "average", parametrization="standard", width=4, bias_variance=0.2), 1),
        (ConvNTKKernel(1, parametrization="standard", width=4), 25),
    ],
    ids=["flat", "pooled", "standard", "standard, no bias variance"],
)
def test_is_the_limit_of_networks_of_many_channels(kernel, pixels):
    torch.manual_seed(0)
    x = samples(2, 5)
    limit = kernel(x, x)

    def deviation(factor, draws=16):
        squares = []
        for _ in range(draws):
            model = ConvNetwork(kernel, 2, pixels, 4, factor)
            tangents = jacrev(functional_call, argnums=1)(model, dict(model.named_parameters()), (x,))
            rows = torch.cat([tangent.flatten(1) for tangent in tangents.values()], 1)
            squares.append((rows @ rows.T - limit).square().mean() / limit.square().mean())
        return torch.stack(squares).mean().sqrt().item()

    # Each entry is a mean over channels: it deviates by some units over the root of their number.
    narrow, wide = deviation(2), deviation(32)
    assert wide < 3 / math.sqrt(128)
    assert 2 < narrow / wide < 8  # sqrt(32 / 2) = 4, known to a factor of 2 from 16 draws


@pytest.mark.parametrize("readout", ["flatten", "average"])
def test_one_pixel_is_a_fully_connected_network(readout):
    x, y = samples(4, 1), samples(3, 1)
    options = {"weight_variance": 1.5, "bias_variance": 0.2}
    network = {"depth": 3, "readout": readout, "kernel_size": 1, **options}
    exact = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(ConvNNGPKernel(**network)(x, y), NNGPKernel(3, **options)(x, y), **exact)
    torch.testing.assert_close(ConvNTKKernel(**network)(x, y), NTKKernel(3, **options)(x, y), **exact)
    options |= {"parametrization": "standard", "width": 7}
    expected = NTKKernel(3, **options)(x, y)
    torch.testing.assert_close(ConvNTKKernel(**network | options)(x, y), expected, **exact)
    # Of a filter of 3 x 3 pixels only the central one meets the image: 1/9 of the variance, in every layer.
    found = ConvNTKKernel(2, readout=readout)(x, y)
    torch.testing.assert_close(found, NTKKernel(2)(x, y) / 9**2, **exact)


def test_all_pairs_of_pixels_contain_those_of_one_pixel():
    # Behind the last convolution an average of blocks of pixels is all that a network of 1 x 1 pixels sees:
    # for an image of 2 x 2 pixels both readouts of pooled maps are one.
    x, y = samples(3, 2), samples(2, 2)
    flat, average = (ConvNTKKernel(2, (2,), readout)(x, y) for readout in ("flatten", "average"))
    torch.testing.assert_close(flat, average)
    torch.testing.assert_close(flat, ConvNTKKernel(2, (), "average")(x, y))


def test_average_does_not_see_a_shift_away_from_the_edges():
    # Biases of zero: black pixels stay black, so that an image with a margin is convolved without an edge.
    image = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    image[..., 3:5, 3:5] = samples(1, 2)
    moved, y = image.roll((1, 2), (-2, -1)), samples(2, 9)
    y[..., :2, :] = y[..., -2:, :] = y[..., :, :2] = y[..., :, -2:] = 0
    average, flat = ConvNTKKernel(2, (), "average"), ConvNTKKernel(2)
    torch.testing.assert_close(average(image, y), average(moved, y))
    torch.testing.assert_close(average(image, image), average(image, moved))
    assert flat(image, moved) < 0.9 * flat(image, image)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_is_symmetric_and_positive_semidefinite(kernel):
    x, y = samples(7), samples(5)
    torch.testing.assert_close(kernel(x, y), kernel(y, x).T)
    gram = kernel(x, x)
    assert torch.linalg.eigvalsh(gram).min() >= -1e-12 * gram.diagonal().max()


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("pairs", [1, 2, 7])
def test_blocks_change_neither_values_nor_gradients(kernel, pairs):
    x, y = samples(4).requires_grad_(), samples(3).requires_grad_()
    weights = torch.randn(4, 3, dtype=torch.float64)
    expected, found = (replace(kernel, block_pairs=count)(x, y) for count in (None, pairs))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    gradients = [torch.autograd.grad((value * weights).sum(), (x, y)) for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kernel", [FLAT, POOLED], ids=repr)
def test_blocks_keep_no_graph(kernel):
    def kept(block_pairs):
        numbers = []
        x = samples(6).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: numbers.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            replace(kernel, block_pairs=block_pairs)(x, samples(6))
        return sum(numbers)

    assert kept(6) < kept(None) / 4


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_derivatives(kernel):
    x, y = samples(2, 2).requires_grad_(), samples(1, 2).requires_grad_()
    assert gradcheck(kernel, (x, y), check_forward_ad=True)
    assert gradgradcheck(kernel, (x, y), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", [*KERNELS, replace(FLAT, block_pairs=1), replace(POOLED, block_pairs=1)], ids=repr
)
def test_derivatives_on_the_diagonal(kernel):
    x = samples(2, 2).requires_grad_()
    assert gradcheck(lambda s: kernel(s, s), (x,))
    assert gradgradcheck(lambda s: kernel(s, s), (x,), fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("factor", [1.0, -1.0, 2.5], ids=["coinciding", "opposite", "parallel"])
def test_derivatives_at_samples_on_one_line(kernel, factor):
    x = samples(2, 2)
    y = (factor * x.clone()).requires_grad_()
    assert gradcheck(kernel, (x.requires_grad_(), y), **AT_A_TIP)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_images_with_a_constant_background(kernel):
    # Patches of the background are parallel in all images: aligned pixels of different samples.
    x = torch.full((2, 1, 4, 4), -0.4, dtype=torch.float64)
    x[:, :, 1, 1] = torch.randn(2, 1, dtype=torch.float64)
    x.requires_grad_()
    assert gradcheck(lambda s: kernel(s, s), (x,), **AT_A_TIP)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_black_images_give_finite_derivatives(kernel):
    x = samples(3)
    x[0] = 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(x, x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "kernel", [ConvNTKKernel(4), ConvNTKKernel(3, (1, 2), "average"), ConvNNGPKernel(3)], ids=repr
)
def test_float32_knows_its_diagonal(kernel):
    # In float32 the angle of a sample with itself is noise, and must not reach the derivative.
    x = torch.randn(6, 3, 8, 8)
    weights = torch.randn(6, 6)

    def gradient(samples):
        samples = samples.clone().requires_grad_()
        (kernel(samples, samples) * weights.to(samples)).sum().backward()
        return samples.grad

    exact = gradient(x.double())
    assert (gradient(x).double() - exact).norm() <= 1e-4 * exact.norm()
    torch.testing.assert_close(kernel(x, x), kernel(x.double(), x.double()).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairs", [None, 2])
def test_half_precision_and_autocast_compute_in_float32(pairs):
    kernel = replace(POOLED, block_pairs=pairs)
    x, y = samples(3, dtype=torch.bfloat16), samples(2, dtype=torch.bfloat16)
    expected = kernel(x.float(), y.float())
    torch.testing.assert_close(kernel(x, y), expected)
    x = x.float().requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(x, y.float()).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kernel(x, y.float())
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), (gradient,))


def test_transforms_pass_through_blocks():
    x, y = samples(2), samples(3)
    blocks, whole = replace(FLAT, block_pairs=2), FLAT
    torch.testing.assert_close(jacrev(blocks)(x, y), jacrev(whole)(x, y))


def test_no_samples_have_an_empty_kernel():
    for kernel in (FLAT, POOLED):
        assert kernel(samples(0), samples(3)).shape == (0, 3)
        assert kernel(samples(3), samples(0)).shape == (3, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvNTKKernel(depth=0),
        lambda: ConvNTKKernel(depth=2, pool_after=(3,)),
        lambda: ConvNTKKernel(depth=2, pool_after=(1, 1)),
        lambda: ConvNTKKernel(depth=2, pool_after=[1]),
        lambda: ConvNTKKernel(readout="max"),
        lambda: ConvNTKKernel(kernel_size=2),
        lambda: ConvNTKKernel(weight_variance=0.0),
        lambda: ConvNNGPKernel(bias_variance=-1.0),
        lambda: ConvNTKKernel(parametrization="mup"),
        lambda: ConvNTKKernel(width=0),
        lambda: ConvNTKKernel(block_pairs=0),
        lambda: FLAT(torch.zeros(2, 12), torch.zeros(2, 12)),
        lambda: FLAT(samples(2), samples(2, 4)),
        lambda: FLAT(samples(2), samples(2).float()),
        lambda: ConvNTKKernel(2, (1, 2))(samples(2), samples(2)),
    ],
)
def test_refuses(make):
    with pytest.raises(InvalidArgumentError, match="got"):
        make()
