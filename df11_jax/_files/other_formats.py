"""What files are that are not read, by how they begin."""

# The first bytes of files, and what these are.
_KINDS = {
    b"version https://git-lfs.github.com/": "a pointer of Git LFS in place of the file, which was "
    "not downloaded: run `git lfs pull`, or get it from the Hugging Face hub with `hf download`",
    b"GGUF": "a GGUF file, as llama.cpp reads them",
    b"\x80": "a pickle, which is not read, since that can run any code",
    b"PK\x03\x04": "a zip file, as torch.save writes a pickle, which is not read, since that can "
    "run any code, or as NumPy writes several arrays",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes them",
    b"\x93NUMPY": "an array of NumPy",
    b"<!doctype": "a web page, as a download leaves it that has failed: download it again",
    b"<html": "a web page, as a download leaves it that has failed: download it again",
}
START_BYTES = max(map(len, _KINDS))


class OtherFormatError(ValueError):
    """A file of a format that is not read; the message says which, and what to do."""


def find_format(start: bytes) -> str | None:
    """The format of a file of another kind than was expected.

    Args:
        start: the first bytes of the file, `START_BYTES` or more unless it has fewer.

    Returns:
        What the file is, to follow "is"; None if that is not known.
    """
    # Names of elements may be in capitals.
    lower = start.lower() if start.startswith(b"<") else start
    return next((kind for magic, kind in _KINDS.items() if lower.startswith(magic)), None)
