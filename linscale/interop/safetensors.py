"""The safetensors format: 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), raw arrays.

Read through a memory map, written array by array, so that a model larger than memory can pass.
"""

import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from linscale.config import ConfigError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "BOOL": np.dtype(np.bool_),
}
_HEADER = 100_000_000  # bytes at most, the format's own limit


def write(path: Path, arrays, metadata: dict[str, str] | None = None) -> None:
    """Whole or not at all. arrays: name -> array; or an object with keys(), and get(name) that makes an array."""
    header, offset = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    names = {dtype: name for name, dtype in _DTYPES.items()}
    for name in arrays:
        array = arrays[name]
        header[name] = {
            "dtype": names[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f".{path.name}.tmp")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in arrays:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read(path: Path) -> dict[str, np.ndarray]:
    """Name -> array, read-only views of the mapped file. Raises ConfigError where the file is not whole."""
    header, start = _header(path)
    size, arrays, end = os.path.getsize(path), {}, 0
    data = np.memmap(path, np.uint8, "r", offset=start) if size > start else np.zeros(0, np.uint8)
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise ConfigError(f"{path}: {name} has dtype {entry['dtype']}; it must be {', '.join(_DTYPES)}.")
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or stop > len(data):
                raise ConfigError(
                    f"{path} is corrupt: {name} of shape {shape} should lie in bytes {begin} to {stop} of "
                    f"{len(data)}; fetch it again."
                )
            arrays[name] = data[begin:stop].view(dtype).reshape(shape)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is corrupt: its header cannot be read ({error}); fetch it again.") from error
    if end != len(data):
        raise ConfigError(f"{path} is corrupt: {len(data) - end} bytes follow its last array; fetch it again.")
    return arrays


def metadata(path: Path) -> dict[str, str]:
    """What `write` was given as metadata. Raises ConfigError where the header is not whole."""
    return _header(path)[0].get("__metadata__", {})


def _header(path: Path) -> tuple[dict, int]:
    """(the JSON of the header, byte at which the arrays begin)"""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_HEADER, size - 8):
            raise ConfigError(f"{path} is no safetensors file: its header would have {length} bytes; fetch it again.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ConfigError(f"{path} is corrupt: its header cannot be read ({error}); fetch it again.") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path} is corrupt: its header is no JSON object; fetch it again.")
    return header, 8 + length


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of model.safetensors, or of the files that model.safetensors.index.json names. Raises ConfigError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            where = json.loads(index.read_text())["weight_map"]
            files = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} cannot be read ({error}); fetch it again.") from error
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise ConfigError(f"{folder} lacks {', '.join(missing)}, which {index.name} names; fetch them.")
        arrays = {}
        for name in files:
            arrays |= read(folder / name)
        return arrays
    if (folder / "model.safetensors").is_file():
        return read(folder / "model.safetensors")
    if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        raise ConfigError(
            f"{folder} holds {pickles[0]}, a pickle, which could run any code and is never read; save the model with "
            "safe_serialization=True."
        )
    raise ConfigError(f"{folder} holds no model.safetensors; name a folder that save_pretrained wrote.")
