"""The model that a command starts from: that of `--ckpt_path` or the recipe's, never of two."""

from collections.abc import Callable

from torch import nn

from qat import checkpoint as files
from qat.card import card_of
from qat.cli.session import Session
from qat.export.classifier import OnnxClassifier
from qat.export.onnx_file import is_onnx
from qat.quantizers import Phase, quantizers


def from_checkpoint(session: Session) -> Session:
    """The session whose recipe starts from the float model of `--ckpt_path`, where there is one.

    For commands that quantize, to which a teacher is nothing but a model to start from.

    Raises:
        ValueError: If recipe and checkpoint name two models, or the checkpoint is quantized.
    """
    settings, path = session.config.model, session.config.ckpt_path
    if path in (None, "last"):
        if settings.model is not None and settings.teacher is not None:
            raise ValueError(
                f"{session.command} knows no teacher, and model.model and model.teacher name two "
                f"models; start from the checkpoint with --ckpt_path {settings.teacher} and "
                "without model.teacher, or leave the teacher out"
            )
        return session
    if settings.teacher not in (None, path):
        raise ValueError(
            f"--ckpt_path {path} and model.teacher {settings.teacher} name two models; drop one"
        )
    model = files.load(path)
    if card_of(model).conversion is not None:
        raise ValueError(
            f"checkpoint '{path}' is quantized already; {session.command} starts from a float "
            "one, or continues an incomplete run with --ckpt_path last"
        )
    require_same_model(session, model)
    changes = {"model.model": None, "model.teacher": path, "ckpt_path": None}
    return session.changed(changes)


def is_quantized(path: str) -> bool:
    """Whether a checkpoint holds a converted model."""
    return files.read(path)[files.MANIFEST]["conversion"] is not None


def model_in(path: str) -> nn.Module:
    """The model in a checkpoint, a packed or an ONNX file."""
    return OnnxClassifier(path) if is_onnx(path) else files.load(path)


def loaded(session: Session, load: Callable[[str], nn.Module] = files.load) -> nn.Module:
    """The model of `--ckpt_path`, ready to answer.

    Args:
        session: The session.
        load: Reads the file; a command that only asks for answers takes `model_in`.

    Raises:
        ValueError: If its quantizers have no state, or the recipe asks for another model.
    """
    path = session.config.ckpt_path
    model = load(path)
    require_calibrated(model, path)
    require_same_plan(session, model)
    require_same_model(session, model)
    return model


def require_calibrated(model: nn.Module, path: str) -> None:
    """Refuse a converted model some of whose quantizers have no state yet."""
    idle = [name for name, q in quantizers(model) if q.phase is not Phase.QUANTIZE]
    if idle:
        raise ValueError(
            f"checkpoint '{path}' is converted but not calibrated: {idle[0]} and "
            f"{len(idle) - 1} others would run in float; calibrate it first"
        )


def require_same_plan(session: Session, model: nn.Module) -> None:
    """Refuse a checkpoint with another plan than the recipe states."""
    if session.config.model.plan is None:
        return
    conversion = card_of(model).conversion
    found = None if conversion is None else conversion.plan.to_list()
    if session.plan().to_list() != found:
        holds = "a float model" if found is None else "one with another plan"
        raise ValueError(
            f"the recipe has a plan, but checkpoint '{session.config.ckpt_path}' holds {holds}; "
            "name the checkpoint that this recipe trained, or its own recipe"
        )


def require_same_model(session: Session, model: nn.Module) -> None:
    """Refuse a checkpoint of another model than the recipe builds."""
    if session.config.model.model is None:
        return
    wanted = card_of(session.changed({"model.plan": None}).model()).recipe or {}
    found = card_of(model).recipe or {}
    stated = getattr(session.config.model.model, "init_args", None) or {}
    if stated.get("num_classes") is None:  # then `fit` has taken those of its data
        wanted = {**wanted, "num_classes": found.get("num_classes")}
    if keys := sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key)):
        ours, theirs = ({key: each.get(key) for key in keys} for each in (wanted, found))
        raise ValueError(
            f"the recipe builds a model with {ours}, but checkpoint '{session.config.ckpt_path}' "
            f"holds one with {theirs}; give the recipe the settings of the checkpoint, or name the "
            "one that this recipe trained"
        )
