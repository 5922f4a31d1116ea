"""What the gradient methods share: adapted parameters, optimizer, balance, batch statistics."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qat.card import expected_by
from qat.models import num_classes_of
from qat.tta.answer import State
from qat.tta.balance import Balance, Plain
from qat.tta.base import Method
from qat.tta.norms import BatchStatistics, batch_norms, norm_parameters
from qat.tta.optim import SGD, Optimizer
from qat.tta.overlay import Hooks, Overlay, no_hooks
from qat.tta.parts import at, part, with_part


@dataclass(frozen=True)
class GradientMethod(Method):
    """Descends a loss in the weights and biases of the normalization layers.

    Attributes:
        optimizer: The rule of descent.
        balance: What stands in for entropy and cross-entropy, such as `qat.tta.ABL1`.
        prior: Batch normalization uses n / (n + prior) parts of the statistics of a batch of n,
            the rest its own. No effect on other normalization, which has none.
    """

    optimizer: Optimizer = SGD()  # noqa: RUF009 - a frozen value
    balance: Balance = Plain()  # noqa: RUF009 - a frozen value
    prior: int = 0

    def parameters(self, model: nn.Module) -> list[str]:
        """Weights and biases of all normalization layers."""
        return norm_parameters(model)

    def start(self, on: Overlay, calibration: Iterable[Tensor]) -> State:
        """The model's own parameters, and an optimizer and a balance that have seen nothing.

        Raises:
            ValueError: If no gradient comes through the model, so that no batch could ever adapt.
        """
        params = on.flat()
        if not params.is_meta:  # where there are no values, none can be tried
            self.require_gradient(on)
        state: State = {"params": params}
        state = with_part(state, "optimizer", self.optimizer.start(params))
        balance = self.balance.start(num_classes_of(on.model))
        return with_part(state, "balance", at(params.device, balance))

    def predict(self, on: Overlay, state: State, images: Tensor) -> Float[Tensor, "n c"]:
        """Logits of the adapted model."""
        logits = on(state["params"], images, self.hooks(on, images))
        return self.balance.answer(part(state, "balance"), logits)

    def require_gradient(self, on: Overlay) -> None:
        """Try on two images of noise whether a gradient reaches the adapted parameters."""
        size, generator = expected_by(on.model).input_size, torch.Generator().manual_seed(0)
        images = torch.randn(2, *size, generator=generator).to(on.like)
        params, hooks = on.flat().requires_grad_(), self.hooks(on, images)
        try:
            found = gradient(lambda: on(params, images, hooks).square().sum(), params).any()
        except FloatingPointError:
            return  # noise may be too much for a model that answers images
        except RuntimeError as error:
            found, reason = False, str(error).splitlines()[0]
        else:
            reason = "it is zero everywhere"
        if not found:
            raise ValueError(
                f"no gradient reaches what {type(self).__name__} adapts, so no batch could adapt "
                f"({reason[:160]}); switch gradient checkpointing off with "
                "model.set_grad_checkpointing(False), load the model outside of "
                "torch.inference_mode(), or use a method without gradients, such as qat.tta.FOA"
            )

    def hooks(self, on: Overlay, images: Tensor) -> Hooks:
        """Hooks under which the model normalizes by the statistics of the batch."""
        if not batch_norms(on.model):
            return no_hooks
        return BatchStatistics(len(images) / (len(images) + self.prior))

    def forward(
        self, on: Overlay, state: State, images: Tensor
    ) -> tuple[Tensor, Tensor, State, Tensor]:
        """What a step begins with.

        Returns:
            The parameters that gradients are taken of, logits with gradient, the state with the
            balance after this batch, and the answer.
        """
        params = state["params"].detach().requires_grad_()
        with torch.enable_grad():
            logits = on(params, images, self.hooks(on, images))
        balance = self.balance.update(part(state, "balance"), logits.detach())
        answer = self.balance.answer(balance, logits.detach())
        return params, logits, with_part(state, "balance", balance), answer

    def descend(self, state: State, grad: Float[Tensor, " p"]) -> State:
        """The state after a step of the optimizer."""
        params, optimizer = self.optimizer.step(state["params"], grad, part(state, "optimizer"))
        return with_part({**state, "params": params}, "optimizer", optimizer)


def gradient(loss: Callable[[], Tensor], params: Tensor) -> Float[Tensor, " p"]:
    """Gradient of a scalar loss.

    Raises:
        FloatingPointError: If the loss or the gradient is not finite.
    """
    with torch.enable_grad():
        value = loss()
    (grad,) = torch.autograd.grad(value, params)
    if not (value.isfinite() & grad.isfinite().all()):
        raise FloatingPointError("the loss or its gradient is not finite")
    return grad
