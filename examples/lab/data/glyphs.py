"""Glyphs: what the twelve DejaVu faces in matplotlib's wheel all draw, many classes with few images each.

A class is a letter, digit or symbol that every face has (2,197 of them). Some are drawn as another one is in
every face (Greek Alpha as Latin A): 93 such are one class with the first of their kind, and one
draws nothing, which leaves 2,103. The faces are the variation: whole faces are kept for validation and for
the test, so that a network is asked about letters in a type that it has not seen.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etflayers.checks import require_module
from etflayers.errors import InvalidArgumentError
from etflayers.storage import read_tensors, write_tensors
from lab.data.images import ImageData, Split

KINDS = ("L", "N", "S")  # Unicode's general categories: letters, numbers, symbols
VALIDATION_FACES = ("DejaVuSans-Oblique", "DejaVuSerif-Bold")
TEST_FACES = ("DejaVuSansMono", "DejaVuSerif-BoldItalic")
# At this size it is decided which glyphs are drawn alike, so that K does not depend on the size asked for.
# No glyph reaches over the edge.
SIDE, FONT_SIZE, BASELINE = 32, 20, 23
RECIPE = "1"  # to be changed with what is drawn, or an old file would be taken for it


def load_glyphs(root: Path, side: int = SIDE) -> ImageData:
    """Glyphs of ``side`` pixels, drawn once and then read from a file in ``root``.

    Classes are ordered: ASCII's digits and letters first, then by code point; the first K of them are K
    different classes at any K.
    """
    paths = face_paths()
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    made_from = {
        "faces": digest,
        "pillow": require_module("PIL", extra="examples").__version__,
        "recipe": RECIPE,
    }
    path = root / f"glyphs-{side}.safetensors"
    content = _kept(path, made_from)
    if content is None:
        characters, images = draw_classes(paths, side)
        content = {"images": images, "characters": torch.tensor([ord(character) for character in characters])}
        root.mkdir(parents=True, exist_ok=True)
        write_tensors(path, content, made_from)
    return _by_face(content["images"], content["characters"], paths)


def _kept(path: Path, made_from: dict[str, str]) -> dict[str, Tensor] | None:
    """What an earlier run has drawn from the same; nothing if the file is damaged: it is drawn again."""
    try:
        content, record = read_tensors(path)
    except (FileNotFoundError, InvalidArgumentError):
        return None
    return content if record == made_from else None


def face_paths() -> list[Path]:
    """The files of the twelve faces; the two for display have fewer glyphs."""
    folder = Path(require_module("matplotlib", extra="examples").get_data_path()) / "fonts" / "ttf"
    return sorted(path for path in folder.glob("DejaVu*.ttf") if "Display" not in path.stem)


def common_characters(paths: Sequence[Path]) -> list[str]:
    """Letters, numbers and symbols that every face has, in the order of the classes."""
    fonts = require_module("fontTools.ttLib", extra="examples")  # of which matplotlib is made
    maps = [set(fonts.TTFont(path).getBestCmap()) for path in paths]
    common = (chr(code) for code in set.intersection(*maps))
    chosen = [character for character in common if unicodedata.category(character)[0] in KINDS]
    return sorted(
        chosen, key=lambda character: (not (character.isascii() and character.isalnum()), character)
    )


def draw(characters: Sequence[str], paths: Sequence[Path], side: int) -> Tensor:
    """White on black, standing on one line: ``(characters, faces, side, side)`` bytes."""
    image, drawing, fonts = (
        require_module(f"PIL.{name}", extra="examples") for name in ("Image", "ImageDraw", "ImageFont")
    )
    scale = side / SIDE
    images = np.zeros((len(characters), len(paths), side, side), np.uint8)
    for face, path in enumerate(paths):
        # The basic layout is that of Pillow alone, the same on every machine.
        font = fonts.truetype(path, FONT_SIZE * scale, layout_engine=fonts.Layout.BASIC)
        for number, character in enumerate(characters):
            picture = image.new("L", (side, side))
            place = (side / 2, BASELINE * scale)
            drawing.Draw(picture).text(place, character, fill=255, font=font, anchor="ms")
            images[number, face] = np.asarray(picture)
    return torch.from_numpy(images)


def draw_classes(paths: Sequence[Path], side: int) -> tuple[list[str], Tensor]:
    """One character for each class, and its images: no blank one, none that looks like an earlier one."""
    characters = common_characters(paths)
    images = draw(characters, paths, SIDE)
    first: dict[bytes, int] = {}
    for number, glyph in enumerate(images):
        if glyph.any():
            first.setdefault(glyph.numpy().tobytes(), number)
    kept = list(first.values())
    chosen = [characters[number] for number in kept]
    return chosen, images[kept] if side == SIDE else draw(chosen, paths, side)


def _by_face(images: Tensor, codes: Tensor, paths: Sequence[Path]) -> ImageData:
    """Faces as splits, every class in each of them once for each face."""
    names = [path.stem for path in paths]
    held = (*VALIDATION_FACES, *TEST_FACES)
    faces = {"train": [name for name in names if name not in held]}
    faces |= {"validation": list(VALIDATION_FACES), "test": list(TEST_FACES)}
    targets = torch.arange(len(images))
    parts: dict[str, Any] = {}
    for part, chosen in faces.items():
        pictures = images[:, [names.index(name) for name in chosen]]
        parts[part] = Split(pictures.flatten(0, 1).unsqueeze(1), targets.repeat_interleave(len(chosen)))
    return ImageData.of("glyphs", **parts, class_names=tuple(chr(code) for code in codes.tolist()))
