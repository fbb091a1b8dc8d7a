"""Runs commands under an audit hook (PEP 578) that is there before minivit or NumPy is imported, and stays.

``python tests/audited.py REPORT COMMANDS``, the commands a JSON list of lists of words, writes what each of them did
that it may not do to REPORT.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from types import FrameType

FORBIDDEN = (
    *("socket.", "ssl.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser."),
    *("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty."),
    *("pickle.", "marshal.load", "exec", "compile", "code.__new__"),
)
"""Events, by how their names begin (docs.python.org/3/library/audit_events.html)."""


def is_offence(event: str, frame: FrameType | None) -> bool:
    """Tell whether a forbidden event, raised in ``frame``, is one that no command may cause.

    ``exec`` is code that starts to run, by exec(), eval() or an import; ``compile`` is a string made into code; these,
    ``marshal.loads`` (modules compiled before) and ``code.__new__`` are what an import is made of, with what a module's
    own statements do meanwhile (a dataclass makes its methods so): below an import, and only there, they are allowed.
    ``ast.literal_eval``, with which NumPy reads an array's header, compiles to a syntax tree and runs nothing.
    """
    callers = []  # file, function: from the innermost out
    while frame is not None:
        callers.append((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
        frame = frame.f_back
    if event in ("exec", "compile", "marshal.loads", "code.__new__"):
        literal = event == "compile" and callers[:2] == [("ast.py", "parse"), ("ast.py", "literal_eval")]
        return not literal and ("<frozen importlib._bootstrap>", "_find_and_load") not in callers
    return True


def main(report: str, commands: list[list[str]]) -> int:
    """Run the commands, until one fails; return its exit code."""
    offences: list[str] = []
    events = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal events
        events += 1
        if event.startswith(FORBIDDEN) and is_offence(event, sys._getframe(1)):
            offences.append(f"{event}{arguments!r:.200}\n" + "".join(traceback.format_stack(sys._getframe(1))[-16:]))

    sys.addaudithook(hook)
    from minivit.cli.main import main as minivit

    found = []  # what is written to the report is no command's
    for command in commands:
        if code := minivit(command):
            return code
        found.append((offences[:], events))
        offences.clear()
        events = 0
    with open(report, "w", encoding="utf-8") as f:
        json.dump(found, f)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], json.loads(sys.argv[2])))
