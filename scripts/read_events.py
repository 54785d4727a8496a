"""Reads a folder of TensorBoard's event files with TensorBoard itself and prints what it holds.

    python scripts/read_events.py DIR

prints one JSON object:

    {"scalars": {tag: [[step, value], ..]}, "images": {tag: [[step, width, height], ..]}}

with the points of a tag in the order in which they were written. A value is the f32 of the file,
written as the f64 that it equals. Each picture is decoded, and has to have the size that its record
states. The script fails if TensorBoard warns of something or stops within a record, which it passes
over by itself.

Made with Python 3.11, tensorboard 2.21, pillow 13.0.
"""

import argparse
import io
import json
import logging
import sys
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (
    DEFAULT_SIZE_GUIDANCE,
    EventAccumulator,
)
from tensorboard.util import tb_logging


class Complaints(logging.Handler):
    """Keeps TensorBoard's warnings, and its notes of a broken record, which are for debugging."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        line = record.getMessage()
        if record.levelno >= logging.WARNING or line.startswith("Truncated record"):
            self.lines.append(line)


def load(folder):
    """Everything in the folder's event files; fails if TensorBoard complains."""
    if not any("tfevents" in path.name for path in Path(folder).iterdir()):
        raise ValueError(f"{folder}: holds no event file")
    complaints = Complaints()
    logger = tb_logging.get_logger()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(complaints)
    # 0 keeps every point of a tag, where TensorBoard would draw a sample.
    events = EventAccumulator(str(folder), dict.fromkeys(DEFAULT_SIZE_GUIDANCE, 0)).Reload()
    if complaints.lines:
        raise ValueError("; ".join(complaints.lines))
    return events


def picture_size(event):
    """(width, height) of an image event's PNG, decoded; fails if its record states another."""
    with Image.open(io.BytesIO(event.encoded_image_string), formats=["PNG"]) as image:
        image.load()
        size = image.size
    if size != (event.width, event.height):
        raise ValueError(f"step {event.step}: {size}, stated as {event.width, event.height}")
    return size


def read(folder):
    """What is printed, as a dictionary."""
    events = load(folder)
    tags = events.Tags()
    return {
        "scalars": {
            tag: [[event.step, event.value] for event in events.Scalars(tag)]
            for tag in tags["scalars"]
        },
        "images": {
            tag: [[event.step, *picture_size(event)] for event in events.Images(tag)]
            for tag in tags["images"]
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR")
    args = parser.parse_args()
    try:
        found = read(args.folder)
    except (OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
