"""Small files that hold enormous pictures are refused by their headers, before anything is decoded."""

from __future__ import annotations

import base64
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from batch_helpers import records, write_lines

pytest.importorskip("PIL")
from PIL import Image

from trainless.batch.pictures import MAX_PIXELS, Picture, TooLargeError, picture


def png(width: int, height: int) -> bytes:
    """A PNG that says it has that size, and holds a few bytes of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


def icon(inside: bytes) -> bytes:
    """An icon of 16 pixels by its own word, with a PNG inside."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22) + inside


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    from vlm_folders import save_llava

    return save_llava(tmp_path_factory.mktemp("vlm") / "llava")


@pytest.mark.parametrize("wrap", [bytes, icon])
@pytest.mark.parametrize("size", [(13000, 13000), (60000, 60000), (2**26 + 1, 1)])
def test_nothing_is_decoded(tmp_path, wrap, size):
    (tmp_path / "bomb.png").write_bytes(wrap(png(*size)))
    before = Image.MAX_IMAGE_PIXELS
    tracemalloc.start()
    with pytest.raises(TooLargeError, match="more than 67,108,864 are not allowed; make it smaller"):
        picture("bomb.png", tmp_path).open()
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert before == Image.MAX_IMAGE_PIXELS


def test_it_is_a_line_error_before_weights(run, llava, monkeypatch):
    import trainless.batch.request as module

    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("weights were loaded"))
    Path("bomb.png").write_bytes(png(13000, 13000))
    url = "data:image/png;base64," + base64.b64encode(png(9000, 9000)).decode()
    Image.new("RGB", (16, 16)).save("good.png")
    rows = [{"prompt": "<image>", "image": name} for name in ("bomb.png", "good.png", url)]
    write_lines("p.jsonl", rows)
    code, _, err = run("generate", llava, "p.jsonl", "-o", "out")
    assert code == 1 and len(err.strip().splitlines()) == 2
    assert "p.jsonl:1: image 'bomb.png' has 169,000,000 pixels, and is not decoded" in err
    assert "p.jsonl:3: image" in err and "81,000,000 pixels" in err and "--max-pixels" in err


def test_the_limit_can_be_moved(run, llava):
    Image.new("RGB", (20, 20)).save("a.png")
    write_lines("p.jsonl", [{"prompt": "<image>", "image": "a.png"}])
    args = ("generate", llava, "p.jsonl", "-o", "out", "--max-new-tokens", 1, "--max-pixels")
    code, _, err = run(*args, 399)
    assert code == 1 and "has 400 pixels, and is not decoded: more than 399 are not allowed" in err
    assert run(*args, 400)[0] == 0 and records("out")[0]["status"] == "ok"
    code, _, err = run(*args, 5000)
    assert code == 0 and "1 of 1 results are already" in err, "no setting of the run"


def test_more_than_pillow_allows_can_be_allowed(tmp_path):
    """Pillow's own limit is no obstacle to a larger one that somebody asked for."""
    (tmp_path / "large.png").write_bytes(png(20000, 10000))
    allowed = Picture("large.png", tmp_path / "large.png", pixels=2 * 10**8)
    with pytest.raises(OSError, match="truncated"):  # it went on to decode what is not there
        allowed.open()
    assert MAX_PIXELS == 2**26
