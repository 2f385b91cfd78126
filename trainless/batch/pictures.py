"""Images that prompts name: files, or data URLs that hold them. Nothing is fetched from a network."""

from __future__ import annotations

import base64
import binascii
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

MAX_PIXELS = 2**26  # 8192 x 8192; decoded, that is 200 MB, and several times that on the way to a model
_LIMIT = threading.Lock()  # Pillow's own limit is one for the process
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: C:\ is a drive


class TooLargeError(ValueError):
    """An image of more pixels than are decoded, whatever the size of its file."""


@dataclass(frozen=True)
class Picture:
    """An image: a file, or bytes that came inside the prompt. ``name`` is how it was written.

    ``pixels``: one of more is not decoded.
    """

    name: str
    path: Path | None = None
    data: bytes = b""
    pixels: int = field(default=MAX_PIXELS, compare=False)

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.data if self.path is None else self.path.read_bytes()

    def open(self) -> Any:
        """A PIL image in RGB, turned the way its EXIF data say. Whatever Pillow raises for a bad one.

        TooLargeError, before anything is decoded, for one of too many pixels by its header.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        with _limited(self.pixels):
            try:
                opened = Image.open(BytesIO(self.read()))
            except UnidentifiedImageError:  # its message is the address of the buffer
                raise ValueError("no picture in a format that Pillow knows") from None
            with opened as image:
                upright = ImageOps.exif_transpose(image) or image
                if upright.mode.startswith("I;16"):  # Pillow would cut all above 255 to white
                    upright = upright.point(lambda value: value * (1 / 256)).convert("L")
                elif upright.mode in ("I", "F"):
                    raise ValueError(
                        f"its pixels are of mode {upright.mode}, without a range; save it with 8 or 16 bits"
                    )
                return upright.convert("RGB")


@contextmanager
def _limited(pixels: int) -> Iterator[None]:
    """Pillow's own check with our limit: it also sees a picture inside the file of another one (icons)."""
    from PIL import Image

    with _LIMIT, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            size = re.search(r"\((\d+) pixels\)", str(error))
            raise TooLargeError(
                f"has {int(size[1]):,} pixels, and is not decoded: more than {pixels:,} are not allowed; make it "
                "smaller, or give a higher --max-pixels"
                if size
                else f"has more than {pixels:,} pixels, and is not decoded"
            ) from None
        finally:
            Image.MAX_IMAGE_PIXELS = before


def picture(name: str, folder: Path) -> Picture | str:
    """The Picture that ``name`` means, or what is wrong with it. Relative paths start from ``folder``."""
    if name.startswith("data:"):
        return _inline(name)
    scheme = _SCHEME.match(name)
    if scheme and scheme[1] == "file":
        place = urlparse(name)
        if place.netloc not in ("", "localhost"):
            return f"image {name!r} is on another machine; give a file of this one"
        path = Path(unquote(place.path))
    elif scheme and not _is_file(folder / name):
        return f"image {_short(name)!r} is remote, and nothing is fetched; download it and give its path"
    else:
        path = folder / Path(name).expanduser()
    try:
        if not path.is_file():
            return f"image {_short(name)!r} is no file (looked for {_short(str(path))})"
        path.open("rb").close()
    except OSError as error:
        return f"image {_short(name)!r} cannot be read ({error.strerror})"
    return Picture(name, path)


def _inline(url: str) -> Picture | str:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        return f"image {_short(url)!r}: a data URL must read data:image/…;base64,…"
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        return f"image {_short(url)!r} is not valid base64 ({error})"
    return Picture(f"{head},… ({len(data)} bytes)", data=data)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long to be the name of one
        return False


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:60]}…"
