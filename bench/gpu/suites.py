"""pytest over several files at once, each group into a log of its own: compiling takes most of it.

python -m bench.gpu.suites FOLDER GROUPS FILE... -- OPTION...
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run them; the largest exit code."""
    folder, groups = Path(argv[0]), int(argv[1])
    split = argv.index("--")
    files, options = argv[2:split], argv[split + 1 :]

    def run(group: int) -> int:
        command = [sys.executable, "-m", "pytest", *options, *files[group::groups]]
        with (folder / f"{group}.log").open("wb") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode

    groups = min(groups, len(files))
    with ThreadPoolExecutor(groups) as pool:
        return max(pool.map(run, range(groups)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
