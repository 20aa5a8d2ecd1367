"""`python -m cil.data PATH`: what is in an image folder or an .npz file of your own, and what is wrong with it.

Classes, images of each, sizes and kinds, images that cannot be read, classes that are in one part alone, and pictures
that are there twice, above all in training and in testing. PATH is a folder with train/CLASS/ and val/CLASS/, or an
.npz file, as data=image_folder and data=npz take them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cil.data.audit import audit


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what is there; returns the exit code: 0 all is well, 1 something is wrong, 2 there is nothing to look at."""
    parser = argparse.ArgumentParser(
        prog="python -m cil.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="an image folder, or an .npz file")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    chosen = parser.parse_args(arguments)
    try:
        found = audit(chosen.path)
    except (ValueError, OSError) as error:
        print(f"cil.data: {error}", file=sys.stderr)
        return 2
    print(found.as_json() if chosen.json else found.as_table(), end="")
    return 1 if found.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
