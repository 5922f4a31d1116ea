"""The data module: sources in, batches preprocessed as the model expects out."""

from functools import cached_property
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qat.card import amend, card_of, expected_by
from qat.data.classes import ClassNames, require_number
from qat.data.samples import (
    EpochSampler,
    LabelledBatch,
    LazyLoader,
    Samples,
    ShareSampler,
    collate,
    leave_interrupts,
    readable_draw,
)
from qat.data.sources import Source, aligned, subset
from qat.data.transforms import augmented
from qat.models import num_classes_of
from qat.preprocessing import Preprocessing, check_transform
from qat.reading import Refusals


class VisionData(LightningDataModule):
    """Training, validation and calibration images for one model.

    Preprocessing follows the model; a setting here that contradicts it is refused, not obeyed.
    Labels follow the model's class names. What becomes of images that cannot be read is said in
    `qat.reading`.

    Args:
        train: Training images; None where nothing is trained.
        val: Images that validation and test evaluate.
        batch_size: Images a batch, in each process.
        num_workers: Processes that load images; 0 loads in the main one.
        augment: Arguments of `timm.data.create_transform` for training images, such as
            `{scale: [0.8, 1.0], hflip: 0.5}`. None trains on images preprocessed as in evaluation.
        num_calibration: Images that calibrate quantizers, a random draw.
        calibrate_on: Where they are drawn from; drawn from `val`, they are not evaluated.
        num_augmented: Augmented copies of these images, by `augment`, that follow them; they widen
            the calibration set of methods that train.
        seed: Seeds order, augmentation and the calibration draw.
        mean: Normalization that the data needs, where it is known; must agree with the model.
        std: Likewise.
        interpolation: Likewise.
        img_size: Likewise, in pixels.
    """

    def __init__(
        self,
        val: Source,
        train: Source | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        augment: dict[str, Any] | None = None,
        num_calibration: int = 32,
        calibrate_on: Literal["train", "val"] = "train",
        num_augmented: int = 0,
        seed: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str | None = None,
        img_size: int | None = None,
    ) -> None:
        super().__init__()
        if num_calibration < 1 or batch_size < 1 or num_augmented < 0:
            raise ValueError(
                "data needs a num_calibration and a batch_size of at least 1 and a num_augmented "
                f"of at least 0, got {num_calibration}, {batch_size} and {num_augmented}"
            )
        self.train, self.val = train, val
        self.batch_size, self.num_workers = batch_size, num_workers
        self.augment = augment
        self.num_calibration, self.num_augmented = num_calibration, num_augmented
        self.calibrate_on = calibrate_on
        self.seed = seed
        self.forced = {"mean": mean, "std": std, "interpolation": interpolation}
        self.img_size = img_size
        self.expected: Preprocessing | None = None
        self.refused = {
            "train": Refusals("it is left out of training"),
            "val": Refusals("it counts as not answered"),
            "calibration": Refusals("another image is drawn to calibrate"),
        }

    def setup(self, stage: str) -> None:
        """Follow the model of the trainer's module, where nobody has attached another."""
        module = getattr(self.trainer, "lightning_module", None)
        if self.expected is None and module is not None:
            self.follow(module.model)

    def attach(
        self, preprocessing: Preprocessing, num_classes: int, class_names: ClassNames | None = None
    ) -> None:
        """Follow a model's preprocessing and classes.

        Without names the model's classes are those of `train`, else of `val`. Classes may be absent
        from `val`, from `train` none.

        Raises:
            ValueError: If a setting contradicts the preprocessing, or the classes disagree.
        """
        check_transform(self._eval_transform(preprocessing), preprocessing)
        names = class_names or self.class_names
        if self.train is not None:
            self.train = aligned(self.train, names, "data.train", complete=True)
        self.val = aligned(self.val, names, "data.val", complete=False)
        for source in filter(None, (self.train, self.val)):
            if source.labelled:
                require_number(source.num_classes, num_classes, source.class_names)
        self.expected = preprocessing

    def require_labels(self) -> None:
        """Refuse photos without labels, where accuracy is asked for.

        Raises:
            ValueError: If `train` or `val` has none.
        """
        for name, source in (("train", self.train), ("val", self.val)):
            if source is not None and not source.labelled:
                raise ValueError(
                    f"data.{name} has no labels, so nothing can be learnt or judged by it; give a "
                    "folder for each class with --data, or let `predict` name the classes"
                )

    def follow(self, model: nn.Module) -> None:
        """Attach to a model; one without class names gets those of the data.

        Raises:
            ValueError: As `attach` does.
        """
        self.attach(expected_by(model), num_classes_of(model), card_of(model).class_names)
        if card_of(model).class_names is None:
            amend(model, class_names=self.class_names)

    @property
    def class_names(self) -> ClassNames | None:
        """Name of each class; None where the data have none."""
        return (self.train or self.val).class_names

    def train_dataloader(self) -> LazyLoader:
        """Shuffled, augmented batches; incomplete ones are left out."""
        source = self._train_source()
        transform = self._train_transform(self._preprocessing())
        samples = Samples(source, transform, self.seed, self._mode())
        sampler = EpochSampler(len(source), self.seed, self._position)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} exceeds the {len(sampler)} training images"
            )
        return LazyLoader(self._loader(samples, sampler=sampler, drop_last=True), self._to_train)

    def val_dataloader(self) -> LazyLoader:
        """Every evaluation image once, in order, as a `LabelledBatch`."""
        transform = self._eval_transform(self._preprocessing())
        source = self.evaluation_source()
        samples = Samples(source, transform, self.seed, self._mode())
        return LazyLoader(self._loader(samples, sampler=ShareSampler(len(source))), self._to_judge)

    test_dataloader = val_dataloader

    def evaluation_source(self) -> Source:
        """The images that are evaluated: those of `val`, but for the ones drawn to calibrate."""
        if self.calibrate_on == "train":
            return self.val
        drawn = set(self.calibration_draw)
        return subset(self.val, [i for i in range(len(self.val)) if i not in drawn])

    def calibration_batches(self) -> list[Tensor]:
        """Batches of preprocessed images, copies last; the same in every process.

        The images themselves are preprocessed as in evaluation, their copies as in training.
        """
        source, draw = self._calibration_source(), self.calibration_draw
        preprocessing = self._preprocessing()
        exact = Samples(source, self._eval_transform(preprocessing), self.seed, self._mode())
        images = [exact[index][0] for index in draw]
        if self.num_augmented:
            if self.augment is None:
                raise ValueError("data.num_augmented needs data.augment, such as {hflip: 0.5}")
            varied = Samples(source, self._train_transform(preprocessing), self.seed, self._mode())
            for copy in range(self.num_augmented):
                images.append(varied[copy // len(draw), draw[copy % len(draw)]][0])
        return list(torch.stack(images).split(min(self.batch_size, 32)))

    def calibration_labels(self) -> Tensor:
        """Classes of the calibration images, in their order, copies included."""
        self.require_labels()
        source, draw = self._calibration_source(), self.calibration_draw
        copies = [draw[copy % len(draw)] for copy in range(self.num_augmented)]
        return torch.tensor([int(source.labels[index]) for index in [*draw, *copies]])

    def evaluation_images(self, count: int | None) -> tuple[Tensor, Tensor]:
        """The first preprocessed evaluation images, all of them for None, and their classes."""
        source = self.evaluation_source()
        exact = Samples(
            source, self._eval_transform(self._preprocessing()), self.seed, self._mode()
        )
        rows = range(min(count or len(source), len(source)))
        images, labels, _ = self._to_judge(collate(exact.__getitems__(rows)))
        return images, labels

    @cached_property
    def calibration_draw(self) -> list[int]:
        """Which images calibrate: the first of a random order that can be read.

        Raises:
            ValueError: If there is none, or none is left to evaluate.
        """
        source, refusals = self._calibration_source(), self.refused["calibration"]
        draw = readable_draw(source, self.num_calibration, self.seed, refusals)
        if self.calibrate_on == "val" and len(draw) == len(source):
            raise ValueError(
                f"num_calibration {self.num_calibration} leaves none of the {len(source)} images "
                "of data.val to evaluate; lower it, or set data.train"
            )
        return draw

    def _to_train(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """A training batch without what cannot be read, which is named."""
        self.refused["train"].add(batch.faults)
        if not len(batch.labels):
            raise ValueError(
                f"none of the {len(batch.faults)} images of a training batch can be read: "
                f"{batch.faults[0]}; remove such files, or raise data.batch_size"
            )
        return batch.images, batch.labels

    def _to_judge(self, batch: LabelledBatch) -> LabelledBatch:
        """An evaluation batch; what cannot be read is named."""
        self.refused["val"].add(batch.faults)
        return batch

    def _loader(self, samples: Samples, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            samples,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_interrupts,
            pin_memory=torch.cuda.is_available(),
            # Its own generator, so that making an iterator draws nothing from the global one.
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=collate,
            **options,
        )

    def _calibration_source(self) -> Source:
        return self._train_source() if self.calibrate_on == "train" else self.val

    def _train_source(self) -> Source:
        if self.train is None:
            raise ValueError("data.train is not set; this command needs training images")
        return self.train

    def _preprocessing(self) -> Preprocessing:
        if self.expected is None:
            raise RuntimeError("call follow(model), or attach(...), before asking for batches")
        return self.expected

    def _mode(self) -> str:
        return "RGB" if self._preprocessing().input_size[0] == 3 else "L"

    def _position(self) -> tuple[int, int]:
        """Epoch and samples done in it; not zero where a run resumes within an epoch."""
        if self.trainer is None:
            return 0, 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        batches = progress.processed
        done = batches if batches < self.trainer.num_training_batches else 0
        return self.trainer.current_epoch, done * self.batch_size

    def _settings(self, preprocessing: Preprocessing) -> dict[str, Any]:
        settings = preprocessing.to_dict() | {k: v for k, v in self.forced.items() if v is not None}
        if self.img_size is not None:
            settings["input_size"] = (preprocessing.input_size[0], self.img_size, self.img_size)
        return settings

    def _eval_transform(self, preprocessing: Preprocessing) -> Any:
        return create_transform(**self._settings(preprocessing))

    def _train_transform(self, preprocessing: Preprocessing) -> Any:
        if self.augment is None:
            return self._eval_transform(preprocessing)
        return augmented(self._settings(preprocessing), self.augment)
