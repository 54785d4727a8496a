"""Reward for pictures with writing: 1 when it reads as it should, 0 when nothing of it does.

The text that should be there is the prompt's metadata field "text", or what stands in double
quotes in the prompt. Needs: pip install rapidocr-onnxruntime
"""

import json
import re
import sys

from rapidocr_onnxruntime import RapidOCR


def wanted(item):
    text = item.get("metadata", {}).get("text")
    if text is None:
        text = " ".join(a or b for a, b in re.findall(r'"([^"]+)"|“([^”]+)”', item["prompt"]))
    if not str(text).strip():
        sys.exit(f'ocr.py: no text to look for: put it in double quotes, or in "text": {item}')
    return str(text)


def plain(text):
    """Capitals, spaces and line breaks do not count."""
    return "".join(text.lower().split())


def edits(a, b):
    """Levenshtein's distance: insertions, deletions and replacements of a character."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def main():
    read = RapidOCR()
    for line in sys.stdin:
        item = json.loads(line)
        lines, _ = read(item["image"])  # Each is [box, text, confidence], from top to bottom.
        found = plain(" ".join(text for _, text, _ in lines or []))
        right = plain(wanted(item))
        print(1 - edits(found, right) / max(len(found), len(right)), flush=True)


main()
