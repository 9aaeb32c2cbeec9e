"""What runs in the two processes of the sandbox: one holds the program, the other one holds the tests and judges.

``evaluation.sandbox`` gives this file's source to `python -c`, so it needs nothing but the standard library. The tests
ask the program over a pair of pipes, by value: a function of the program is a :class:`Remote` on the tests' side, its
arguments and results are plain values that the tests' process builds anew. So nothing of the program's process takes
part in a comparison, and the verdict is never within its reach: a program that leaves early, patches what is built in,
or returns objects that equal everything has not passed.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import importlib
import json
import operator
import os
import resource
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, BinaryIO

ERRORS_KEPT = 2000
"""Characters of a traceback."""
_MESSAGE_BYTES = 2**24
_NOBODY = 65534
_SMALL = 2**53

# Linux: sys/mount.h, linux/mount.h, linux/prctl.h, linux/capability.h; the call's number is that of all machines.
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC = 2, 4, 4096, 16384
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CAPABILITY_VERSION_3 = 0x20080522


# --- the process ------------------------------------------------------------------------------------------------------


def confine(shown: list[str], folder: str) -> None:
    """Give up, for good, all files but a few and all rights; in namespaces of its own.

    The new root has the paths of ``shown`` and nothing else, read only, and in it a small `/tmp`, a tmpfs with the
    mount options ``folder``, which vanishes with the process.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
        texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
        check(libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))

    new = "/proc"  # a folder that every Linux has; the new root needs no processes to look at
    mount("tmpfs", new, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    for path in shown:
        target = new + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        elif os.path.exists(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        else:
            continue
        mount(path, target, None, _MS_BIND | _MS_REC, None)
    os.makedirs(f"{new}/tmp", exist_ok=True)
    os.chroot(new)
    os.chdir("/")
    read_only = struct.pack("=4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    check(libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, read_only, len(read_only)))
    mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, folder)
    os.chdir("/tmp")
    with suppress(OSError):  # root becomes nobody where it can; a user namespace's root keeps its number
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    check(libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), struct.pack("=6I", *[0] * 6)))  # no capabilities
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))  # the program cannot attach to the process that ends it


def limit(limits: dict[str, int]) -> None:
    """Set limits, by their names in the module ``resource``, or keep those that are lower."""
    for name, value in limits.items():
        number = getattr(resource, name)
        most = resource.getrlimit(number)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(number, (value, value))


def in_child(work: Callable[[], None]) -> None:
    """Do the work in a child, and leave when it has ended.

    With process numbers of its own this process is the first of them, whose end is the end of all others; the program
    cannot make it live on, as it could its own process.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os._exit(0)


# --- values over pipes ------------------------------------------------------------------------------------------------


def _asking(operation: str) -> Callable[..., Any]:
    def ask(self: Remote, /, *arguments: Any, **named: Any) -> Any:
        # Not self._peer: a copy has none before it is filled in, and __getattr__ would call itself without end.
        peer: Peer = object.__getattribute__(self, "_peer")
        return peer.ask(operation, self, *arguments, **named)

    return ask


class Remote:
    """An object of the other process; it equals nothing but itself."""

    _peer: Peer
    _number: int

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    __call__, __iter__, __next__ = map(_asking, ("call", "iter", "next"))
    __getattr__, __setattr__, __getitem__ = map(_asking, ("getattr", "setattr", "getitem"))
    __len__, __bool__, __int__, __float__, __str__ = map(_asking, ("len", "bool", "int", "float", "str"))
    __repr__ = __str__


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, /, *arguments, **named: function(*arguments, **named),
    "iter": iter,
    "next": next,
}
"""The operations that either side may ask for on the other's objects; on those of the tests only these, of functions
and iterators that they passed."""
_OF_THE_PROGRAM = _OPERATIONS | {
    "getattr": getattr, "setattr": setattr, "getitem": operator.getitem, "len": len, "bool": bool, "int": int,
    "float": float, "str": str,
}  # fmt: skip
_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "int": (int, hex, lambda text: int(text, 16)),
    "list": (list, list, list),
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "dict": (dict, lambda value: [list(item) for item in value.items()], dict),
    "bytes": (bytes, lambda value: value.decode("latin-1"), lambda text: text.encode("latin-1")),
    "bytearray": (bytearray, lambda value: value.decode("latin-1"), lambda text: bytearray(text, "latin-1")),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
}
"""The values that are built anew: their types, and how they become a text or a list of parts, and come back."""
_REBUILT = {
    *(("datetime", name) for name in ("date", "time", "datetime", "timedelta")),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
}
"""Immutable values of the standard library, by module and name."""


class ProgramError(Exception):
    """The program raised an exception of its own."""


class ProgramLeft(BaseException):
    """The program has ended, or asked to: no `except Exception` of a test takes this for an answer."""


class Peer:
    """One end of the pipes: asks for operations on the other's objects, and meanwhile answers what the other asks.

    Messages are JSON after their length of 4 bytes. Where it is guarded, the other process may ask for its operations
    only on objects that it was given, and on no class: with one it could make an object that equals everything.
    """

    def __init__(
        self, incoming: BinaryIO, outgoing: BinaryIO, operations: dict[str, Callable[..., Any]], guarded: bool = False
    ) -> None:
        self._incoming, self._outgoing, self._operations, self._guarded = incoming, outgoing, operations, guarded
        self._mine: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._theirs: dict[int, Remote] = {}

    def ask(self, operation: str, /, *arguments: Any, **named: Any) -> Any:
        """The result of an operation in the other process.

        Raises:
            ProgramLeft: The other process has ended, or the operation raised SystemExit or its like.
            Exception: What the operation raised, where that is a built-in exception; else :class:`ProgramError`.
        """
        self._send([operation, self._encoded(arguments), self._encoded(named)])
        while True:
            kind, *content = self._receive()
            if kind == "result":
                return self._decoded(content[0])
            if kind == "error":
                error = _exception(*content)
                if isinstance(error, StopIteration) and operation != "next":  # it would end a loop of the tests
                    error = ProgramError("StopIteration")
                raise error
            self._answer(kind, *content)

    def serve(self) -> None:
        """Answer until the other process ends."""
        with suppress(ProgramLeft):
            while True:
                self._answer(*self._receive())

    def _answer(self, operation: str, arguments: Any, named: Any) -> None:
        try:
            function = self._operations[operation]
            if self._guarded and "yours" not in arguments["tuple"][0]:
                raise TypeError(f"{operation}: not of this object")
            answer = ["result", self._encoded(function(*self._decoded(arguments), **self._decoded(named)))]
        except BaseException as error:  # sys.exit, too, is no answer
            answer = ["error", type(error).__name__, _text(error)]
        self._send(answer)

    def _send(self, message: Any) -> None:
        content = json.dumps(message).encode()
        if len(content) > _MESSAGE_BYTES:
            content = json.dumps(["error", "MemoryError", "the result is too large"]).encode()
        try:
            self._outgoing.write(struct.pack(">I", len(content)) + content)
            self._outgoing.flush()
        except BrokenPipeError:
            raise ProgramLeft("the program left before it was asked") from None

    def _receive(self) -> Any:
        head = self._incoming.read(4)
        if len(head) < 4:
            raise ProgramLeft("the program left before it had answered")
        [size] = struct.unpack(">I", head)
        if size > _MESSAGE_BYTES:
            raise ProgramLeft("the program answered with too much")
        return json.loads(self._incoming.read(size))

    def _encoded(self, value: Any) -> Any:
        """As JSON: small plain values as they are, all others as an object of one key that names the kind."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int) and -_SMALL < value < _SMALL:
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, Remote):
            return {"yours": value._number}
        for kind, (of_kind, parts_of, _) in _KINDS.items():
            if isinstance(value, of_kind):
                parts = parts_of(value)
                return {kind: [self._encoded(part) for part in parts] if isinstance(parts, list) else parts}
        module, name = type(value).__module__, type(value).__qualname__
        called = value.__name__ if isinstance(value, type) else ""
        if called and getattr(builtins, called, None) is value:
            return {"class": called}
        if (module, name) in _REBUILT:
            return {"new": [module, name, self._encoded(value.__reduce__()[1])]}
        to_list = getattr(value, "tolist", None)  # numpy's arrays and scalars, without importing it
        if module.partition(".")[0] == "numpy" and to_list is not None:
            return self._encoded(to_list())
        number = self._numbers.setdefault(id(value), len(self._mine))
        if number == len(self._mine):
            self._mine.append(value)  # from now on nothing else has its id
        return {"mine": number}

    def _decoded(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        [(kind, content)] = value.items()
        if kind in _KINDS:
            return _KINDS[kind][2]([self._decoded(part) for part in content] if isinstance(content, list) else content)
        if kind == "class":
            found = getattr(builtins, content)
            assert isinstance(found, type)
            return found
        if kind == "new":
            module, name, arguments = content
            assert (module, name) in _REBUILT
            return getattr(importlib.import_module(module), name)(*self._decoded(arguments))
        if kind == "yours":
            return self._mine[content]
        assert kind == "mine"
        return self._theirs.setdefault(content, Remote(self, content))


def _text(error: BaseException) -> str:
    try:
        return str(error)[:ERRORS_KEPT]
    except BaseException:
        return ""


def _exception(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):  # a few need more than a text
            return kind(text)
    left = isinstance(kind, type) and issubclass(kind, BaseException) and not issubclass(kind, Exception)
    return (ProgramLeft if left else ProgramError)(f"{name}: {text}")


# --- the two sides ----------------------------------------------------------------------------------------------------


def run_the_program() -> None:
    """Answer for the program over stdin and stdout, which it does not get itself."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _silence(0, 1, 2)
    scope: dict[str, Any] = {"__name__": "__main__"}

    def load(program: str) -> dict[str, str]:
        """Runs it; the names that it defines, with the modules' names of those that are modules."""
        exec(compile(program, "program", "exec"), scope)
        return {
            name: value.__name__ if isinstance(value, ModuleType) else ""
            for name, value in scope.items()
            if isinstance(name, str) and not name.startswith("__")
        }

    Peer(incoming, outgoing, _OF_THE_PROGRAM | {"load": load, "name": scope.__getitem__}).serve()


def run_the_tests(incoming: int, outgoing: int) -> None:
    """Judge the program at the other end of two descriptors; the verdict goes to stdout, with a traceback's end."""
    order, said = json.load(sys.stdin), os.dup(1)
    _silence(0, 1, 2)
    program = Peer(os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb"), _OPERATIONS, guarded=True)
    try:
        tests = ast.parse(order["tests"])
        offered = program.ask("load", order["program"])
        scope = {"__name__": "__main__"} | names_for(tests, offered, lambda name: program.ask("name", name))
        exec(compile(tests, "tests", "exec"), scope)
        verdict = {"passed": True, "errors": ""}
    except BaseException:
        verdict = {"passed": False, "errors": traceback.format_exc()[-ERRORS_KEPT:]}
    os.write(said, json.dumps(verdict).encode())


def names_for(tests: ast.Module, offered: dict[str, str], get: Callable[[str], Any]) -> dict[str, Any]:
    """What the tests use of what the program offers: names, with the module names of those that are modules.

    Functions that are built in stay the tests' own, unless the tests ask the program for nothing else: MBPP has a task
    whose function is called `sum`; but no program decides what `abs` or `all` returns for its results. Modules are
    imported anew, and a name of the standard library gives its own module. ``get`` asks the program for a value.
    """
    names = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)} & offered.keys()
    bases = {
        node.value.id
        for node in ast.walk(tests)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    standard = {name for name in names & sys.stdlib_module_names if offered[name] or name in bases}
    modules = {name: name if name in standard else offered[name] for name in names if name in standard or offered[name]}
    names -= modules.keys()
    built_in = {name for name in names if hasattr(builtins, name)}
    if names - built_in:
        names -= built_in
    return {name: importlib.import_module(module) for name, module in modules.items()} | {n: get(n) for n in names}


def _silence(*descriptors: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def main() -> None:
    order = json.loads(sys.argv[1])
    if order["shown"] is not None:
        confine(order["shown"], order["folder"])

    def work() -> None:
        limit(order["limits"])
        if order["role"] == "program":
            run_the_program()
        elif order["role"] == "tests":
            run_the_tests(*order["pipes"])

    in_child(work)


if __name__ == "__main__":
    main()
