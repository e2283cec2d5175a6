#!/usr/bin/env bash
# Guess: a kernel that is compiled and on the disk is found by its source, its arguments and Triton's version.
# Seen, triton 3.6.0: every process that looks for one first reads and hashes all of Triton, 396 MiB of library with it, in
# pieces of 1 MB between which other threads take Python: 0.4 s here, 1.7 s on the host of an H200 while weights are read.
# Kernels on the disk change nothing about it; only the second look in a process is free.
# Costs: the first kernel of every new rank waits for it.
# Here: the key is made on a thread while torch is imported (distributed/libraries/triton_key.py).
#
# Output on 2026-11-29, two CPU cores:
#   triton 3.6.0 library of 396 MiB
#   first look: 396 MiB read, a key of 1889 letters
#   second look: 0 MiB read, a key of 1889 letters
#   triton 3.6.0 library of 396 MiB
#   first look: 396 MiB read, a key of 1889 letters
#   second look: 0 MiB read, a key of 1889 letters
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet triton==3.6.0
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import triton
from triton.runtime.cache import triton_key


def read() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


library = max(path.stat().st_size for path in (Path(triton.__file__).parent / "_C").glob("libtriton*.so"))
print("triton", version("triton"), f"library of {library >> 20} MiB")
for look in ("first", "second"):
    before = read()
    key = triton_key()
    print(f"{look} look: {(read() - before) >> 20} MiB read, a key of {len(key)} letters")
    if look == "first":
        assert read() - before > library > 100 << 20
    else:
        assert read() - before < 1 << 20
PYTHON
cd "$work"
"$python" finding.py
"$python" finding.py
