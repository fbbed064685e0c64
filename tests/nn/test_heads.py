"""What holds for every head, and the fixed head."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError
from etflayers.geometry import is_simplex_etf, random_stiefel, simplex_etf
from etflayers.nn import CodeHead, ETFCrossEntropy, ETFHead, FixedETFHead, NearestETFHead, UnitRowHead

if TYPE_CHECKING:
    from tests.nn.conftest import MakeHead


def batch(generator: torch.Generator, size: int = 12, in_features: int = 6) -> tuple[Tensor, Tensor]:
    features = torch.randn(size, in_features, generator=generator)
    return features, torch.arange(size) % 4


def trained(head: CodeHead, generator: torch.Generator) -> CodeHead:
    """The head after a pass in training, so that nothing is at its start value."""
    head(*batch(generator, in_features=head.in_features))
    return head


def by_hand(head: CodeHead, features: Tensor) -> Tensor:
    """s (z - m) W' in float64 from the head's own frame and center."""
    rows = features.double()
    if head.normalize:
        rows = rows / rows.square().sum(-1, keepdim=True).sqrt()
    if isinstance(head, NearestETFHead) and head.center is not None:
        rows = rows - head.center.double()
    return head.scale * rows @ head.frame.detach().double().T


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 4), (4, 4), (3, 4), (5, 2), (1, 2)])
@pytest.mark.parametrize("normalize", [False, True])
def test_eval_logits_are_scaled_inner_products_with_the_frame(
    make_head: MakeHead, generator: torch.Generator, size: tuple[int, int], normalize: bool
) -> None:
    in_features, num_classes = size
    head = make_head(in_features, num_classes, scale=3.0, normalize=normalize)
    features = torch.randn(12, in_features, generator=generator)
    head(features, torch.arange(12) % num_classes)
    head.eval()

    if isinstance(head, ETFHead):
        assert is_simplex_etf(head.frame), is_simplex_etf(head.frame).reason
    torch.testing.assert_close(head.frame.norm(dim=1), torch.ones(num_classes))
    torch.testing.assert_close(head(features).double(), by_hand(head, features), rtol=1e-5, atol=1e-5)


def test_leading_dimensions_are_kept_and_mean_the_same_in_training(
    make_head: MakeHead, generator: torch.Generator
) -> None:
    features, targets = batch(generator)
    flat, cube = make_head(), make_head()
    expected = flat(features, targets)
    logits = cube(features.view(2, 2, 3, 6), targets.view(2, 2, 3))
    assert logits.shape == (2, 2, 3, 4)
    torch.testing.assert_close(logits.flatten(0, 2), expected)


def test_one_sample_in_eval_equals_its_row_of_a_big_batch(
    make_head: MakeHead, generator: torch.Generator
) -> None:
    head = trained(make_head(), generator).eval()
    features, _ = batch(generator, size=64)
    single = torch.cat([head(row.unsqueeze(0)) for row in features])
    torch.testing.assert_close(single, head(features), rtol=0, atol=1e-6)
    torch.testing.assert_close(head(features[0]), head(features)[0], rtol=0, atol=1e-6)


def test_eval_does_not_depend_on_targets_and_changes_nothing(
    make_head: MakeHead, generator: torch.Generator
) -> None:
    head = trained(make_head(), generator).eval()
    features, targets = batch(generator)
    before = copy.deepcopy(head.state_dict())
    assert torch.equal(head(features), head(features, targets))
    assert_same_state(head.state_dict(), before)


@pytest.mark.parametrize("normalize", [False, True])
def test_to_linear_gives_the_same_logits_and_draws_no_random_numbers(
    make_head: MakeHead, generator: torch.Generator, normalize: bool
) -> None:
    head = trained(make_head(scale=2.5, normalize=normalize), generator).eval()
    features, _ = batch(generator)
    features = features + 10

    state = torch.get_rng_state()
    linear = head.to_linear(normalized_inputs=normalize)
    assert torch.equal(torch.get_rng_state(), state)

    assert type(linear) is nn.Linear
    assert (linear.bias is not None) == isinstance(head, NearestETFHead)
    inputs = F.normalize(features, dim=-1) if normalize else features
    torch.testing.assert_close(linear(inputs), head(features), rtol=1e-5, atol=2e-5)
    # A copy: further training of the head leaves it alone.
    weight = linear.weight.clone()
    trained(head.train(), generator)
    assert torch.equal(linear.weight, weight)


def test_to_linear_refuses_to_be_silently_wrong_about_normalization(make_head: MakeHead) -> None:
    with pytest.raises(InvalidArgumentError, match=r"to_linear\(normalized_inputs=True\)"):
        make_head(normalize=True).to_linear()


@pytest.mark.parametrize("dead", [0.0, 1e-20])
def test_a_dead_feature_has_no_direction_and_no_gradient(make_head: MakeHead, dead: float) -> None:
    """Divided by 1e-12, as F.normalize does, its gradient was 3.6e11 beside neighbors of .05."""
    head = make_head(normalize=True)
    features, targets = batch(torch.Generator().manual_seed(0))
    features[3] = dead
    features.requires_grad_()
    for training in (True, False):
        loss = F.cross_entropy(head.train(training)(features, targets), targets)
        (grad,) = torch.autograd.grad(loss, features)
        assert bool(torch.isfinite(grad).all())
        assert not grad[3].any()
        assert float(grad.abs().max()) < 10


def test_a_scale_that_learns(make_head: MakeHead, generator: torch.Generator) -> None:
    """It trains through the logits and through the fused loss alike."""
    features, targets = batch(generator)
    learned, constant = make_head(scale=2.5).eval(), make_head(scale=2.5).eval()
    learned.scale = nn.Parameter(torch.tensor(2.5))
    torch.testing.assert_close(learned(features), constant(features))
    torch.testing.assert_close(learned.weight, constant.weight)
    assert "scale=2.5 (learned)" in repr(learned)
    assert "scale" in learned.state_dict()

    expected = F.cross_entropy(learned(features), targets)
    loss = ETFCrossEntropy(learned)(features, targets)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, learned.scale)[0] for value in (loss, expected)]
    torch.testing.assert_close(grads[0], grads[1])
    assert abs(float(grads[0])) > 1e-4

    torch.optim.SGD([learned.scale], lr=0.1).step()
    twin = copy.deepcopy(learned)
    assert isinstance(twin.scale, nn.Parameter)
    assert twin.to_linear().weight.shape == (4, 6)


# --- state ------------------------------------------------------------------------------------------------


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_state_dict_deepcopy_and_pickle_carry_everything(
    make_head: MakeHead, generator: torch.Generator
) -> None:
    head = trained(make_head(seed=0), generator)
    saved = io.BytesIO()
    torch.save(head.state_dict(), saved)
    saved.seek(0)
    loaded = make_head(seed=1)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    features, targets = batch(generator)

    copies = [loaded, copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    in_training = head(features, targets)
    in_eval = head.eval()(features)

    for other in copies:
        assert other.training
        assert type(other) is type(head)
        assert torch.equal(other(features, targets), in_training)
        assert torch.equal(other.eval()(features), in_eval)
        assert_same_state(other.state_dict(), head.state_dict())


def test_copies_do_not_share_state(make_head: MakeHead, generator: torch.Generator) -> None:
    head = trained(make_head(), generator)
    before = copy.deepcopy(head.state_dict())
    twin = copy.deepcopy(head)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert_same_state(head.state_dict(), before)


def test_a_resumed_run_continues_to_the_same_bits(make_head: MakeHead) -> None:
    """Three steps, a checkpoint, three more steps: the numbers of six steps."""

    def start(seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), make_head(seed=seed))
        return model, optimizer_of(model)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        geoopt = pytest.importorskip("geoopt")
        optimizer: torch.optim.Optimizer = geoopt.optim.RiemannianSGD(
            model.parameters(), lr=0.1, momentum=0.9
        )
        return optimizer

    def advance(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            features = torch.randn(10, 5, generator=generator)
            targets = torch.randint(4, (10,), generator=generator)
            loss = F.cross_entropy(model[2](model[1](model[0](features)), targets), targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    unbroken, optimizer = start(seed=0)
    advance(unbroken, optimizer, range(6))

    first, optimizer = start(seed=0)
    advance(first, optimizer, range(3))
    checkpoint = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    checkpoint.seek(0)
    saved = torch.load(checkpoint, weights_only=True)
    second, optimizer = start(seed=1)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    advance(second, optimizer, range(3, 6))

    assert_same_state(second.state_dict(), unbroken.state_dict())


# --- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_autocast_changes_the_dtype_of_the_logits_and_nothing_of_the_state(
    make_head: MakeHead, generator: torch.Generator, training: bool, normalize: bool
) -> None:
    features, targets = batch(generator)
    plain, cast = make_head(normalize=normalize), make_head(normalize=normalize)
    plain.train(training), cast.train(training)

    expected = plain(features, targets)
    with torch.autocast("cpu", torch.bfloat16):
        logits = cast(features, targets)

    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.03, atol=0.05)
    assert_same_state(cast.state_dict(), plain.state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_float32(
    make_head: MakeHead, generator: torch.Generator, dtype: torch.dtype, normalize: bool, training: bool
) -> None:
    features, targets = batch(generator)
    features = features.to(dtype)
    reference, head = (make_head(normalize=normalize, scale=3.0).train(training) for _ in range(2))

    logits = head(features.requires_grad_(), targets)
    expected = reference(features.detach().float(), targets)

    assert logits.dtype == dtype
    assert torch.equal(logits, expected.to(dtype))
    assert_same_state(head.state_dict(), reference.state_dict())
    logits.sum().backward()
    assert features.grad is not None
    assert features.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_converted_head_works_and_keeps_its_state_in_float32(
    make_head: MakeHead, generator: torch.Generator, dtype: torch.dtype
) -> None:
    head, reference = trained(make_head(), generator), make_head()
    reference.load_state_dict(head.state_dict())
    before = copy.deepcopy(head.state_dict())

    head = head.to(dtype)

    if not isinstance(head, (FixedETFHead, UnitRowHead)):  # which hold a weight like any other
        assert_same_state(head.state_dict(), before)
    features, targets = batch(generator)
    logits = head(features.to(dtype), targets)
    assert logits.dtype == dtype
    expected = reference(features.to(dtype).float(), targets)
    torch.testing.assert_close(logits.float(), expected, rtol=0.03, atol=0.05)


def test_a_double_head_is_double_throughout(make_head: MakeHead, generator: torch.Generator) -> None:
    head = make_head(dtype=torch.float64)
    features, targets = batch(generator)
    logits = head(features.double(), targets)
    assert logits.dtype == head.frame.dtype == torch.float64
    torch.testing.assert_close(head.eval()(features.double()), by_hand(head, features), rtol=0, atol=1e-13)
    torch.testing.assert_close(head.frame.norm(dim=1), torch.ones(4).double(), rtol=0, atol=1e-12)
    assert is_simplex_etf(head.frame, atol=1e-12) or not isinstance(head, ETFHead)
    assert make_head().double().frame.dtype == torch.float64


# --- torch.compile, torch.export, torch.func --------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph_with_the_same_numbers(
    make_head: MakeHead,
    generator: torch.Generator,
    training: bool,
    require_tracing: Callable[[nn.Module], None],
) -> None:
    eager, head = make_head(scale=2.0).train(training), make_head(scale=2.0).train(training)
    require_tracing(head)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        features, targets = batch(generator)
        ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
        logits, expected = compiled(ours, targets), eager(theirs, targets)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        logits.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_inductor_compiles_the_nearest_head(generator: torch.Generator, training: bool) -> None:
    eager, head = (
        NearestETFHead(6, 4, generator=torch.Generator().manual_seed(0)).train(training) for _ in range(2)
    )
    features, targets = batch(generator)
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    logits, expected = torch.compile(head, fullgraph=True)(ours, targets), eager(theirs, targets)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.frame, eager.frame, rtol=1e-5, atol=1e-5)


def test_the_eval_path_exports_with_a_dynamic_batch(
    make_head: MakeHead, generator: torch.Generator, require_tracing: Callable[[nn.Module], None]
) -> None:
    head = trained(make_head(), generator).eval()
    require_tracing(head)
    features, _ = batch(generator)
    program = torch.export.export(
        head, (features,), dynamic_shapes={"features": {0: torch.export.Dim("batch")}}
    )
    for size in (1, 2, 12):
        torch.testing.assert_close(program.module()(features[:size]), head(features[:size]))


def test_functional_call_reads_and_writes_the_state_it_is_given(
    make_head: MakeHead, generator: torch.Generator
) -> None:
    head, other = make_head(seed=0), trained(make_head(seed=1), generator)
    features, targets = batch(generator)
    own = copy.deepcopy(head.state_dict())
    given = {name: tensor.clone() for name, tensor in other.state_dict().items()}

    logits = torch.func.functional_call(head, given, (features, targets))

    assert torch.equal(logits, other(features, targets))
    assert_same_state(given, other.state_dict())
    assert_same_state(head.state_dict(), own)


def test_func_grad_and_vmap_of_the_eval_path(make_head: MakeHead, generator: torch.Generator) -> None:
    head = trained(make_head(), generator).eval()
    features, targets = batch(generator)

    def loss(row: Tensor, target: Tensor) -> Tensor:
        logits: Tensor = head(row)
        return F.cross_entropy(logits, target)

    per_sample = torch.func.vmap(torch.func.grad(loss))(features, targets)

    features.requires_grad_()
    torch.autograd.backward(F.cross_entropy(head(features), targets, reduction="sum"))
    torch.testing.assert_close(per_sample, features.grad)


# --- bad input --------------------------------------------------------------------------------------------


def test_features_of_a_wrong_kind_are_named(make_head: MakeHead) -> None:
    head = make_head()
    targets = torch.zeros(3, dtype=torch.int64)
    before = copy.deepcopy(head.state_dict())
    for features, message in [
        (torch.ones(3, 5), r"features must have shape \(..., in_features\) = \(..., 6\), got \(3, 5\)"),
        (torch.ones(()), r"features must have shape .* got \(\)"),
        (torch.ones(3, 6).long(), "features must have a real floating-point dtype"),
    ]:
        for training in (True, False):
            with pytest.raises(InvalidArgumentError, match=message):
                head.train(training)(features, targets)
    assert_same_state(head.state_dict(), before)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((0, 4), {}, "in_features must be at least (1|num_classes - 1 = 3), got 0"),
        ((6, 0), {}, "num_classes must be at least [12], got 0"),
        ((6, 4), {"scale": 0.0}, "scale must be a finite number > 0, got 0.0"),
        ((6, 4), {"scale": float("nan")}, "scale must be a finite number > 0"),
        ((6, 4), {"scale": True}, "scale must be a finite number > 0, got True"),
        ((6, 4), {"scale": torch.ones(2)}, r"scale must be a number or a scalar .* got .* of shape \(2,\)"),
        ((6, 4), {"scale": torch.tensor(-1.0)}, "scale must be a finite number > 0, got -1"),
        ((6, 3.0), {}, r"num_classes must be an integer, got 3.0 \(float\)"),
        ((6.0, 4), {}, "in_features must be an integer, got 6.0"),
        ((6, True), {}, "num_classes must be an integer, got True"),
        ((6, 4), {"normalize": "False"}, "normalize must be True or False, got 'False'"),
        ((6, 4), {"dtype": torch.int64}, "dtype"),
    ],
)
def test_bad_arguments_are_named(
    make_head: MakeHead, size: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_head(*size, **options)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((2, 4), "in_features must be at least num_classes - 1 = 3, got 2"),
        ((6, 1), "num_classes must be at least 2, got 1"),
    ],
)
def test_a_simplex_needs_room(make_head: MakeHead, size: tuple[int, int], message: str) -> None:
    if isinstance(make_head(), ETFHead):
        with pytest.raises(InvalidArgumentError, match=message):
            make_head(*size)
    else:  # a code need not be one
        assert make_head(*size)(torch.ones(3, size[0]), torch.zeros(3).long()).shape == (3, size[1])


# --- the fixed head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("extra", [-1, 0, 7])
@pytest.mark.parametrize("normalize", [False, True])
def test_canonical_head_equals_a_linear_layer_and_so_does_its_gradient(
    generator: torch.Generator, num_classes: int, extra: int, normalize: bool
) -> None:
    in_features = num_classes + extra
    features = torch.randn(8, in_features, generator=generator, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(8, num_classes, generator=generator, dtype=torch.float64)
    frame = simplex_etf(num_classes, in_features, dtype=torch.float64)
    head = FixedETFHead(
        in_features, num_classes, rotation="canonical", scale=2.0, normalize=normalize, dtype=torch.float64
    )

    logits = head(features)
    rows = features / features.norm(dim=-1, keepdim=True) if normalize else features
    expected = 2 * F.linear(rows, frame)

    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-13)
    (grad,) = torch.autograd.grad(logits, features, cotangent)
    (expected_grad,) = torch.autograd.grad(expected, features, cotangent)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-13)
    assert torch.equal(head.frame, frame)


def test_the_frame_is_canonical_where_that_leaves_no_feature_out() -> None:
    for in_features, canonical in ((3, True), (4, True), (5, False)):
        head = FixedETFHead(in_features, 4)
        assert head.canonical is canonical
        assert (head.vertices is None) is canonical


def test_canonical_head_stores_no_matrix() -> None:
    head = FixedETFHead(2048, 1000, rotation="canonical")
    stored = [*head.parameters(), *head.buffers()]
    assert sum(tensor.numel() for tensor in stored) <= 1
    assert head.state_dict() == {}


def test_canonical_weight_follows_the_module() -> None:
    head = FixedETFHead(6, 4, rotation="canonical")
    assert head.double().frame.dtype == torch.float64
    assert head.to("meta").frame.device.type == "meta"


def test_a_given_rotation_is_used(generator: torch.Generator) -> None:
    rotation = random_stiefel(6, 3, generator=generator)
    head = FixedETFHead(6, 4, rotation=rotation)
    torch.testing.assert_close(head.frame, simplex_etf(4, 3) @ rotation.T)  # c E' times Q'
    assert head.state_dict().keys() == {"vertices"}


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (torch.eye(6, 4), r"rotation must have shape \(in_features, num_classes - 1\) = \(6, 3\)"),
        (2 * torch.eye(6, 3), "rotation must have orthonormal columns"),
        ("random", "rotation must be 'auto', 'canonical', 'haar' or a tensor, got 'random'"),
    ],
)
def test_bad_rotations_are_named(rotation: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        FixedETFHead(6, 4, rotation=rotation)
