"""Name what is on the images of a folder, with NumPy and Pillow alone.

    python examples/serve_folder.py model.lowbit photos/

The file is what `train.py export --format packed` writes; torch is not needed here.
"""

import sys
from pathlib import Path

from qat import runtime


def main(file: str, folder: str) -> None:
    """Print class and confidence of every image."""
    model = runtime.load(file)
    for path in sorted(Path(folder).iterdir()):
        try:
            answer = model.predict([path])[0]
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        print(f"{path.name}\t{answer.name}\t{answer.confidence:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
