"""The suite of heads: any subclass of :class:`~etflayers.nn.CodeHead`."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.errors import InvalidArgumentError, MissingTargetsError
from etflayers.nn import CodeHead
from etflayers.testing.suites.base import Function, Suite, assert_close, assert_refused, state_of_module

__all__ = ["HeadSuite"]


class HeadSuite(Suite):
    """Checks of a head; f is a training pass, x a batch of features in which every class is seen.

    ``make`` returns the head. It draws random numbers from PyTorch's global generator or from none.
    """

    def make(self) -> CodeHead:
        """The head."""
        raise NotImplementedError

    def targets(self) -> Tensor:
        """Three samples of each class."""
        return torch.arange(3 * self.make().num_classes) % self.make().num_classes

    def point(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Features of these samples, with a mean that is not zero."""
        generator = torch.Generator().manual_seed(seed)
        size = len(self.targets()), self.make().in_features
        return (torch.randn(size, generator=generator, dtype=torch.float64) + 0.5).to(dtype)

    def function(self, made: CodeHead) -> Function:
        """The logits of a training pass, in which a copy learns."""
        targets = self.targets()

        def logits(features: Tensor) -> Tensor:
            # The copy has state of its own and shares the parameters, for their gradient.
            shared = {id(parameter): parameter for parameter in made.parameters()}
            found: Tensor = copy.deepcopy(made, shared).train()(features, targets)
            return found

        return logits

    def trained(self, dtype: torch.dtype | None = torch.float64, seed: int = 0) -> CodeHead:
        """A head after one training pass."""
        head: CodeHead = self.made(dtype, seed)
        head.train()(self.point(dtype or torch.float32, seed), self.targets())
        return head

    def test_frame_has_unit_rows(self) -> None:
        """At the start, after a training pass, and in the terms of the logits."""
        fresh, trained = self.made(), self.trained()
        terms = fresh.train().logit_terms(self.point(), self.targets())
        for frame in (self.made().frame, trained.frame, terms.frame):
            assert frame.shape == (trained.num_classes, trained.in_features), f"frame {tuple(frame.shape)}"
            # A frame may have been made in float32.
            assert_close(frame.norm(dim=-1), torch.ones(len(frame)), 1e-6)

    def test_logits_are_those_of_a_linear_layer(self) -> None:
        """In eval mode: those of ``weight`` and ``bias``, and of ``to_linear``."""
        head, features = self.trained().eval(), self.point(seed=2)
        logits, inputs = head(features), head.inputs(features)
        assert_close(logits, F.linear(inputs, head.weight, head.bias), 1e-6)
        assert_close(logits, head.to_linear(normalized_inputs=head.normalize)(inputs), 1e-6)

    def test_eval_changes_nothing(self) -> None:
        """A pass in eval mode leaves the state as it is, and takes a batch of one."""
        head = self.trained().eval()
        before = state_of_module(head)
        logits = head(self.point())
        assert_close(head(self.point()[:1]), logits[:1], self.rtol)
        torch.testing.assert_close(state_of_module(head), before, rtol=0, atol=0)

    def test_vmap(self) -> None:
        """In eval mode: a training pass changes state, for which vmap has no rule."""
        head, points = self.trained().eval(), torch.stack([self.point(seed=s) for s in range(3)])
        assert_close(torch.func.vmap(head)(points), head(points), self.rtol)

    def test_compile(self) -> None:
        """A training pass, with what it changes, and one in eval mode are one graph each."""
        for training in (True, False):
            torch.compiler.reset()
            head, twin = self.trained().train(training), self.trained().train(training)
            compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
            features, others = (self.point().requires_grad_() for _ in range(2))
            logits, mine = head(features, self.targets()), compiled(others, self.targets())
            assert_close(mine, logits, self.rtol)
            (expected,) = torch.autograd.grad(logits.sin().sum(), features)
            (gradient,) = torch.autograd.grad(mine.sin().sum(), others)
            assert_close(gradient, expected, 1e-6)
            torch.testing.assert_close(state_of_module(twin), state_of_module(head), rtol=1e-6, atol=1e-6)

    def test_half_precision(self) -> None:
        """A head in bfloat16 gives logits in bfloat16, near to those in float64."""
        head = self.made(torch.bfloat16)
        logits = self.function(head)(self.point(torch.bfloat16))
        assert logits.dtype == torch.bfloat16, f"logits of dtype {logits.dtype}"
        expected = self.function(self.made())(self.point(torch.bfloat16).double())
        assert_close(logits, expected, self.half_rtol)

    def test_autocast(self) -> None:
        """Logits have autocast's dtype."""
        super().test_autocast()
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.function(self.made(torch.float32))(self.point(torch.float32))
        assert logits.dtype == torch.bfloat16, f"logits of dtype {logits.dtype} under autocast to bfloat16"

    def test_deepcopy(self) -> None:
        """A copy of a trained head computes the same, and what it learns is its own."""
        head = self.trained()
        before = head.eval()(self.point())
        twin = copy.deepcopy(head)
        assert torch.equal(twin.eval()(self.point()), before), "the copy gives other logits"
        twin.train()(3 * self.point(seed=3), self.targets())
        assert torch.equal(head.eval()(self.point()), before), "training the copy changed the original"

    def test_state_dict(self) -> None:
        """A head that was trained on other data gives the same logits and learns the same after loading."""
        head, twin = self.trained(seed=0), self.trained(seed=1)
        twin.load_state_dict(state_of_module(head))
        for _ in range(2):
            features = self.point(seed=2)
            gap = float((head.eval()(features) - twin.eval()(features)).detach().norm())
            assert gap == 0, f"after load_state_dict the logits are off by {gap:.1e}: keep state in buffers"
            for one in (head, twin):
                one.train()(self.point(seed=3), self.targets())

    def test_meta_and_reset(self) -> None:
        """Made on meta and emptied onto a device, ``reset_parameters`` makes it valid, by PyTorch's seed."""
        with torch.device("meta"):
            head = self.make()
        head.to_empty(device="cpu")
        frames = []
        for _ in range(2):
            with torch.no_grad():
                for tensor in (*head.parameters(), *head.buffers()):
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
            torch.manual_seed(0)
            head.reset_parameters()
            frames.append(head.frame.detach().clone())
            assert_close(frames[-1].norm(dim=-1), torch.ones(len(frames[-1])), 1e-5)
            logits = head.train()(self.point(torch.float32), self.targets())
            assert torch.isfinite(logits).all(), "logits are not finite after reset_parameters"
        assert torch.equal(*frames), "reset_parameters gives another frame from the same seed"

    def test_classes_that_come_later(self) -> None:
        """Without its last class a head decides among the others and refuses it as a target."""
        head, features, targets = self.trained(), self.point(seed=2), self.targets()
        last = head.num_classes - 1
        before = head.eval()(features).detach()
        head.deactivate([last])
        logits = head(features)
        assert torch.equal(logits[:, :-1], before[:, :-1]), "deactivate changes other logits"
        shares = torch.softmax(before[:, :-1], -1)
        assert_close(torch.softmax(logits, -1), F.pad(shares, (0, 1)), self.rtol)
        state = state_of_module(head)
        assert_refused(lambda: head.train()(features, targets), InvalidArgumentError, "targets")
        torch.testing.assert_close(state_of_module(head), state, rtol=0, atol=0)
        twin = self.made(seed=1)
        twin.load_state_dict(state)
        assert torch.equal(twin.eval()(features), logits), "a state dict does not carry the active classes"
        assert torch.equal(head.activate([last]).eval()(features), before), "activate changes other logits"

    def test_degenerate_input(self) -> None:
        """Coinciding features, zeros and a single class give finite logits and gradients."""
        targets = self.targets()
        one_class = torch.zeros_like(targets)
        points = (0 * self.point(), self.point()[:1].expand_as(self.point()).clone(), self.point())
        for features, classes in zip(points, (targets, targets, one_class), strict=True):
            features = features.requires_grad_()
            logits = self.made().train()(features, classes)
            (gradient,) = torch.autograd.grad(logits.sum(), features)
            assert torch.isfinite(logits).all(), "logits are not finite"
            assert torch.isfinite(gradient).all(), "the gradient is not finite"

    def test_bad_input(self) -> None:
        """Features of another width or dtype are refused by name, and change nothing."""
        head = self.trained()
        before = state_of_module(head)
        wide = torch.zeros(len(self.targets()), head.in_features + 1, dtype=torch.float64)
        for bad in (wide, self.point().long()):
            assert_refused(lambda bad=bad: head(bad, self.targets()), InvalidArgumentError, "features")  # type: ignore[misc]
        if head.accepts_targets:
            assert_refused(lambda: head(self.point()), MissingTargetsError, "targets")
        torch.testing.assert_close(state_of_module(head), before, rtol=0, atol=0)
