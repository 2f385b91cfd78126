"""Images that prompts name: files, or data URLs that hold them. Nothing is fetched from a network."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: C:\ is a drive


@dataclass(frozen=True)
class Picture:
    """An image: a file, or bytes that came inside the prompt. ``name`` is how it was written."""

    name: str
    path: Path | None = None
    data: bytes = b""

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.data if self.path is None else self.path.read_bytes()

    def open(self) -> Any:
        """A PIL image in RGB, turned the way its EXIF data say. Whatever Pillow raises for a bad one."""
        from PIL import Image, ImageOps, UnidentifiedImageError

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
