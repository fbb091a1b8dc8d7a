"""Python batches: pickles, read as plain values and arrays of bytes without being unpickled.

To unpickle a file can run anything. What follows reads the few instructions that published data sets need (CPython's
Lib/pickletools.py documents them), makes plain values and arrays of bytes, and knows no way to do anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_STRINGS = {  # instruction: bytes of its length, and whether it is text
    b"U": (1, False), b"T": (4, False), b"C": (1, False), b"B": (4, False), b"\x8e": (8, False), b"\x96": (8, False),
    b"\x8c": (1, True), b"X": (4, True), b"\x8d": (8, True),
}  # fmt: skip
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_UNSIGNED = {b"K": 1, b"M": 2}
_PUT, _GET = {b"q": 1, b"r": 4}, {b"h": 1, b"j": 4}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_IGNORED = {b"\x80": 1, b"\x95": 8}  # the protocol's number, and the length of what follows
_MOST_INSTRUCTIONS = 1_000_000  # CIFAR-100 takes 0.3 million; each may make an object of 64 bytes

_RECONSTRUCT, _DTYPE, _ENCODE, _FROMBUFFER = "multiarray._reconstruct", "numpy.dtype", "_codecs.encode", "_frombuffer"
_ADMITTED = {
    "numpy.ndarray": "numpy.ndarray",
    "numpy.dtype": _DTYPE,
    "_codecs.encode": _ENCODE,  # how Python 3 writes the bytes of a Python 2 string
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.core.numeric._frombuffer": _FROMBUFFER,
    "numpy._core.numeric._frombuffer": _FROMBUFFER,
}


@dataclass(eq=False)
class _Name:
    """A name that the file asks for. It stands for what minivit does instead; nothing is looked up."""

    name: str


@dataclass(eq=False)
class _Array:
    """An array of bytes: its dtype, shape, order and content, once the file has told them."""

    state: tuple[Any, ...] = ()

    def values(self) -> np.ndarray:
        """Return the array, once what was told makes sense."""
        dtype, shape, order, raw = self.state
        if expect(dtype, _Name).name != "uint8":
            raise ValueError("an array that is not of bytes")
        raw = raw.encode("latin-1") if type(raw) is str else expect(raw, bytes)
        return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(shape, order=order))


def read_plain_pickle(data: bytes) -> dict[str, Any]:
    """Return the dictionary that a pickle holds, without unpickling; an array of bytes in it is for :func:`array_of`.

    Reads dicts, lists, tuples, text, bytes, whole numbers, truth values, None and uint8 arrays, of the protocols 2 to
    5. Time and memory grow with the file's size only. Raises ValueError (or what plain Python does with nonsense:
    KeyError, IndexError, …) for all else.
    """
    reader = _Reader(data)
    for _ in range(_MOST_INSTRUCTIONS):
        code = reader.take(1)
        if code == b".":
            return expect(reader.stack.pop(), dict)
        reader.follow(code)
    raise ValueError(f"more than {_MOST_INSTRUCTIONS:,} instructions")


class _Reader:
    """A pickle's bytes and how far they are read; the stack that its instructions work on, its marks and its memo."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes."""
        if size > len(self.data) - self.at:
            raise ValueError("it is cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        return self.take(self.data.index(b"\n", self.at) + 1 - self.at)[:-1].decode()

    def since_mark(self) -> list[Any]:
        """Take the values from the stack that have come since the last mark."""
        values = self.stack[(start := self.marks.pop()) :]
        del self.stack[start:]
        return values

    def follow(self, code: bytes) -> None:
        """Follow an instruction."""
        stack = self.stack
        if code in _UNSIGNED:
            stack.append(self.number(_UNSIGNED[code]))
        elif code in _STRINGS:
            width, is_text = _STRINGS[code]
            string = self.take(self.number(width))
            stack.append(string.decode() if is_text else string)
        elif code in _PUT:
            self.memo[self.number(_PUT[code])] = stack[-1]
        elif code == b"\x94":
            self.memo[len(self.memo)] = stack[-1]
        elif code in _GET:
            stack.append(self.memo[self.number(_GET[code])])
        elif code == b"(":
            self.marks.append(len(stack))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == b"J":
            stack.append(int.from_bytes(self.take(4), "little", signed=True))
        elif code == b"\x8a":
            stack.append(int.from_bytes(self.take(self.number(1)), "little", signed=True))
        elif code in b"]})":
            stack.append({b"]": list, b"}": dict, b")": tuple}[code]())
        elif code in _TUPLES:
            values = stack[-_TUPLES[code] :]
            del stack[-_TUPLES[code] :]
            stack.append(tuple(values))
        elif code == b"t":
            stack.append(tuple(self.since_mark()))
        elif code in b"ae":
            values = self.since_mark() if code == b"e" else [stack.pop()]
            expect(stack[-1], list).extend(values)
        elif code in b"su":
            values = self.since_mark() if code == b"u" else [stack.pop(-2), stack.pop()]
            expect(stack[-1], dict).update(zip(map(short_text, values[::2]), values[1::2], strict=True))
        elif code in b"c\x93":
            name = (
                f"{self.line()}.{self.line()}"
                if code == b"c"
                else ".".join(map(short_text, (stack.pop(-2), stack.pop())))
            )
            if name not in _ADMITTED:
                raise ValueError(f"it asks for {name[:80]!r}, which no data set needs: it was not run")
            stack.append(_Name(_ADMITTED[name]))
        elif code == b"R":
            function, arguments = expect(stack.pop(-2), _Name), stack.pop()
            stack.append(_made(function.name, expect(arguments, tuple)))
        elif code == b"b":
            _set_state(stack[-2], stack.pop())
        elif code in _IGNORED:
            self.take(_IGNORED[code])
        else:
            raise ValueError(f"unknown instruction {code!r}")


def array_of(value: Any) -> np.ndarray:
    """Return an array that :func:`read_plain_pickle` has found, uint8, once what was told of it makes sense."""
    return expect(value, _Array).values()


def expect(value: Any, kind: type) -> Any:
    """Return ``value``, which must be of this very type. Raises ValueError if it is not."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def short_text(value: Any) -> str:
    """Return a short text; Python 2 wrote it as bytes."""
    if type(value) not in (str, bytes) or len(value) > 1000:
        raise ValueError(f"a {type(value).__name__} where a short text belongs")
    return value.decode("latin-1") if type(value) is bytes else value


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return what calling ``name`` would return, for the calls that make an array of bytes."""
    if name == _ENCODE and arguments[1:] == ("latin1",):
        return expect(arguments[0], str)  # encoded once it is used: a short file could ask for it without end
    if name == _DTYPE and short_text(arguments[0]) == "u1":
        return _Name("uint8")
    if name == _RECONSTRUCT:
        return _Array()
    if name == _FROMBUFFER:
        raw, dtype, shape, order = arguments
        return _Array((dtype, shape, order, raw))
    raise ValueError(f"it calls {name} in a way that no data set needs: it was not run")


def _set_state(target: Any, state: Any) -> None:
    if type(target) is _Name and target.name == "uint8":
        return  # byte order and the like, which bytes do not have
    _, shape, dtype, fortran, raw = expect(state, tuple)
    expect(target, _Array).state = dtype, shape, "F" if fortran else "C", raw
