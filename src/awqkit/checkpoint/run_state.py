"""What a run keeps beside OUT until it is complete: so that it may be stopped at any moment, and goes on.

    .OUT.awqkit/lock         held while a run is under way
                owner.json   by whom
                journal.json what is durable: whoever reads it finds all that it names
                checkpoint/  OUT as far as it is written
                state/       whatever else the run needs to go on

Nothing is in the journal before it is on the disk, and the journal changes by a rename.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from awqkit.checkpoint.output import disk_errors, refuse_parent
from awqkit.checkpoint.sync import sync_file, sync_folder
from awqkit.errors import FormatError, InputError, OutputError, UsageError

_SCHEMA = 1
_JOURNAL = "journal.json"
_POINTLESS = (InputError, UsageError, FormatError)  # the same command would end in the same way
DIGEST = "sha256:"  # begins a value that says nothing to people
KEPT_ATTRIBUTE = "awqkit_kept"  # of an exception: what to tell of a run that can go on


class RunState:
    """The folder of one run; a context manager.

    Entering takes the lock and reads what an earlier run left, which is kept if `fingerprint` is the same. Leaving with
    an error keeps what is durable, and tells so in the error's `KEPT_ATTRIBUTE`; leaving after `complete`, or with
    nothing durable, removes everything.

    fingerprint: item -> value, all that must be the same for a run to go on. restart: what is there is thrown away.
    journal: what is durable, empty in a run that begins. lasting: files of the state that are needed to the end.
    Raises OutputError where another run holds the lock, or an earlier one was of other inputs or options.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> None:
        real = Path(os.path.realpath(out))
        self._out, self._restart = out, restart
        self.folder = real.with_name(f".{real.name}.awqkit")
        self._fingerprint = json.loads(json.dumps(dict(fingerprint)))
        self._lock = FileLock(self.folder / "lock", timeout=0)
        self.journal: dict[str, Any] = {}
        self.lasting: list[str] = []
        self._noted: dict[str, Any] = {}
        self._complete = False

    @property
    def checkpoint(self) -> Path:
        """The folder that becomes OUT."""
        return self.folder / "checkpoint"

    def __enter__(self) -> RunState:
        refuse_parent(self._out)
        self._take_lock()
        try:
            self.journal = {} if self._restart else self._read_journal()
            if self.journal:
                self._refuse_another()
            else:
                self._clear()
            with disk_errors(self._out):
                for folder in (self.checkpoint, self._files):
                    folder.mkdir(exist_ok=True)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.journal and not self._complete and not isinstance(error, _POINTLESS):
            if error is not None:
                setattr(error, KEPT_ATTRIBUTE, self._kept())
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def complete(self) -> None:
        """OUT stands: nothing here is needed any more."""
        self._complete = True

    def note(self, **entries: Any) -> None:
        """What the next `record` puts into the journal as well."""
        self._noted |= entries

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as file `name` of the state; durable with the next `record`, which must name it."""
        apart: dict[str, Tensor] = {}
        seen = set()
        for key, value in tensors.items():
            there = value.detach().cpu().contiguous()
            storage = there.untyped_storage().data_ptr()
            apart[key] = there.clone() if storage in seen else there  # the format knows no shared memory
            seen.add(storage)
        with disk_errors(self._out):
            save_file(apart, self._files / name)

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors of file `name` of the state. Raises OutputError where it cannot be read."""
        try:
            return load_file(self._files / name)
        except Exception as error:  # safetensors (Rust) raises classes of its own
            raise self._damaged(f"{self._files / name} cannot be read") from error

    def record(self, **entries: Any) -> None:
        """Make the state's files durable and put `entries` into the journal, which has them from then on.

        files: names of all files of the state that are still needed; the others are removed. Tensors of the checkpoint
        that an entry speaks of are on the disk already.
        """
        journal = {**self.journal, **json.loads(json.dumps({**self._noted, **entries}))}
        journal |= {"schema": _SCHEMA, "fingerprint": self._fingerprint}
        with disk_errors(self._out):
            new = set(journal.get("files", ())) - set(self.journal.get("files", ()))
            for name in sorted(new):
                sync_file(self._files / name)
            sync_folder(self._files)
            beside = self.folder / f"{_JOURNAL}.new"
            beside.write_text(json.dumps(journal, ensure_ascii=False), encoding="utf-8")
            sync_file(beside)
            beside.replace(self.folder / _JOURNAL)
            sync_folder(self.folder)
            sync_folder(self.folder.parent)
            self.journal = journal
            for file in self._files.iterdir():
                if file.name not in journal.get("files", ()):
                    file.unlink()

    @property
    def _files(self) -> Path:
        return self.folder / "state"

    def _take_lock(self) -> None:
        with disk_errors(self._out):
            for _ in range(3):
                self.folder.mkdir(exist_ok=True)
                try:
                    self._lock.acquire()
                except Timeout:
                    raise OutputError(
                        f"{self._out}: another run is writing there ({self._owner()}); wait for it, stop it, or give "
                        "another name"
                    ) from None
                except NotImplementedError:  # a file system without locks: nothing tells two runs apart there
                    break
                if (self.folder / "lock").exists():
                    break
                self._lock.release()  # a run that ended took the folder away in between
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            (self.folder / "owner.json").write_text(json.dumps(owner), encoding="utf-8")

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / "owner.json").read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "it does not say which"

    def _read_journal(self) -> dict[str, Any]:
        file = self.folder / _JOURNAL
        became_out = not self.checkpoint.exists() and self._out.exists()  # of a run that was killed at its very end
        if not file.exists() or became_out:
            return {}
        try:
            journal = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(f"{file} cannot be read") from error
        if not isinstance(journal, dict) or journal.get("schema") != _SCHEMA:
            raise self._damaged(f"{file} is of another awqkit")
        return journal

    def _refuse_another(self) -> None:
        before, now = self.journal["fingerprint"], self._fingerprint
        differs = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
        if differs:
            found = "; ".join(_difference(key, before.get(key), now.get(key)) for key in differs)
            raise OutputError(
                f"{self._out}: a stopped run is kept in {self.folder.name}, and it was another one: {found}; repeat it "
                "as it was to go on, or --restart to throw it away"
            )

    def _clear(self) -> None:
        with disk_errors(self._out):
            for entry in self.folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name not in ("lock", "owner.json"):
                    entry.unlink()

    def _kept(self) -> str:
        done = self.journal.get("told", "what is done is kept")
        return f"{done}; the same command goes on from there (kept in {self.folder.name}, --restart throws it away)"

    def _damaged(self, what: str) -> OutputError:
        return OutputError(f"{self._out}: the stopped run that is kept is damaged ({what}); --restart throws it away")


def _difference(key: str, before: Any, now: Any) -> str:
    """What was and what is, short enough for a line."""
    if isinstance(before, dict) and isinstance(now, dict):
        differs = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        more = f" and {len(differs) - 3} more" if len(differs) > 3 else ""
        return ", ".join(_difference(name, before.get(name), now.get(name)) for name in differs[:3]) + more
    texts = [json.dumps(value, ensure_ascii=False) for value in (before, now)]
    if DIGEST in texts[0] or max(map(len, texts)) > 40:
        return f"{key} has changed"
    return f"{key} was {texts[0]}, is {texts[1]}"
