"""`adapt`: test-time adaptation over a stream of corrupted images, beside the unadapted model."""

from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from rich.progress import Progress
from rich.table import Table
from torch import nn

from qat import checkpoint as files
from qat.card import card_of, expected_by
from qat.cli.adaptation import Adaptation
from qat.cli.arguments import (
    add_draws_argument,
    add_grid_argument,
    add_run_arguments,
    add_training_arguments,
)
from qat.cli.charts.stream import save_stream
from qat.cli.console import check_coverage, console, say_untrained, show
from qat.cli.evaluation import model_items
from qat.cli.grid import continuing, grid_table, run_grid
from qat.cli.progress import RunJournal
from qat.cli.session import Session, in_run_folder
from qat.cli.start import from_checkpoint, is_quantized, loaded
from qat.cli.trackers import finish, log_numbers, trackers
from qat.cli.training import with_teacher
from qat.component import describe
from qat.data import corruptions
from qat.data.corrupted import CorruptedImages, Generated
from qat.data.protocols import Arrival, StreamProtocol
from qat.data.streams import Stream
from qat.lightning.data import VisionData
from qat.lightning.training import Initialise
from qat.models import num_classes_of
from qat.tta import Adapter, Guard, Method
from qat.tta.store import SLOTS, Store

ROWS = {
    "answers as without adaptation": ("agreement", "{:.4f}"),
    "mean error, without adaptation": ("error_source_mean", "{:.4f}"),
    "mean error": ("error_mean", "{:.4f}"),
    "worst error": ("error_worst", "{:.4f}"),
    "largest loss against no adaptation": ("loss_worst", "{:+.4f}"),
    "batches adapted": ("n_adapted", "{:,}"),
    "batches rolled back": ("n_rolled_back", "{:,}"),
    "resets": ("n_reset", "{:,}"),
    "images refused": ("n_refused", "{:,}"),
    "images sent backward": ("n_backward", "{:,}"),
    "seconds, over those without adaptation": ("seconds_ratio", "{:.2f}"),
    "bytes of state": ("state_bytes", "{:,}"),
    "peak memory, over that without adaptation": ("memory_ratio", "{:.2f}"),
}
COLUMNS = {
    "error_source_mean": 4, "error_mean": 4, "error_worst": 4, "loss_worst": 4,
    "error_class_mean": 4, "ece_mean": 4, "n_reset": 1, "seconds_ratio": 1, "memory_ratio": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StreamSettings:
    """The stream of a recipe.

    Attributes:
        protocol: Which corruption comes when.
        style: Corruptions are generated from `data.val` as those of `imagenet` or `cifar`.
        images: An official set in place of generated corruptions.
        batch_size: Images a batch.
        num_images: Images under each corruption, a random draw; null takes all.
        num_workers: Processes that make batches ahead of time.
        save_every: Batches between two saves of the state.
    """

    protocol: StreamProtocol
    style: Literal["imagenet", "cifar"] = "imagenet"
    images: CorruptedImages | None = None
    batch_size: int = 50
    num_images: int | None = None
    num_workers: int = 0
    save_every: int = 20

    def __post_init__(self) -> None:
        """Refuse corruptions that nothing can draw, before a model is trained."""
        if self.images is None and not isinstance(self.protocol, Arrival):
            corruptions.implementations()


def add_arguments(parser: LightningArgumentParser) -> None:
    """Arguments of `adapt`: those of `quantize`, a method, a guard and a stream."""
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_grid_argument(parser)
    add_draws_argument(parser)
    add_adaptation_arguments(parser)


def add_adaptation_arguments(parser: LightningArgumentParser) -> None:
    """A method, a guard and a stream."""
    parser.add_argument("--method", type=Method, help="Method of adaptation.")
    parser.add_argument(
        "--guard", type=Guard | None, default=None, help="Guard that watches the method."
    )
    parser.add_class_arguments(StreamSettings, "stream", instantiate=False)
    parser.set_defaults(
        {
            "method": {"class_path": "qat.tta.Source"},
            "stream.protocol": {"class_path": "qat.data.protocols.Continual"},
        }
    )


@in_run_folder
def run(session: Session) -> None:
    """Adapt once, or once for each choice of the grid, and print a table."""
    if session.config.grid is None:
        adapt(session)
        items = session.folder.read_metrics()
        if "table" in items:
            console.print(corruption_table(items))
        show(items, ROWS, "Adaptation")
    else:
        compare(session)
    console.print(f"run folder: {session.folder.path}")
    say_what_never_adapted(session)


def adapt(session: Session, shared: Path | None = None) -> None:
    """Adapt one model over one stream, into a run folder.

    Args:
        session: The session.
        shared: Where several runs keep the model that adapts; None keeps it in the run folder.
    """
    folder = session.folder.path
    objects = session.objects("method", "guard")
    resumed = session.resumes()
    session.prepare()
    data = session.data()
    device = session.evaluator().strategy.root_device
    settings = StreamSettings(**session.section("stream"))
    path = shared or folder / "model.ckpt"
    kept = path.exists() and (resumed or shared is not None)
    model, initialise = (files.load(path), None) if kept else _model(session)
    data.follow(model)
    stream = make_stream(settings, data, model, session.seed)
    objects.method.parameters(model)  # refuses a model that it cannot adapt
    check_coverage(model, session.config.require_coverage)
    say_untrained(model)
    with trackers(session) as loggers:
        path.parent.mkdir(parents=True, exist_ok=True)
        if initialise is None and not kept:
            files.save(model, path)  # before the recipe, which does not name a checkpoint
        session.keep_recipe()
        if initialise is not None:
            with RunJournal(path.parent, console) as journal:
                initialise(model, data.calibration_batches(), journal)
            journal.clear()
            files.save(model, path)
        model = files.load(path).to(device)
        calibration = [images.to(device) for images in data.calibration_batches()]
        adapter = Adapter(
            model, objects.method, calibration, guard=objects.guard, seed=session.seed
        )
        store = Store(folder, _identity(session, adapter, model, stream))
        answers = None if stream.labelled else folder / "predictions.csv"
        table = folder / "stream.csv"
        adaptation = Adaptation(adapter, stream, store, table, settings.save_every, answers)
        if resumed:
            _resume(adaptation)
        with Progress(console=console, transient=True) as progress:
            done, total = adapter.counts.position, len(stream)
            task = progress.add_task("adapting", total=total, completed=done)

            def after(row: dict[str, Any]) -> None:
                progress.advance(task)
                curves = {f"stream/{key}": value for key, value in row.items()}
                log_numbers(loggers, curves, row["position"])

            adaptation.run(after, settings.num_workers)
        items = {
            **session.items(device),
            "resumed": resumed,
            "method": describe(objects.method),
            "guard": describe(objects.guard),
            **adaptation.items(),
            **model_items(model),
        }
        errors = {f"error/{row['corruption']}": row["error"] for row in items.get("table", ())}
        log_numbers(loggers, errors)
        if not stream.labelled and adapter.own.numel():
            files.save(adapter.adapted(), folder / "adapted.ckpt")
        never = items.get("never_adapted")
        draw = partial(save_stream, table, never, folder / "stream.png")
        finish(session.folder, loggers, items, draw)


def compare(session: Session) -> None:
    """Run every choice of the grid; models that several share are quantized once."""
    config = session.config

    def run_one(chosen: Session) -> None:
        keys = ("model", "teacher_config", "data", "init", "seed_everything", "ckpt_path")
        name = sha256(str([chosen.config[key] for key in keys]).encode()).hexdigest()[:12]
        adapt(continuing(chosen), session.folder.path / "models" / f"{name}.ckpt")

    rows: list[dict[str, Any]] = []
    for rows in run_grid(session, run_one):
        console.print(grid_table("Comparison", rows, list(config.grid), COLUMNS))
    first = {key: rows[0][key] for key in ("device", "torch_version")}
    items = session.items(first["device"])
    session.folder.write_metrics({**items, **first, "draws": config.draws, "table": rows})


def say_what_never_adapted(session: Session) -> None:
    """The last word on a run, or on choices of a grid, in which no batch adapted."""
    items = session.folder.read_metrics()
    for row in items["table"] if session.config.grid else [items]:
        if reason := row.get("never_adapted"):
            names = " ".join(str(row[axis]) for axis in session.config.grid or ())
            console.print(f"{names} no batch adapted: {reason}".strip(), highlight=False)


def make_stream(settings: StreamSettings, data: VisionData, model: nn.Module, seed: int) -> Stream:
    """The stream over the evaluation images of a recipe."""
    images = settings.images or _images(settings, data, seed)
    names, classes = card_of(model).class_names, num_classes_of(model)
    comparable = settings.images is None or None not in (names, images.class_names)
    if not comparable and images.num_classes != classes:
        raise ValueError(
            f"the model has {classes} classes, the stream's images have {images.num_classes}; set "
            f"their num_classes to {classes}, or take the model of their classes"
        )
    return Stream(
        images,
        settings.protocol,
        expected_by(model),
        settings.batch_size,
        seed,
        settings.num_images,
        names,
    )


def _images(settings: StreamSettings, data: VisionData, seed: int) -> CorruptedImages:
    """The photos of a recipe: as they come where that is the protocol, else corrupted."""
    source = data.evaluation_source() if data.val.labelled else data.val
    style = None if isinstance(settings.protocol, Arrival) else settings.style
    return Generated(source, style, seed)


def _identity(
    session: Session, adapter: Adapter, model: nn.Module, stream: Stream
) -> dict[str, Any]:
    """What must be the same for a saved state to be continued."""
    settings = Namespace({"stream": session.config.stream, "seed": session.seed})
    return {
        "model": files.digest(model.state_dict()),
        "method": describe(adapter.method),
        "guard": describe(adapter.guard),
        "stream": str(settings.as_dict()),
        "number of batches": len(stream),
    }


def _model(session: Session) -> tuple[nn.Module, Initialise | None]:
    """The model that adapts, and how it gets its quantizers' state.

    It is that of a checkpoint, or the recipe's; a float one under a plan has yet to be initialised.
    """
    path, plan = session.config.ckpt_path, session.config.model.plan
    if path not in (None, "last") and (plan is None or is_quantized(path)):
        return loaded(session), None
    module = from_checkpoint(with_teacher(session)).module()
    return module.model, module.initialise if plan is not None else None


def _resume(adaptation: Adaptation) -> None:
    """Continue where a state was saved; a run stopped before its first save starts anew."""
    store = adaptation.store
    if not any((store.folder / slot).exists() for slot in SLOTS):
        return
    for problem in adaptation.resume():
        console.print(f"a saved state is left aside: {problem}", highlight=False)


def corruption_table(items: dict[str, Any]) -> Table:
    """What one run measured under each corruption."""
    keys = ("error_source", "error", "error_class_mean", "ece_source", "ece")
    table = Table("corruption", "images", "refused", *keys, title="Error", title_justify="left")
    for row in items["table"]:
        cells = [f"{row[key]:.4f}" for key in keys]
        table.add_row(row["corruption"], str(row["n_images"]), str(row["n_refused"]), *cells)
    return table
