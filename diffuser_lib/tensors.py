"""Files of tensors: read without running what is in them, written or told why not.

Needs torch.
"""

from __future__ import annotations

import torch

from diffuser_lib.files import UserError, first_line


def read_tensors(path: str) -> dict:
    """The tensors in a file; nothing in it is executed. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:                                   # torch raises many kinds here
        raise UserError(f"{path} is not a readable file of tensors ({type(error).__name__})") from error


def write_tensors(content: dict, file) -> None:
    """torch.save into an open file. Raises OSError where the disk is full, for which torch has an error of its own."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(first_line(error)) from error
