"""Refs files of REFER, pickles of plain data: nothing in one is run.

You need not read this to understand the method. A pickle is a program for a small machine; the one
here knows only the instructions that make plain data.
"""

import io
import pickle
import pickletools

from support.files import DataError, need, one_line, read_bytes

MAX_REFS_BYTES = 64 * 2**20  # the published files take 30-50 MB,
MAX_REFS_STEPS = 10_000_000  # 6.5 million steps of an unpickler,
MAX_SENTENCES = 1_000_000  # and 50,000 refs with 142,000 sentences

PLAIN = """
    PROTO FRAME STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING
    BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE LIST EMPTY_LIST APPEND
    APPENDS EMPTY_DICT
"""


class PlainDispatch(dict):
    """Opcode -> method. An opcode that is not listed is refused before anything of it is done."""

    def __missing__(self, code):
        names = {ord(op.code): op.name for op in pickletools.opcodes}
        raise DataError(f"asks for more than plain data ({names.get(code, f'byte {code}')})")


class PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler with those opcodes alone that make dicts, lists, strings, numbers,
    None and bools, in a limited number of steps. It is the one written in Python, because there the
    opcodes can be chosen; 50,000 refs take 2 s."""

    dispatch = PlainDispatch({ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]
                              for op in pickletools.opcodes if op.name in PLAIN.split()})

    def load(self):
        """pickle's own loop, with an end."""
        unframer = pickle._Unframer(self._file_read, self._file_readline)
        self.read, self.readinto = unframer.read, unframer.readinto
        self.readline = unframer.readline
        self._unframer, self.metastack, self.stack = unframer, [], []
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            for _ in range(MAX_REFS_STEPS):
                dispatch[read(1)[0]](self)
        except pickle._Stop as stop:
            return stop.value
        raise DataError(f"takes more than {MAX_REFS_STEPS} steps")

    def fill(self, record, items):
        """record[key] = value, for keys and values in turn; every key is text, as in a record."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise DataError("has a key that is no text")
            record[key] = value

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self.fill(self.stack[-1], items)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [key, value])

    def load_setitems(self):
        items = self.pop_mark()
        self.fill(self.stack[-1], items)

    dispatch |= {pickle.DICT[0]: load_dict, pickle.SETITEM[0]: load_setitem,
                 pickle.SETITEMS[0]: load_setitems}


def load_refs(path):
    """-> the list in a refs(*).p file, written by Python 2 (byte strings are read as Latin-1) or 3.

    Raises DataError if the file is missing, too long, broken, no list of refs, or asks for anything
    but plain data.
    """
    content = read_bytes(path, MAX_REFS_BYTES)
    try:
        refs = PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path} {error} and was not run: "
                        "get the file from another source") from error
    except Exception as error:  # the unpickler raises nearly anything on a broken file
        raise DataError(f"{path} is broken ({type(error).__name__}: {one_line(error)[:100]}): "
                        "is it whole?") from error
    if not isinstance(refs, list):
        raise DataError(f"{path} holds no list of refs")
    if len(refs) > MAX_SENTENCES:
        raise DataError(f"{path} holds more than {MAX_SENTENCES} refs")
    sentences = characters = 0
    for n, ref in enumerate(refs):
        where = f"{path}: ref number {n}"
        ids = {key: need(ref, key, int, where) for key in ("ref_id", "ann_id", "image_id")}
        ref.update(ids)
        need(ref, "split", str, where)
        sentences += len(need(ref, "sentences", list, where))
        if sentences > MAX_SENTENCES or characters > MAX_REFS_BYTES:  # refs may share a list
            raise DataError(f"{path} holds more than {MAX_SENTENCES} sentences, or one very often")
        for sentence in ref["sentences"]:
            sent_id = need(sentence, "sent_id", int, where)
            sentence["sent_id"] = sent_id
            text = sentence.get("sent") or sentence.get("raw")
            characters += len(text) if isinstance(text, str) else 0
    return refs
