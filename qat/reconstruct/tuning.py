"""What methods of one pass of block reconstruction share: what is trained, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, final

from qat.reconstruct.loop import Perturbation, Reconstruction
from qat.reconstruct.terms import Term
from qat.reconstruct.trainable import Rounding, Steps, Trainable, Weights


@final
@dataclass(frozen=True)
class Tuning:
    """How every stage of a model is tuned, whatever the loss.

    A method has these as fields of its own, so that recipes name them flat; `of` collects them.

    Attributes:
        rounding: `ste` trains weights straight through rounding, `adaround` its direction.
        num_steps: Steps for each stage.
        batch_size: Images a step.
        lr: Learning rate of weights, or of the rounding.
        step_lr: Learning rate of activation steps, as a share of their size.
        drop: Probability that an activation value passes unquantized in training (QDrop).
        exact_inputs: Probability that a value of a stage's input is that of the float model.
        seed: Seeds the choice of images, and their perturbation.
    """

    rounding: Literal["ste", "adaround"]
    num_steps: int
    batch_size: int
    lr: float
    step_lr: float
    drop: float
    exact_inputs: float
    seed: int

    @classmethod
    def of(cls, method: object) -> "Tuning":
        """What a method says in the fields of these names."""
        return cls(**{field.name: getattr(method, field.name) for field in fields(cls)})

    @property
    def train(self) -> tuple[Trainable, ...]:
        """The trainable sets: weights or their rounding, and activation steps."""
        weights = Weights(self.lr) if self.rounding == "ste" else Rounding(lr=self.lr)
        return weights, Steps(self.step_lr)

    def loop(
        self,
        losses: Mapping[str, tuple[Term, float]],
        *,
        normalise: bool = True,
        perturb: Perturbation | None = None,
    ) -> Reconstruction:
        """The engine with a loss.

        Args:
            losses: Terms of the loss and their weights, by name.
            normalise: As in `Reconstruction`.
            perturb: As in `Reconstruction`.
        """
        return Reconstruction(
            terms={name: term for name, (term, _) in losses.items()},
            weights={name: weight for name, (_, weight) in losses.items()},
            train=self.train,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            normalise=normalise,
            drop=self.drop,
            exact_inputs=self.exact_inputs,
            perturb=perturb,
            seed=self.seed,
        )
