#!/usr/bin/env bash
# Guess: a PyAV stream whose codec context is set to BT.709 encodes rgb24 frames with BT.709: the tag and the numbers agree.
# Seen, PyAV 18.1.0: the tag is written, the numbers are BT.601's (of a red: luma 96 in place of 83), and every reader that
# believes the tag, PyAV's own to_ndarray too, shows other colours: (200, 40, 90) comes back as (213, 58, 89). What
# converts rightly is reformat with dst_colorspace and dst_color_range before encode. Without any tag the round trip is right.
# Costs: a video tagged as it should be has wrong colours in every player; without the tag only in some.
# Here: frames are converted by the pack with the matrix that it then tags (wan/video/yuv.py).
#
# Output on 2026-11-28:
#   PyAV 18.1.0
#   no tag: colour space 2, luma 96, (200, 40, 90) comes back as (200, 39, 89)
#   tagged BT.709: colour space 1, luma 96, (200, 40, 90) comes back as (213, 58, 89)
#   tagged and converted: colour space 1, luma 83, (200, 40, 90) comes back as (200, 40, 91)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet numpy==2.4.6 av==18.1.0
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

GIVEN = (200, 40, 90)
picture = np.full((64, 64, 3), GIVEN, np.uint8)


def written(name, *, tagged, converted):
    """Luma, and the colour that comes back."""
    with av.open(name, "w") as file:
        stream = file.add_stream("libx264", rate=16, options={"qp": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p"
        if tagged:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1
            context.color_range = ColorRange.MPEG
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if converted:
                frame = frame.reformat(
                    format="yuv444p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with av.open(name) as file:
        frame = next(file.decode(video=0))
        luma = int(frame.to_ndarray()[0, 32, 32])
        return frame.colorspace, luma, tuple(map(int, frame.to_ndarray(format="rgb24")[32, 32]))


print("PyAV", av.__version__)
seen = {}
for name, ways in {
    "no tag": (False, False), "tagged BT.709": (True, False), "tagged and converted": (True, True)
}.items():
    seen[name] = written("video.mp4", tagged=ways[0], converted=ways[1])
    print(f"{name}: colour space {seen[name][0]}, luma {seen[name][1]}, {GIVEN} comes back as {seen[name][2]}")


def away(name):
    return max(abs(a - b) for a, b in zip(GIVEN, seen[name][2]))


assert away("no tag") <= 2 and away("tagged and converted") <= 2 and away("tagged BT.709") > 12
assert seen["tagged BT.709"][1] == seen["no tag"][1] != seen["tagged and converted"][1]
PYTHON
cd "$work"
"$python" -W ignore finding.py
