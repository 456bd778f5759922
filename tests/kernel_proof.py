"""What both kernel tests use: Triton's interpreter made exact for bfloat16, made to count, and a
source of mutants."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import ast
import contextlib
import importlib.util
import io
import itertools
import re
import sys
import tokenize
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder

import kernels.backend

ROOT = Path(__file__).parent.parent
Builder = type(interpreter_builder)


def force(backend):
    """Runs "triton" or "torch" on every tensor inside a with-block."""
    return mock.patch.object(kernels.backend, "BACKEND", backend)


def run(function, inputs, dy=None):
    """Output and the gradient of every input that requires one. dy is drawn like the output unless
    it is given."""
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)]


# ---- bfloat16 ----------------------------------------------------------------------------------

@contextlib.contextmanager
def exact_bf16():
    """The interpreter holds bfloat16 as uint16: tl.dot multiplies the bit patterns, and float32 is
    cut, not rounded.

    Inside, operands of a dot are decoded first, and casts round to nearest even, as every GPU does.
    Yields the set of dtypes that dots multiply.
    """
    cast, dot, multiplied = Builder.cast_impl, Builder.create_dot, set()

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *options):
        multiplied.update((a.dtype.scalar, b.dtype.scalar))
        a, b = (
            cast_impl(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)
        )
        return dot(self, a, b, d, *options)

    with (
        mock.patch.object(Builder, "cast_impl", cast_impl),
        mock.patch.object(Builder, "create_dot", create_dot),
    ):
        yield multiplied


# ---- memory traffic ----------------------------------------------------------------------------

class Launch:
    """One launch of a kernel: its arguments by name, and for each tensor how often each element was
    loaded, stored."""

    def __init__(self, executor, args, constants):
        self.kernel = executor.fn.__name__
        self.arguments = dict(zip(executor.arg_names, args)) | constants
        self.tensors = {k: v for k, v in self.arguments.items() if isinstance(v, torch.Tensor)}
        self.loads, self.stores = (
            {k: np.zeros(v.numel(), int) for k, v in self.tensors.items()} for _ in range(2)
        )

    def count(self, counts, pointers, mask):
        """Every pointer that the mask lets through must lie in one of the launch's tensors."""
        pointers = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        for name, t in self.tensors.items():
            place = (pointers - t.data_ptr()) // t.element_size()
            inside = (place >= 0) & (place < t.numel())
            counts[name] += np.bincount(place[inside], minlength=t.numel())
            pointers = pointers[~inside]
        assert not pointers.size, f"{self.kernel}: {pointers.size} pointers outside every tensor"


@contextlib.contextmanager
def traffic():
    """Yields the list of Launches inside. Raises at a pointer outside all tensors, before memory is
    touched.

    What a mask leaves out and no `other` defines is 99 or NaN by turns, instead of the
    interpreter's kind 0.
    """
    launches = []
    call, load, store = (
        GridExecutor.__call__,
        Builder.create_masked_load,
        Builder.create_masked_store,
    )

    def counted_call(self, *args, **constants):
        launches.append(Launch(self, args, constants))
        return call(self, *args, **constants)

    def counted_load(self, pointers, mask, other, *rest):
        launches[-1].count(launches[-1].loads, pointers.data, mask.data)
        loaded = load(self, pointers, mask, other, *rest)
        if other is None:
            garbage = np.full(loaded.data.shape, 99, loaded.data.dtype)
            if garbage.dtype.kind == "f":
                garbage.flat[::2] = np.nan
            loaded.data = np.where(mask.data, loaded.data, garbage)
        return loaded

    def counted_store(self, pointers, value, mask, *rest):
        launches[-1].count(launches[-1].stores, pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    def atomic(*_):
        raise AssertionError(
            "an atomic operation: the order of the sum, and so the result, would be left to chance"
        )

    with (mock.patch.object(GridExecutor, "__call__", counted_call),
          mock.patch.object(Builder, "create_masked_load", counted_load),
          mock.patch.object(Builder, "create_masked_store", counted_store),
          mock.patch.multiple(Builder, create_atomic_rmw=atomic, create_atomic_cas=atomic)):
        yield launches


def assert_traffic(launch, **expected):
    """expected: name = (loads, stores) of each element, numbers or arrays; tensors not named are
    not touched."""
    for name, tensor in launch.tensors.items():
        for what, counts, n in zip(
            ("loaded", "stored"), (launch.loads, launch.stores), expected.get(name, (0, 0))
        ):
            wrong = counts[name] != n
            assert not wrong.any(), (
                f"{launch.kernel}: {wrong.sum()} of {tensor.numel()} elements of {name} {what} "
                f"{counts[name][wrong][0]} times, planned {n}"
            )


def last_offsets(kernel, tensors, program, *sizes, **constants):
    """{name: greatest element offset accessed} by one program of a launch too large for any memory
    here.

    tensors: {argument: Triton dtype}. They are only addresses: loads give zeros, stores go nowhere.
    This is how an offset that overflows 32 bits shows without a tensor of 2^31 elements.
    """
    offsets, pointers = {}, []
    for i, dtype in enumerate(map(tl.pointer_type, tensors.values())):
        pointers.append(tl.tensor(TensorHandle(np.array([(i + 1) << 48], np.uint64), dtype), dtype))

    def note(pointers, mask):
        p = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        bytes_each = pointers.get_element_ty().primitive_bitwidth // 8
        for which in np.unique(p >> 48):
            name = list(tensors)[which - 1] if 0 < which <= len(tensors) else "outside"
            offset = int((p[p >> 48 == which] & ((1 << 48) - 1)).max()) // bytes_each
            offsets[name] = max(offset, offsets.get(name, 0))

    def load(self, pointers, mask, *_):
        note(pointers, mask)
        return self.create_fp_to_si(
            TensorHandle(np.zeros(pointers.data.shape), tl.float64), pointers.get_element_ty()
        )

    def store(self, pointers, value, mask, *_):
        note(pointers, mask)

    def program_id(self, axis):
        return TensorHandle(np.array([program[axis]], np.int32), tl.int32)

    with mock.patch.multiple(Builder, create_masked_load=load, create_masked_store=store,
                             create_get_program_id=program_id):
        kernel[(1,)](*pointers, *sizes, **constants)
    return offsets


# ---- mutants -----------------------------------------------------------------------------------
# All of them, with the count of those caught, broken and alive: pytest -m slow -k any_change -s

SWAPS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "+", "%": "+", "&": "|", "+=": "-=",
    "<": "<=", ">": ">=", ">=": "<", "0": "1", "1": "2", "2": "3", "3": "2", "4": "5",
    "0.0": "1.0", "1000.0": "1.0", "1e-37": "1e-3", "maximum": "minimum", "minimum": "maximum",
    "exp": "abs", "log": "abs", "int64": "int32", "axis": "1 - axis", "N": "D", "D": "H", "H": "D",
    "BLOCK_M": "BLOCK_N", "BLOCK_N": "BLOCK_M", "ACC": "tl.float32", "DOT": "ACC",
    "n": "BLOCK", "first": "0", "n_rows": "n_cols", "n_cols": "n_rows", "rows": "cols",
    "cols": "rows", "scale": "(scale * 0 + 1)", "sample": "0", "chunk": "0", "CHUNK": "BLOCK",
    "alpha": "gamma", "gamma": "alpha", "p": "q", "q": "p", "p_off": "q_on", "q_on": "p_off",
    "larger": "smaller", "smaller": "larger", "u": "p", "t": "x", "on": "off", "off": "on",
    "dpt": "dp", "dp": "dpt", "dfocal": "dp",
    **{mask: f"({mask} | True)" for mask in ("row_ok", "col_ok", "k_ok", "ok")}}
# A // b instead forgets the last tile.
ROUNDED_DOWN = re.compile(r"t(?:l|riton)\.cdiv\(([\w.\[\]]+), (\w+)\)")


def mutants(name):
    """Yields (label, source) for each change of one operator, number, size, mask or name in
    kernels/NAME.py.

    Changed are the bodies of the Triton kernels and of their launchers, `forward`, `backward` and
    `_grid`.
    """
    source = (ROOT / "kernels" / f"{name}.py").read_text()
    lines, functions = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        jitted = any(
            ast.unparse(d).startswith("triton.jit") for d in getattr(node, "decorator_list", [])
        )
        if jitted or getattr(node, "name", None) in ("forward", "backward", "_grid"):
            first = node.body[isinstance(node.body[0], ast.Expr)]  # after the docstring
            functions |= dict.fromkeys(range(first.lineno, node.end_lineno + 1), node.name)

    def changed(row, start, end, text):
        old = lines[row - 1]
        new = old[:start] + text + old[end:]
        return f"{functions[row]}: {old.strip()} -> {new.strip()}", "".join(
            [*lines[: row - 1], new, *lines[row:]]
        )

    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, start), (_, end) = token.start, token.end
        if row not in functions or token.string not in SWAPS:
            continue
        line = lines[row - 1]
        assigned = start < line.find(" = ")
        keyword = token.type == tokenize.NAME and line[end:end + 1] == "="
        attribute = line[start - 1 : start] == "." and token.string not in (
            "exp",
            "log",
            "maximum",
            "minimum",
            "int64",
        )
        if not (assigned or keyword or attribute):
            yield changed(row, start, end, SWAPS[token.string])
    for row in functions:
        for call in ROUNDED_DOWN.finditer(lines[row - 1]):
            yield changed(row, *call.span(), f"({call[1]} // {call[2]})")


@contextlib.contextmanager
def imported(name, source, directory):
    """The module that `source` makes, with torch.library names of its own."""
    title = f"mutant_{next(_number)}"
    path = Path(directory) / f"{title}.py"
    path.write_text(source.replace("risclip::", f"{title}::"))
    spec = importlib.util.spec_from_file_location(title, path)
    sys.modules[title] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        yield module
    finally:
        del sys.modules[title]


_number = itertools.count()


def survivors(name, prove, directory, every=1):
    """Runs prove(module) on every n-th mutant. Returns {how it ended: [labels]}: caught, broken
    (crashed), alive."""
    ended = {"caught": [], "broken": [], "alive": []}
    for label, source in itertools.islice(mutants(name), 0, None, every):
        with imported(name, source, directory) as module:
            try:
                prove(module)
                ended["alive"].append(label)
            except AssertionError:
                ended["caught"].append(label)
            except Exception as error:  # the interpreter wraps what is raised inside a kernel
                ended["caught" if "AssertionError" in str(error) else "broken"].append(label)
    return ended


def assert_all_caught(ended, at_least, equivalent=()):
    """Fails if a mutant is alive whose change is not one of `equivalent`, or if too few were there
    to be caught.

    Broken ones crash, which is as good as caught, but a proof in which most crash would say nothing
    about the checks.
    """
    counts = {how: len(labels) for how, labels in ended.items()}
    print(
        counts,
        *(f"{how}: {label}" for how in ("broken", "alive") for label in ended[how]),
        sep="\n",
    )
    assert sum(counts.values()) >= at_least and counts["caught"] >= 0.8 * sum(counts.values()), (
        counts
    )
    alive = [label for label in ended["alive"] if not any(change in label for change in equivalent)]
    assert not alive, f"{len(alive)} changes that no check sees:\n" + "\n".join(alive)
