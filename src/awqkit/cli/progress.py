"""Two listeners for the events of a long run: a progress line on a terminal, plain lines for a log.

The name of a task is the unit of its steps ("block" gives "block 3/30"). A task whose name begins with
"block" gets one plain line per BlockFinished; any other gets one at its start and end, and in between one for
every quarter or ten seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from awqkit.events import BlockFinished, Caution, Event, Notice, TaskAdvanced, TaskFinished, TaskStarted

_PLAIN_SECONDS = 10.0
_PLAIN_SHARE = 0.25
_BAR_WIDTH = 16
_FREE_COLUMNS = 4


@dataclass(slots=True)
class Pace:
    """When a task began and how far it was then and when it was last heard of, on time.monotonic()."""

    total: int
    started: float
    done: float = 0.0
    heard: float = 0.0
    begun_with: float = 0.0

    def seconds_left(self, now: float) -> float | None:
        """Seconds to the end at the pace so far; None before the first step."""
        own = self.done - self.begun_with
        if own <= 0:
            return None
        seconds = (self.heard - self.started) * (self.total - self.begun_with) / own
        return max(0.0, self.started + seconds - now)


def clock_text(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class PlainProgress:
    """A listener that calls `write` with one line at a time, for logs and pipes."""

    def __init__(self, write: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._now = now
        self._paces: dict[str, Pace] = {}
        self._printed: dict[str, tuple[float, float]] = {}  # task name -> time and share of its last line
        self._has_blocks = False

    def __call__(self, event: Event) -> None:
        """Write what `event` is worth."""
        if isinstance(event, Notice):
            self._write(event.text)
        elif isinstance(event, Caution):
            self._write(f"caution: {event.text}")
        elif isinstance(event, TaskStarted):
            self._start(event)
        elif isinstance(event, TaskAdvanced):
            self._advance(event)
        elif isinstance(event, TaskFinished):
            self._finish(event)
        elif isinstance(event, BlockFinished):
            self._block(event)

    def _start(self, event: TaskStarted) -> None:
        now = self._now()
        self._paces[event.name] = Pace(event.total, now, event.done, now, event.done)
        self._printed[event.name] = (now, event.done / max(event.total, 1))
        self._write(f"{event.name} {event.done}/{event.total}")

    def _advance(self, event: TaskAdvanced) -> None:
        pace = self._paces.get(event.name)
        if pace is None or is_block_task(event.name):
            return
        now = self._now()
        pace.done, pace.heard = event.done, now
        printed, share = self._printed[event.name]
        reached = event.done / max(pace.total, 1)
        if reached >= 1 or (now - printed < _PLAIN_SECONDS and reached - share < _PLAIN_SHARE):
            return
        self._printed[event.name] = (now, reached)
        left = pace.seconds_left(now)
        self._write(f"{event.name} {int(event.done)}/{pace.total}" + (f"  left {clock_text(left)}" if left else ""))

    def _finish(self, event: TaskFinished) -> None:
        pace = self._paces.pop(event.name, None)
        if pace is not None and not is_block_task(event.name):
            self._write(f"{event.name} {pace.total}/{pace.total}  {self._now() - pace.started:.1f} s")

    def _block(self, event: BlockFinished) -> None:
        parts = [f"block {event.index + 1}/{event.num_blocks}", f"{event.seconds:.1f} s", *block_facts(event)]
        pace = next((pace for name, pace in self._paces.items() if is_block_task(name)), None)
        if pace is not None and event.index + 1 < event.num_blocks:
            now = self._now()
            pace.done, pace.heard = event.index + 1, now
            parts.append(f"left {clock_text(pace.seconds_left(now) or 0)}")
        self._write("  ".join(parts))


def is_block_task(name: str) -> bool:
    """Whether the task reports each step by BlockFinished."""
    return name.startswith("block")


def block_facts(event: BlockFinished) -> list[str]:
    """What a finished block has to say: its errors and how many choices were undone."""
    facts = []
    if event.error_nearest is not None and event.error_chosen is not None:
        facts.append(f"output error {event.error_nearest:.4g} -> {event.error_chosen:.4g}")
    elif event.error_chosen is not None:
        facts.append(f"output error {event.error_chosen:.4g}")
    if event.num_fallbacks:
        facts.append(f"{event.num_fallbacks} fell back")
    return facts


class TerminalProgress:
    """A listener that draws one line per running task, and "loading" or "working" while none runs.

    A context manager: the lines are drawn inside it and gone after it.
    """

    def __init__(self, console: RichConsole, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._paces: dict[TaskID, Pace] = {}
        self._tasks: dict[str, TaskID] = {}
        self._last_block = ""
        ascii_only = console.options.ascii_only
        self._progress = _NarrowProgress(
            SpinnerColumn("line" if ascii_only else "dots"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=_BAR_WIDTH),
            _Times(self._paces, now),
            # The rest of the line: cut, never wrapped, so that the line stays one line.
            TextColumn(
                "{task.fields[detail]}", style="dim", markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis" if not ascii_only else "crop"),
            ),
            console=console, transient=True, expand=True, refresh_per_second=8, redirect_stdout=False,
        )  # fmt: skip
        self._idle = self._progress.add_task("loading", total=None, detail="")

    def __enter__(self) -> TerminalProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Draw what `event` is worth."""
        if isinstance(event, Notice):
            self._progress.console.print(Text(event.text, style="dim"))
        elif isinstance(event, Caution):
            self._progress.console.print(Text(f"caution: {event.text}", style="yellow"))
        elif isinstance(event, TaskStarted):
            self._start(event)
        elif isinstance(event, TaskAdvanced):
            self._advance(event)
        elif isinstance(event, TaskFinished):
            self._finish(event)
        elif isinstance(event, BlockFinished):
            self._last_block = ", ".join(block_facts(event))

    def _start(self, event: TaskStarted) -> None:
        now = self._now()
        text = _step_text(event.name, event.done, event.total)
        task = self._progress.add_task(text, total=event.total, completed=event.done, detail="")
        self._tasks[event.name] = task
        self._paces[task] = Pace(event.total, now, event.done, now, event.done)
        self._progress.update(self._idle, visible=False)

    def _advance(self, event: TaskAdvanced) -> None:
        task = self._tasks.get(event.name)
        if task is None:
            return
        pace = self._paces[task]
        pace.done, pace.heard = event.done, self._now()
        self._progress.update(
            task,
            completed=event.done,
            description=_step_text(event.name, event.done, pace.total),
            detail=event.detail or self._last_block,
        )

    def _finish(self, event: TaskFinished) -> None:
        task = self._tasks.pop(event.name, None)
        if task is None:
            return
        self._progress.remove_task(task)
        del self._paces[task]
        self._last_block = ""
        if not self._tasks:
            self._progress.reset(self._idle, total=None, description="working", visible=True)


class _NarrowProgress(Progress):
    """A Progress that leaves the last columns free, so that the "^C" that a terminal echoes wraps no line."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for renderable in super().get_renderables():
            yield _Narrow(renderable)


@dataclass(frozen=True, slots=True)
class _Narrow:
    renderable: RenderableType

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.renderable, options.update(width=max(1, options.max_width - _FREE_COLUMNS)))


class _Times(ProgressColumn):
    """Time since the task began, and time left where a pace is known."""

    max_refresh = 0.5

    def __init__(self, paces: dict[TaskID, Pace], now: Callable[[], float]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._paces = paces
        self._now = now

    def render(self, task: Task) -> Text:
        text = clock_text(task.elapsed or 0)
        pace = self._paces.get(task.id)
        left = None if pace is None else pace.seconds_left(self._now())
        return Text(text if left is None else f"{text}, left {clock_text(left)}")


def _step_text(name: str, done: float, total: int) -> str:
    step = min(int(done) + 1, total)
    return f"{name} {step:>{len(str(total))}}/{total}"
