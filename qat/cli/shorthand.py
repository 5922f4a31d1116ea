"""Few words in place of class paths, for one's own model and one's own photos.

    --model NAME     a model of timm, or a checkpoint     model.model, or --ckpt_path
    --weights FILE   float weights of a timm model        model.model.init_args.weights
    --bits w4a4      a plan                               model.plan
    --data DIR       photos in a folder for each class    data.train, data.val
    --images DIR     photos without labels                data.val, which calibrates as well

In a recipe, too, a plain string stands for a model, or for a folder of photos.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

MODEL, WEIGHTS, TRAIN, VAL = (
    "model.model",
    "model.model.init_args.weights",
    "data.train",
    "data.val",
)
Meaning = Callable[[str, str], Mapping[str, Any]]
"""Settings, by dotted key, that a word stands for in a command."""


FILES = (".ckpt", ".lowbit", ".onnx", ".pt", ".pth", ".safetensors")
"""How the names of files of a model end."""


def model(word: str) -> Any:
    """What builds the model that a word names; a dotted path of Python is left as it is.

    Raises:
        ValueError: If it is the name of a file, and there is none.
    """
    if Path(word).is_file():
        return _component("qat.load", path=word)
    if word.endswith(FILES):
        raise ValueError(f"no file '{word}'; name a checkpoint, or a model of timm")
    if "." in word:
        import timm

        if word.partition(".")[0] not in timm.list_models():
            return word
    return _component("qat.timm_model", name=word)


def folder(word: str, split: str = "all") -> Any:
    """The source of the photos in a folder; a path of Python, and data, stay as they are."""
    if not Path(word).is_dir() and (_is_data(word) or Path(word).name == word):
        return word
    return _component("qat.data.sources.image_folder", root=word, split=split)


def images(word: str) -> Any:
    """The source of a folder of photos without labels."""
    return _component("qat.data.sources.unlabelled", root=word)


def _model_of(command: str, word: str) -> Mapping[str, Any]:
    starts = command != "fit" and Path(word).is_file()
    return {"ckpt_path": word} if starts else {MODEL: model(word)}


def _photos_of(command: str, word: str) -> Mapping[str, Any]:
    answered = command in ("export", "predict")  # then all of them, and none calibrates
    calibrating = "train" if answered else "val"
    found = {TRAIN: None, VAL: images(word), "data.calibrate_on": calibrating}
    arrival = {"stream.protocol": "qat.data.protocols.Arrival"}
    return {**found, **(arrival if command == "adapt" else {})}


FLAGS: dict[str, Meaning] = {
    "--model": _model_of,
    "--weights": lambda _, word: {f"{MODEL}.init_args.weights": word},
    "--bits": lambda _, word: {"model.plan": word},
    "--data": lambda _, word: {TRAIN: folder(word, "train"), VAL: folder(word, "val")},
    "--images": _photos_of,
}
STRINGS: dict[str, Callable[[str], Any]] = {MODEL: model, TRAIN: folder, VAL: folder}
"""Keys whose value may be a plain string, and what that stands for."""


def spelled_out(command: str, words: list[str]) -> list[str]:
    """Words of a command line with the flags above, and plain strings, spelled out."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        meaning = FLAGS.get(flag) or _of_string(flag)
        if meaning is None:
            found.append(word)
            continue
        value = value if equals else next(rest, "")
        for key, said in meaning(command, value).items():
            found += [f"--{key}", said if isinstance(said, str) else json.dumps(said)]
    return found


def resolved(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the plain strings among its values spelled out."""
    for key, meaning in STRINGS.items():
        section, name = key.split(".")
        inner = recipe.get(section)
        if isinstance(inner, dict) and isinstance(inner.get(name), str):
            recipe = recipe | {section: inner | {name: meaning(inner[name])}}
    return recipe


def _of_string(flag: str) -> Meaning | None:
    key = flag.removeprefix("--")
    return partial(_one, key) if key in STRINGS else None


def _one(key: str, _: str, word: str) -> Mapping[str, Any]:
    return {key: word if _is_data(word) else STRINGS[key](word)}


def _is_data(word: str) -> bool:
    return word.lstrip().startswith(("{", "null"))


def _component(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}
