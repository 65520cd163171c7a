"""Chat templates of other models, filled in by jinja2's sandbox in a process with limits.

    text, error = render(template, [{"messages": [{"role": "user", "content": "Hi"}]}])[0]

A template comes from a stranger. The sandbox lets it reach nothing but the values that it is given. It could
still loop forever or fill the memory, inside one C function too, and only the operating system can stop that.
So a second Python process renders, with limits on its time and memory. It serves all requests of this process
over pipes, one line of JSON each, and ends when its input closes:

    parent -> ["template", [{"messages": [..], "add_generation_prompt": true, ..}, ..]]
    child  -> [["text", null], [null, "error"], ..]

A request costs about 0.1 ms, the first one 0.2 s. The settings of the sandbox, its filter `tojson` and its
functions `raise_exception` and `strftime_now` are those that transformers offers to templates. Left out:
images and other media.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from configurator import UserError

SECONDS = 2.0  # of CPU time per request; the templates of known models take about a millisecond
MEMORY = 2**30  # bytes that the child may use
LONGEST = 2**24  # characters of a rendered text
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")  # marks what the assistant writes


# ---- The child --------------------------------------------------------------------------------------------

def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """The compiled template. Raises jinja2's TemplateError if it is malformed."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    # {% generation %}..{% endgeneration %} becomes {% call mark_generation() %}..{% endcall %}.
    return environment.from_string(GENERATION.sub(
        lambda tag: tag[1] + ("endcall" if tag[2] else "call mark_generation()") + tag[3], template))


def answer(template: str, variables: dict[str, Any]) -> tuple[str | None, str | None]:
    """(text, None), or (None, error) for whatever a template can raise."""
    first, last = variables.pop("marks", ("", ""))
    try:
        text = compiled(template).render(**variables, mark_generation=lambda caller: first + caller() + last)
        return (text, None) if len(text) <= LONGEST else (None, f"a text of {len(text):,} characters")
    except Exception as error:
        return None, " ".join(str(error).split())[:200] or type(error).__name__


def serve(seconds: float) -> None:
    """Answer requests from stdin until it closes. The system ends this process if one takes longer."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # macOS has no such limit
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # SIGVTALRM, which ends this process
        template, jobs = json.loads(line)
        print(json.dumps([answer(template, variables) for variables in jobs]), flush=True)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


# ---- The parent -------------------------------------------------------------------------------------------

children: dict[int, subprocess.Popen] = {}  # by process id: a forked process needs a child of its own
lock = threading.Lock()


def start_child() -> subprocess.Popen:
    # In a session of its own, Ctrl-C does not reach it. -P keeps the current folder out of its imports.
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-P", "-m", "formats.template_process", str(SECONDS)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            env=os.environ | path, start_new_session=True)


def render(template: str, jobs: list[dict[str, Any]]) -> list[tuple[str | None, str | None]]:
    """(text, None) or (None, error) for each job: the variables of the template.

    "marks" in a job are the texts that {% generation %} and {% endgeneration %} print. Raises UserError if
    all jobs together take more than SECONDS or MEMORY.
    """
    with lock:
        child = children.pop(os.getpid(), None) or start_child()
        assert child.stdin and child.stdout
        line = b""
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps([template, jobs]).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        if not line.endswith(b"\n"):
            raise UserError(f"chat template: takes more than {SECONDS} s or {MEMORY >> 20:,} MB")
        children[os.getpid()] = child  # only now, so that nobody reads the answer of an interrupted request
    return json.loads(line)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
