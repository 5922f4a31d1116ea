"""The recipe that a run keeps beside its checkpoints."""

import argparse
from pathlib import Path


def with_kept_recipe(words: list[str]) -> list[str]:
    """The words, with the recipe beside the checkpoint where they name that and no recipe.

    A run folder holds `config.yaml`, and its checkpoints in it or one folder below.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--ckpt_path"):
        parser.add_argument(name, default="")
    known, _ = parser.parse_known_args(words)
    if known.config or not Path(known.ckpt_path).is_file():
        return words
    kept = (folder / "config.yaml" for folder in Path(known.ckpt_path).resolve().parents[:2])
    return next((["--config", str(path), *words] for path in kept if path.is_file()), words)
