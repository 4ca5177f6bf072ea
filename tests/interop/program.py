"""A program that a test calls: JSON lines to its standard input, JSON lines back.

``{"id": 1, "call": NAME, "arguments": […]}`` is answered, once it is done, by ``{"id": 1, "result":
…}`` or ``{"id": 1, "error": TEXT}``. At the start it says that it is ready, as the result of 0.
"""

import json
import os
import selectors
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

TIMEOUT: Final = 60  # seconds; only a failing test waits for so long


class ProgramError(Exception):
    """A call failed, or was not answered in time."""


class Program:
    """A program that runs as long as this is entered."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, variables: Mapping[str, str]
    ) -> None:
        """Take its *name*, for messages, and an empty *folder*, which is its home."""
        self.name = name
        self._command = command
        self._errors = folder / "errors"
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **variables}
        self._last_id = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._partial = b""

    def __enter__(self) -> Self:
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        try:
            self.result(0)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def call(self, name: str, *arguments: object) -> Any:
        """Call a function and wait for what it returns. Raises ProgramError."""
        return self.result(self.begin(name, *arguments))

    def begin(self, name: str, *arguments: object) -> int:
        """Call a function; :meth:`result` waits for it."""
        self._last_id += 1
        line = json.dumps({"id": self._last_id, "call": name, "arguments": arguments}) + "\n"
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        return self._last_id

    def result(self, call: int) -> Any:
        """Wait for the end of a call. Raises ProgramError."""
        while call not in self._answers:
            answer = json.loads(self._line())
            self._answers[answer["id"]] = answer
        answer = self._answers.pop(call)
        if "error" in answer:
            raise ProgramError(f"{self.name}: {answer['error']}; {self._said()}")
        return answer["result"]

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._partial:
                if not selector.select(TIMEOUT):
                    raise ProgramError(f"{self.name} does not answer: {self._said()}")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise ProgramError(f"{self.name} has ended: {self._said()}")
                self._partial += part
        line, _, self._partial = self._partial.partition(b"\n")
        return line

    def _said(self) -> str:
        return self._errors.read_text(errors="replace")[-2000:]

    def _end(self) -> None:
        """End it by the end of its input."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def connect(caller: Program, callee: Program) -> None:
    """Exchange offer and answer, in which only relayed candidates may be; wait for the channel."""
    offer = caller.call("offer")
    answer = callee.call("answer", offer)
    caller.call("accept", answer)
    for sdp in (offer, answer):
        candidates = [line for line in sdp.splitlines() if line.startswith("a=candidate:")]
        assert candidates
        assert all(" typ relay" in candidate for candidate in candidates)
    caller.call("opened")
    callee.call("opened")
