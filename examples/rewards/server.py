"""A reward server for --reward http:URL, with the standard library and Pillow alone.

Usage: python3 server.py [PORT]. Replace `score` by your own.
"""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageStat


def score(image, prompt, metadata):
    """Mean brightness, from 0 to 1. Higher is better."""
    return ImageStat.Stat(image.convert("L")).mean[0] / 255


def answer(item):
    try:
        image = Image.open(io.BytesIO(base64.b64decode(item["image"]))).convert("RGB")
        return score(image, item["prompt"], item["metadata"])
    except Exception as error:  # Ends the run with these words.
        return {"error": repr(error)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"scores": [answer(item) for item in request["items"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
