"""What every file needs: one clear line if bad, a bounded size, writing whole or not at all."""

import errno
import json
import multiprocessing
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

# An OSError that tells of the machine, not of the code: a full disk, a file that may not be used.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
               errno.ENOLCK)
# What torch says when a DataLoader's process was killed, or its file in /dev/shm finds no room.
OF_A_READER = r"DataLoader worker \(pid|</torch_\d"
MAX_BYTES = 512 * 2**20  # of a file: instances.json of the published sets is smaller than COCO's
MAX_JSON_MEMORY = 1280 * 2**20  # of what a JSON text becomes, see json_memory
JSON_COSTS = {b"[": 128, b"{": 176, b":": 96, b'"': 32, b",": 42}  # bytes of memory per sign
MAX_CONFIG_BYTES = 2**20  # one takes 1 KB


class DataError(ValueError):
    """A user's mistake, or a file that is not what it should be: one line that names the file or
    the flag, and the remedy."""


def run(main, args):
    """main(args) -> exit code: main's own or 0; 130 after Ctrl-C; 2 for a DataError, a disk that is
    full or may not be used, or a process that reads images and died, as one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a sentence outside the locale's letters
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
    except RuntimeError as error:
        if not re.search(OF_A_READER, str(error)):
            raise
        print("error: a process that reads images died: if /dev/shm is small, as in a container "
              "(df -h /dev/shm), give --workers 0; else give fewer --workers, for want of memory",
              file=sys.stderr)
        return 2
    finally:
        end_children()


def end_children():
    """Kills the processes that read images. One that hangs, as on a network disk, would keep this
    one from ending."""
    for child in multiprocessing.active_children():
        with suppress(RuntimeError):  # torch's, when a DataLoader's process is killed
            child.kill()
            child.join(1)


def too_small(args, **least):
    """Flags and the least that each may be -> a line about the first that is less, or None."""
    for flag, lowest in least.items():
        number = getattr(args, flag, None)
        if number is not None and number < lowest:
            return f"--{flag.replace('_', '-')} {number}: give {lowest} or more"


def one_line(error):
    """An exception's text as one printable line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)


# ---- Writing -------------------------------------------------------------------------------------

def sync(path):
    """Flushes a file or a folder to the disk. Some file systems cannot flush a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not os.path.isdir(path) or error.errno not in (errno.EINVAL, errno.ENOTSUP,
                                                          errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(handle)


@contextmanager
def whole(path):
    """Gives a path to write to, which takes the place of `path` when the block has ended: the file
    is written whole or not at all. Raises DataError if it cannot be written."""
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a picture format without such pixels
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path} cannot be written ({reason}): give another place") from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path, text):
    """Writes a text file, as `whole` does."""
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def check_folder(folder, name=None):
    """Makes a folder. Raises DataError, about `name` or the folder, if no file can be made in it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        probe = Path(folder) / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"{name or folder} cannot be written ({error.strerror}): "
                        "give another place") from error


def check_writable(path, picture=False):
    """Makes the folder of `path`. Raises DataError unless a file can be made at `path`; of a
    picture also for an ending that belongs to no format."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a file")
    if picture and Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise DataError(f"{path}: no picture format has the ending {path.suffix!r}; "
                        "give .png or .jpg")
    check_folder(path.parent, path)


# ---- Reading -------------------------------------------------------------------------------------

def read_bytes(path, limit=MAX_BYTES):
    """-> a file's bytes. Raises DataError if it cannot be read or has more of them than `limit`."""
    try:
        if Path(path).stat().st_size > limit:
            raise DataError(f"{path} has more than {limit // 2**20} MiB: is it the right file?")
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def as_utf8(content, where):
    """A text's bytes in UTF-8, -16 or -32 -> in UTF-8, without a byte order mark. Windows tools
    write the others. Raises DataError if they cannot be decoded."""
    encoding = json.detect_encoding(content)
    if encoding == "utf-8":
        return content
    try:
        return content.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is no text in {encoding} ({error.reason}): "
                        "is it whole?") from error


def json_memory(content):
    """-> the most bytes of memory that a JSON text can take while it is parsed and after, from a
    count of its signs: an empty list is 3 bytes of a file and 64 of memory."""
    wide = 1 if content.isascii() and b"\\u" not in content else 4  # of each character of a string
    text = 2 * wide * len(content)  # the text, and its strings
    return text + sum(cost * content.count(sign) for sign, cost in JSON_COSTS.items())


def parse_json(content, where, hook=None):
    """A JSON text's bytes -> its content; `hook` sees every object of it. Raises DataError if they
    are no JSON, nested too deeply, or could fill the memory."""
    memory = json_memory(content)
    if memory > MAX_JSON_MEMORY:
        raise DataError(f"{where} could take {memory / 2**30:.1f} GiB of memory: "
                        "is it the right file? Then split it")
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        del content  # before the parser takes as much again
        return json.loads(text, object_hook=hook)
    except DataError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{where} is not valid JSON ({one_line(error)[:100]}): "
                        "is it whole?") from error


def read_json(path, hook=None, limit=MAX_BYTES):
    """-> a JSON file's content. Raises DataError as read_bytes and parse_json do."""
    return parse_json(read_bytes(path, limit), path, hook)


def whole_number(value):
    """7, 7.0 or "7", as exporters write ids and sizes -> 7; anything else as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,19}", value):
        return int(value)
    return value


def need(record, key, kind, where):
    """record[key], which must be of the kind; an int is also read from 7.0 or "7". Raises DataError
    naming the record."""
    value = record.get(key) if isinstance(record, dict) else None
    if kind is int:
        value = whole_number(value)
    if not isinstance(value, kind) or (kind is int and not -2**63 <= value < 2**63):
        raise DataError(f"{where}: {key} is missing or no {kind.__name__}")
    return value


def path_inside(folders, name, where, outside=False):
    """The first of the folders' files of that name that exists, otherwise where it would be.

    Raises DataError if the name leaves a folder, even by a symbolic link, unless `outside` allows
    it. The folder itself may be a link.
    """
    candidates = []
    for folder in folders:
        try:
            path = (folder / name).resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a null byte, a loop of links
            raise DataError(f"{where}: path {name[:200]!r}: {one_line(error)}") from error
        if not outside and (Path(name).is_absolute() or not path.is_relative_to(folder.resolve())):
            raise DataError(f"{where}: path {name[:200]!r} leaves the folder {folder}: keep the "
                            "files in it, make the folder itself a link, or allow it by --outside")
        candidates.append(path)
    return next((p for p in candidates if os.path.isfile(p)), candidates[0])
