"""What all training has in common: building, quantizing, calibrating, optimizing, checkpoints."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qat import checkpoint as files
from qat.calibrate import calibrate
from qat.card import amend
from qat.component import describe
from qat.convert import Conversion, convert_
from qat.extras import require_compiler
from qat.journal import Journal, NoJournal
from qat.plan import Plan, load_plan
from qat.quantizers import LSQ, Factory, Phase, QuantizerFactory, quantizers
from qat.train.regularize import Regularizer

MakeOptimizer = Callable[[Iterable], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]
Convert = Callable[[nn.Module, Plan, QuantizerFactory], Conversion]
NUM_CALIBRATION = 32
"""Images that calibrate where the data does not say."""
Initialise = Callable[[nn.Module, Iterable, Journal], None]
"""A `qat.calibrate.Initialiser`, in the form that the parser of arguments understands."""


class Training(LightningModule):
    """Trains a model; quantized where there is a plan. Subclasses say by what loss.

    Args:
        model: The model to train; None starts from the model in `checkpoint`.
        checkpoint: Checkpoint of a trained model.
        plan: Bit-width plan, a file or a list of rules; None trains in float.
        quantizer: Builds the quantizer of each operand of the plan.
        convert: Puts the quantizers in place.
        initialise: Sets the quantizers' starting state from calibration batches.
        optimizer: Called with parameter groups.
        lr_scheduler: Called with the optimizer and the number of its steps, stepped after each;
            None keeps the learning rate.
        regularizer: Acts on latent weights beside the loss.
        compile: Whether `torch.compile` speeds up the model, and its teacher, while it trains.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        checkpoint: str | None = None,
        plan: str | list[dict[str, Any]] | None = None,
        quantizer: Factory | QuantizerFactory = LSQ,
        convert: Convert = convert_,
        initialise: Initialise = calibrate,
        optimizer: MakeOptimizer = torch.optim.AdamW,
        lr_scheduler: MakeSchedule | None = None,
        regularizer: Regularizer | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        named = {"quantizer": quantizer, "convert": convert, "initialise": initialise}
        said = {"checkpoint": checkpoint, "plan": plan, "compile": compile}
        said |= {key: _named_or_shown(value) for key, value in named.items()}
        self.save_hyperparameters(said, logger=False)
        self.model = converted(model, checkpoint, plan, quantizer, convert)
        self.initialise = initialise
        self.journal: Journal = NoJournal()
        self.make_optimizer, self.make_schedule = optimizer, lr_scheduler
        self.regularizer = regularizer
        self.compiles = compile
        self._rng_state: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What is copied: not the journal, which is that of one run."""
        return {**super().__getstate__(), "journal": NoJournal()}

    @property
    @abstractmethod
    def measures(self) -> tuple[str, ...]:
        """Names of what is logged: `train/...` at each step, the others in validation."""

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, if there is one."""
        return None

    @abstractmethod
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""

    @abstractmethod
    def validation_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """Measures of one batch."""

    def test_step(self, batch: Sequence[Any], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Output of the model for a batch of images, with or without labels beside them."""
        return self.model(batch[0] if isinstance(batch, list | tuple) else batch)

    def calibration_batches(self) -> Iterable[Any]:
        """What quantizers are calibrated on: preprocessed images.

        A data module with `calibration_batches` gives them; of any other, or of a plain loader,
        they are the first training images, at least `NUM_CALIBRATION`.
        """
        source = getattr(self.trainer, "datamodule", None)
        own = getattr(source, "calibration_batches", None)
        return self._first_images() if own is None else own()

    def _first_images(self) -> Iterator[Tensor]:
        self.trainer.fit_loop.setup_data()
        count = 0
        with torch.random.fork_rng():  # what a loader draws to shuffle, it draws again to train
            for images, *_ in self.trainer.train_dataloader or ():
                yield images
                count += len(images)
                if count >= NUM_CALIBRATION:
                    return

    def on_fit_start(self) -> None:
        """Initialise quantizers that are still in float; a resumed run has them already."""
        files.require_loadable(self.model)
        if self.compiles and self.device.type == "cpu":
            require_compiler("model.compile")
        fresh = [q for _, q in quantizers(self.model) if q.phase is Phase.FLOAT]
        if fresh:
            batches = (self._here(batch) for batch in self.calibration_batches())
            self.initialise(self.model, batches, self.journal)
        if self.compiles:
            for model in filter(None, (self.model, self.teacher)):
                model.compile()  # in place: names in checkpoints stay as they are
        self.model.train()  # Lightning keeps the mode it finds, and a loaded model is in eval

    def on_train_start(self) -> None:
        """The model is trained from here on; a resumed run continues its random numbers."""
        amend(self.model, start=None)
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state)
            self._rng_state = None

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite, before it reaches the weights.

        Raises:
            ValueError: If it is not.
        """
        if loss.isfinite():
            return
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            for callback in self.trainer.checkpoint_callbacks:  # a broken state replaces none
                callback.save_on_exception = False  # type: ignore[attr-defined]
        raise ValueError(
            f"the loss is {loss.item()} at step {self.global_step}; lower the learning rate, or "
            "clip gradients with trainer.gradient_clip_val; the newest checkpoint is from before it"
        )

    def on_train_epoch_end(self) -> None:
        """Stop at a measure that is not finite.

        Raises:
            ValueError: If there is one.
        """
        for name, value in self.trainer.callback_metrics.items():
            if not value.isfinite():
                raise ValueError(
                    f"{name} is {value.item()} after epoch {self.current_epoch}; lower the "
                    "learning rate, or look for images that the model cannot answer"
                )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the learning rate, and let the regularizer act on gradients."""
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        if self.regularizer is not None:
            self.regularizer.adjust_gradients(self.model, self._progress())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the regularizer act on weights."""
        super().optimizer_step(*args, **kwargs)
        if self.regularizer is not None:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.regularizer.adjust_weights(self.model, lr, self._progress())

    def configure_optimizers(self) -> Any:
        """Optimizer over two groups, the second without weight decay, and the schedule."""
        optimizer = self.make_optimizer(parameter_groups(self.model))
        if self.make_schedule is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = {"scheduler": self.make_schedule(optimizer, steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model without this module, and the random state."""
        state = checkpoint["state_dict"]
        # A weight-averaging callback brings the state of a copy made before calibration; phases
        # are no weights to average.
        phases = {k: v for k, v in self.state_dict().items() if k.endswith("_extra_state")}
        state.update(phases)
        teacher = self.teacher
        more = {} if teacher is None else {"teacher_sha256": files.digest(teacher.state_dict())}
        checkpoint[files.MANIFEST] = files.manifest(self.model, state, "model.", **more)
        checkpoint["rng_state"] = torch.get_rng_state()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **arguments: Any) -> "Training":  # type: ignore[override]
        """A module around the model in a checkpoint, quantizers included.

        Args:
            checkpoint_path: A file from `fit`, a plain `Trainer`, `quantize` or `qat.save`.
            arguments: Further arguments of the module, such as `objective`; not the model's.

        Raises:
            ValueError: As `qat.load` does.
        """
        return cls(files.load(checkpoint_path), **arguments)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model.

        Raises:
            ValueError: If it describes another model, plan or factory than the recipe does.
        """
        theirs = checkpoint.get(files.MANIFEST, {})
        files.require_same(theirs, files.manifest(self.model, self.state_dict(), "model."))
        self._rng_state = checkpoint["rng_state"]
        amend(self.model, start=None)  # where training is over, none begins that would say so

    def _here(self, batch: Any) -> Any:
        return self.transfer_batch_to_device(batch, self.device, 0)

    def _progress(self) -> float:
        return min(1.0, self.global_step / max(1, self.trainer.estimated_stepping_batches))


def converted(
    model: nn.Module | None,
    checkpoint: str | None,
    plan: str | list[dict[str, Any]] | None,
    quantizer: Factory | QuantizerFactory,
    convert: Convert,
) -> nn.Module:
    """The model of a recipe, its quantizers in place; the arguments are those of `Training`.

    Raises:
        ValueError: If there is neither a model nor a checkpoint.
    """
    if model is None:
        if checkpoint is None:
            raise ValueError(
                "there is no model: name one, --model, or model.teacher to start from its copy"
            )
        model = files.load(checkpoint)
    if plan is not None:
        convert(model, plan_for(quantizer, plan), quantizer)
    return model


def plan_for(quantizer: Factory | QuantizerFactory, plan: str | list[dict[str, Any]]) -> Plan:
    """The plan of a recipe; `w4a4` means the uniform plan that suits the quantizer."""
    return load_plan(plan, getattr(quantizer, "has_zero_point", True))


def _named_or_shown(value: Any) -> Any:
    """A callable as plain data: by its name where it has one, else as Python shows it."""
    try:
        return describe(value)
    except ValueError:
        return repr(value)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters that decay, and those that never do.

    Scales and all other quantizer state, biases, normalization, and what timm's
    `no_weight_decay` names, such as position embeddings, are in the second group.
    """
    exempt = getattr(model, "no_weight_decay", lambda: ())()
    owned = {id(p) for _, quantizer in quantizers(model) for p in quantizer.parameters()}
    decays: list[nn.Parameter] = []
    stays: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        keeps = parameter.ndim < 2 or name in exempt or id(parameter) in owned
        if parameter.requires_grad:
            (stays if keeps else decays).append(parameter)
    return [{"params": decays}, {"params": stays, "weight_decay": 0.0}]
