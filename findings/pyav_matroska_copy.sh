#!/usr/bin/env bash
# Guess: a packet without dts is the empty one at the end, which PyAV's own recipe for copying a stream leaves out
# (if packet.dts is None: continue).
# Seen, PyAV 18.1.0: Matroska has no dts, and of H.264 or H.265 with B-frames, the usual case, the first packets have None,
# the only keyframe among them. The recipe copies 79 of 81 frames into an mp4 of which nothing can be decoded, without an
# error. From an mp4, or from H.264 without B-frames, it copies all; and so it does where what is left out is the packet
# without bytes (packet.size == 0).
# Costs: a video that cannot be played; ComfyUI 0.3.75 copies so when it saves a video that it need not encode.
# Here: videos are written as the mp4 or mov that they stay, never as Matroska (wan/video/video_formats.py).
#
# Output on 2026-11-28:
#   PyAV 18.1.0
#   plain.mp4: 0 of 81 packets without dts, keyframes among them 0; copied 81, of which decoded 81
#   plain.mkv: 2 of 81 packets without dts, keyframes among them 1; copied 79, of which decoded 0
#   no_b_frames.mkv: 0 of 81 packets without dts, keyframes among them 0; copied 81, of which decoded 81
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet numpy==2.4.6 av==18.1.0 imageio-ffmpeg==0.8.1
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import subprocess

import av
import imageio_ffmpeg
import numpy as np

FRAMES, SIDE = 81, 64


def write(name, *options):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-s", f"{SIDE}x{SIDE}", "-r", "16", "-i", "-", "-c:v", "libx264", "-pix_fmt", "yuv420p", *options, name]
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    subprocess.run(command, input=frames.tobytes(), check=True)


def copied(name, is_last):
    with av.open(name) as source, av.open("copy.mp4", "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        count = 0
        for packet in source.demux(source.streams.video[0]):
            if is_last(packet):
                continue
            packet.stream = stream
            target.mux(packet)
            count += 1
    return count


def decoded(name):
    with av.open(name) as file:
        return sum(1 for _ in file.decode(video=0))


print("PyAV", av.__version__)
for name, options, seen in (
    ("plain.mp4", (), (81, 81)), ("plain.mkv", (), (79, 0)), ("no_b_frames.mkv", ("-bf", "0"), (81, 81))
):
    write(name, *options)
    with av.open(name) as file:
        packets = [packet for packet in file.demux(file.streams.video[0]) if packet.size]
    without = [packet for packet in packets if packet.dts is None]
    assert decoded(name) == len(packets) == FRAMES
    assert copied(name, lambda packet: packet.size == 0) == decoded("copy.mp4") == FRAMES
    found = copied(name, lambda packet: packet.dts is None), decoded("copy.mp4")
    print(f"{name}: {len(without)} of {len(packets)} packets without dts, keyframes among them "
          f"{sum(packet.is_keyframe for packet in without)}; copied {found[0]}, of which decoded {found[1]}")
    assert found == seen
PYTHON
cd "$work"
"$python" -W ignore finding.py
