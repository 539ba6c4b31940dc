"""``python tests/fuzz/fuzz_files.py [SECONDS] [KIND …]``: damages files of every kind.

A file that is neither read nor refused with a ``KtrtError`` fails the run. It is written to
``tests/fuzz/corpus/KIND``, where the tests and later runs find it.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/python")]

from helpers.file_fuzz import CORPUS, Kind, make_kinds, mutate  # noqa: E402


def fuzz(kind: Kind, seconds: float, rng: random.Random) -> int:
    """Returns the number of new failures, each at another place in the code."""
    inputs, places, tried = kind.inputs(), set(), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(kind, rng.choice(inputs), rng)
        tried += 1
        try:
            kind.run(data)
        except Exception as error:  # noqa: BLE001
            place = traceback.extract_tb(error.__traceback__)[-1]
            if (place.filename, place.lineno) in places:
                continue
            places.add((place.filename, place.lineno))
            file = CORPUS / kind.name / hashlib.sha256(data).hexdigest()[:12]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            print(f"{file}: {type(error).__name__}: {str(error)[:200]}")
            traceback.print_exception(error, limit=-4)
    print(f"{kind.name}: {tried} inputs, {len(places)} places that fail")
    return len(places)


def main(seconds: float, names: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        kinds = [k for k in make_kinds(Path(folder)) if not names or k.name in names]
        found = [fuzz(kind, seconds / len(kinds), random.Random(seed)) for kind in kinds]
    return 1 if any(found) else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 300, sys.argv[2:]))
