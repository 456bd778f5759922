import errno
import json
import os
import sys
from pathlib import Path

# An OSError that tells of the machine and not of the code: a full disk, a file or folder that may not be used.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK)
MAX_BYTES = 512 * 2**20  # of a file: instances.json of the published sets is a fraction of COCO's 330 MB
MAX_JSON_MEMORY = 1280 * 2**20  # of what a JSON text becomes, see json_memory; torch takes 700 MB as well
JSON_COSTS = {b"[": 128, b"{": 176, b":": 96, b'"': 32, b",": 42}  # bytes: list, dict, its entry, half a string, number
MAX_CONFIG_BYTES = 2**20  # one takes 1 KB


class DataError(ValueError):
    """A user's mistake, or a file that is not what it should be: one line that names the file or flag and the mend."""


def run(main, args):
    """main(args) -> exit code: main's own or 0; 130 after Ctrl-C; 2 for a DataError, or a disk that is full
    or may not be written or read, printed as one line on stderr."""
    try:
        return main(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in OF_THE_DISK:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def too_small(args, **least):
    """Flags and the least that each may be -> a line about the first whose number is less, or None."""
    for flag, lowest in least.items():
        number = getattr(args, flag, None)
        if number is not None and number < lowest:
            return f"--{flag.replace('_', '-')} {number}: give {lowest} or more"


def one_line(error):
    """An exception's text as one printable line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)


# ---- Files ----------------------------------------------------------------------------------------------------------

def sync(path):
    """Flushes a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path, text):
    """Writes a text file whole or not at all. Raises DataError if it cannot be written."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error.strerror}): give another place") from error


def check_writable(folder):
    """Raises OSError if no file can be made in the folder."""
    probe = Path(folder) / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()


def read_bytes(path, limit=MAX_BYTES):
    """-> a file's bytes. Raises DataError if it is missing, cannot be read, or has more bytes than the limit."""
    try:
        if Path(path).stat().st_size > limit:
            raise DataError(f"{path} has more than {limit // 2**20} MiB: is it the right file?")
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def json_memory(content):
    """-> bytes of memory that a JSON text can take while it is parsed and after, from above, by a count of its signs:
    an empty list is 3 bytes of a file and 64 of memory."""
    wide = 1 if content.isascii() and b"\\u" not in content else 4  # one long character makes all of its string so
    return 2 * wide * len(content) + sum(n * content.count(sign) for sign, n in JSON_COSTS.items())  # 2: text, strings


def parse_json(content, where, hook=None):
    """A JSON text's bytes -> its content; `hook` sees every object of it. Raises DataError if they are no JSON, nested
    too deeply, or could fill the memory."""
    memory = json_memory(content)
    if memory > MAX_JSON_MEMORY:
        raise DataError(f"{where} could take {memory / 2**30:.1f} GiB of memory: is it the right file? Then split it")
    try:
        content = content.decode(json.detect_encoding(content), "surrogatepass")  # so that the bytes go before
        return json.loads(content, object_hook=hook)
    except DataError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{where} is not valid JSON ({one_line(error)[:100]}): is it whole?") from error


def read_json(path, hook=None, limit=MAX_BYTES):
    """-> a JSON file's content, as parse_json gives it. Raises DataError also if the file is missing or of more bytes
    than the limit."""
    return parse_json(read_bytes(path, limit), path, hook)


def need(record, key, kind, where):
    """record[key], which must be of the kind. Raises DataError naming the record."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (kind is int and not -2**63 <= value < 2**63):
        raise DataError(f"{where}: {key} is missing or no {kind.__name__}")
    return value


def path_inside(folders, name, where):
    """The first of the folders' files of that name that exists. Raises DataError if the name leaves a folder, be it by
    a symbolic link. The folder itself may be one: to keep files elsewhere, link the folder."""
    candidates = []
    for folder in folders:
        try:
            path = (folder / name).resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a null byte, a loop of links
            raise DataError(f"{where}: path {name[:200]!r}: {one_line(error)}") from error
        if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()):
            raise DataError(f"{where}: path {name[:200]!r} leaves the folder {folder}: keep the files in it, or make "
                            "the folder itself a link")
        candidates.append(path)
    return next((p for p in candidates if os.path.isfile(p)), candidates[0])
