"""Pictures before the processor: files, PIL images, arrays and tensors become PIL images of the channels that the model reads.

Image processors differ in what they take, and rescale whatever they are given by 1/255, so that floats in 0…1 come out black. Here every kind is
decided once, and every processor gets 8-bit pictures of one mode:

* an array or tensor of whole numbers holds 0…255; a float one holds 0…1 or 0…255, which its largest value says, and is rounded to 8 bits, as files
  are; what lies between the two, below 0, above 255 or is NaN is refused;
* grey pictures are repeated over the channels of a colour model; colour is never dropped for a model of one channel;
* an alpha channel that hides nothing is dropped; one that does is refused, because what lies behind is not known.

Not covered: pictures of more than 8 bits, videos, gradients (a processor works on numbers; ``inputs["pixel_values"]`` may require them).
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from circuitvision.errors import InputError

_PLAIN = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV")
_WITH_ALPHA = ("RGBA", "LA", "PA")
_TO_8_BITS = "Image.fromarray((np.asarray(image) / np.asarray(image).max() * 255).astype('uint8')).convert('RGB')"
_LAYOUTS = {"channels_first": True, "channels_last": False}
_AMBIGUOUS_UP_TO = 16.0
"""A float picture of 0…255 is brighter than this somewhere; one of 0…1 with noise on it stays below."""


def prepared(images: Any, channels: int, layout: Any = None) -> Any:
    """The same picture, list of pictures or list of lists, as PIL images of mode "L" (``channels=1``) or "RGB" (3).

    ``layout`` ("channels_first" or "channels_last") says where arrays have their channels, where their shape fits both. An array ``[n, …]`` of four
    axes is a list of n pictures.

    Raises:
        InputError: a thing that is no picture, or none that this model can be given without losing something; a model of other channels.
    """
    if channels not in (1, 3):
        raise InputError(
            f"This model reads {channels} channels, and image processors know pictures of 1 and 3; make pixel_values "
            f"[image, {channels}, height, width] yourself, with the processor's image_mean and image_std."
        )
    layout = getattr(layout, "value", layout)
    if layout is not None and layout not in _LAYOUTS:
        raise InputError(f"input_data_format={layout!r} is not understood: {' or '.join(map(repr, _LAYOUTS))}.")
    opened = _opened(images)
    leaves = list(_leaves(opened))
    if not leaves:
        raise InputError("images holds no picture; give at least one, or leave images out.")
    unit = _holds_unit_floats([item for item in leaves if not isinstance(item, Image.Image)])

    def made(item: Any) -> Any:
        if isinstance(item, list):
            return [made(one) for one in item]
        image = item if isinstance(item, Image.Image) else _from_array(item, layout, unit)
        return _of_channels(image, channels)

    return made(opened)


def count(images: Any) -> list[int]:
    """How many pictures each entry of a list of pictures, or of lists of them, holds; one entry for a single picture."""
    return [len(item) if isinstance(item, list) else 1 for item in (images if isinstance(images, list) else [images])]


def _leaves(images: Any) -> Iterator[Any]:
    for item in images if isinstance(images, list) else [images]:
        if isinstance(item, list):
            yield from _leaves(item)
        else:
            yield item


def _opened(item: Any) -> Any:
    """Lists of PIL images and arrays: files read, tensors on the CPU, stacks taken apart."""
    if isinstance(item, (list, tuple)):
        if any(isinstance(one, (int, float)) for one in item):
            raise InputError("A list of numbers is no picture; give np.asarray(…) of shape [height, width, 3].")
        return [_opened(one) for one in item]
    if isinstance(item, (str, Path)):
        return _read(item)
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, Tensor):
        if item.requires_grad:
            raise InputError(
                "A picture that requires grad loses its gradient in the processor; give picture.detach() and call .requires_grad_() on the "
                "inputs' pixel_values, or make pixel_values yourself."
            )
        item = item.detach().cpu()
        item = item.float().numpy() if item.is_floating_point() else item.numpy()
    if not isinstance(item, np.ndarray):
        raise InputError(
            f"{type(item).__name__} is no picture; give a file, an address, a PIL image, an array or a tensor."
        )
    return [_opened(one) for one in item] if item.ndim in (4, 5) else item


def _read(name: str | Path) -> Image.Image:
    """The picture in a file, at an address, or in base64 text; turned as its EXIF data say."""
    text = str(name)
    try:
        if isinstance(name, str) and text.startswith(("http://", "https://", "data:")):
            with urllib.request.urlopen(text, timeout=60) as answer:
                source: Any = io.BytesIO(answer.read())
        elif _is_file(name):
            source = Path(name).expanduser()
        else:
            source = io.BytesIO(_decoded(name))
        with Image.open(source) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise InputError(f"{_short(text)} is no picture that Pillow can read; give a PNG or JPEG file.") from error
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{_short(text)} could not be read as a picture: {error}.") from error


def _is_file(name: str | Path) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except OSError:  # longer than a name can be
        return False


def _decoded(name: str | Path) -> bytes:
    """The bytes of a base64 text; InputError for a name of a file that is not there."""
    try:
        if isinstance(name, str) and len(name) > 64:
            return base64.b64decode(name, validate=True)
    except binascii.Error:
        pass
    raise InputError(f"There is no picture {_short(str(name))}; give a file, an address, a PIL image or an array.")


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:60]}…")


# -- arrays ----------------------------------------------------------------------------------------------------------------------------------


def _holds_unit_floats(arrays: list[np.ndarray]) -> bool:
    """Whether the float pictures of a call hold 0…1 rather than 0…255: one answer for all of them, so that a dark one is read like the others."""
    tops = [0.0]
    for array in arrays:
        if array.dtype.kind != "f" or not array.size:
            continue
        low, high = float(array.min()), float(array.max())
        if not np.isfinite(low) or not np.isfinite(high):
            raise InputError("A picture holds NaN or infinity; give numbers in 0…1 or whole numbers in 0…255.")
        if low < 0 or high > 255:
            raise InputError(
                f"A float picture holds {low:g} … {high:g}; give 0…1 or 0…255. What is normalised already goes to the model itself, as "
                "{'pixel_values': …}."
            )
        whole = bool((array == np.round(array)).all())
        if 1 < high < _AMBIGUOUS_UP_TO and not whole:
            raise InputError(
                f"A float picture reaches {high:g}, which is neither 0…1 nor 0…255; clip it with .clip(0, 1), or give uint8."
            )
        tops.append(high)
    if any(0 < top <= 1 for top in tops) and max(tops) > 1:
        raise InputError(
            "Some of these float pictures hold 0…1 and others 0…255; give all of them in one range, or as uint8."
        )
    return max(tops) <= 1


def _from_array(array: np.ndarray, layout: str | None, unit: bool) -> Image.Image:
    if not array.size:
        raise InputError(f"A picture of shape {array.shape} holds nothing.")
    kind = array.dtype.kind
    if kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    elif kind == "f":
        array = np.round(array.astype(np.float64) * (255 if unit else 1)).astype(np.uint8)
    elif kind not in "iu" or array.dtype == np.uint16:
        raise InputError(f"A picture of {array.dtype} is not of 8 bits; give uint8 (0…255) or floats in 0…1.")
    elif array.dtype != np.uint8:
        if int(array.min()) < 0 or int(array.max()) > 255:
            raise InputError(f"A picture holds {array.min()} … {array.max()}; give uint8 (0…255) or floats in 0…1.")
        array = array.astype(np.uint8)
    array = np.ascontiguousarray(_channels_last(array, layout))
    found = array.shape[-1]
    if found not in (1, 3, 4):
        raise InputError(f"A picture has {found} channels; give 1 (grey), 3 (RGB) or 4 (RGB and alpha).")
    return Image.fromarray(array[..., 0] if found == 1 else array)


def _channels_last(array: np.ndarray, layout: str | None) -> np.ndarray:
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise InputError(f"A picture is [height, width], [height, width, 3] or [3, height, width], not {array.shape}.")
    fits = [first for first, size in ((True, array.shape[0]), (False, array.shape[-1])) if size in (1, 3, 4)]
    if layout is not None:
        fits = [_LAYOUTS[layout]]
    if len(fits) == 2:
        raise InputError(
            f"A picture of shape {array.shape} may have its channels first or last; say input_data_format='channels_first' or "
            "'channels_last'."
        )
    if not fits:
        raise InputError(
            f"A picture of shape {array.shape} has no axis of 1, 3 or 4 channels; several grey pictures are given as list(array)."
        )
    return np.moveaxis(array, 0, -1) if fits[0] else array


# -- modes -----------------------------------------------------------------------------------------------------------------------------------


def _of_channels(image: Image.Image, channels: int) -> Image.Image:
    """The picture with the model's channels; InputError where that loses something."""
    if image.width == 0 or image.height == 0:
        raise InputError("A picture of no pixels was given.")
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"A picture of mode {image.mode!r} has more than 8 bits; choose its range, for example {_TO_8_BITS}."
        )
    if image.mode in _WITH_ALPHA or (image.mode in _PLAIN and "transparency" in image.info):
        image = _opaque(image)
    if image.mode not in _PLAIN:
        raise InputError(f"A picture of mode {image.mode!r} is not understood; convert it: image.convert('RGB').")
    grey = image.mode in ("L", "1")
    if channels == 1 and not grey:
        raise InputError(
            f"This model reads grey pictures (one channel) and got one of mode {image.mode!r}; convert it: image.convert('L'). "
            "Several grey pictures in one array are given as list(array)."
        )
    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _opaque(image: Image.Image) -> Image.Image:
    """The picture without its alpha channel, if that hides nothing."""
    whole = image.convert("LA" if image.mode in ("L", "1", "LA") else "RGBA")
    if int(np.asarray(whole.getchannel("A")).min()) < 255:
        raise InputError(
            f"A picture of mode {image.mode!r} has transparent pixels, and what lies behind them is not known: put it on a background, "
            "Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA')).convert('RGB'), or drop the alpha "
            "channel with image.convert('RGB')."
        )
    return whole.convert("L" if whole.mode == "LA" else "RGB")
