"""Arrays from a stranger: what they declare is checked before anything is allocated, and nothing is ever unpickled."""

import math
import reprlib
import warnings
from io import BytesIO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ..common.errors import UploadError

DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
MAX_HEADER = 1000  # bytes; numpy's own for a plain array are 128
MAX_AXES = 8
_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npy(data: bytes) -> Tensor:
    """One array in numpy's file format, which lies in these bytes where it can: do not write to it.

    numpy's own reader allocates whatever the header asks for; here it must be what the bytes hold.

    Raises:
        UploadError: the bytes are no plain array of numbers (pickled objects, archives, records, ...), or not as many
            as their header declares. The text is the end of a sentence about the array.
    """
    file = BytesIO(data)
    try:
        shape, fortran, dtype = _READERS[npy.read_magic(file)](file, max_header_size=MAX_HEADER)
    except Exception as error:  # a header is parsed as Python: foreign bytes raise all kinds
        raise UploadError("has no header of a numpy array") from error
    if dtype.name not in DTYPES or not dtype.isnative:
        raise UploadError(f"declares the type {reprlib.repr(dtype.str)}, which holds no numbers that a model has")
    declared, held = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if declared != held or min(shape, default=1) < 1 or len(shape) > MAX_AXES:
        raise UploadError(f"declares the shape {reprlib.repr(shape)} and holds {held} bytes")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"]))


def raw(data: bytes) -> Tensor:
    """The bytes themselves, (n,) uint8, to be kept where they cannot be read."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
