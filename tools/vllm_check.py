"""Ask a real vLLM on CPU what it makes of a checkpoint. Runs in vLLM's own environment, without awqkit.

    vllm_check.py logprobs CHECKPOINT --tokens FILE.json --out FILE.json
        FILE.json holds one list of token ids; out gets {"logprobs": [one for each token but the first],
        "completion": [the token ids that follow, chosen greedily]}
    vllm_check.py serve CHECKPOINT --prompt TEXT --out FILE.json
        starts `vllm serve`, asks it for a completion over HTTP, stops it; out gets the server's answer

Exit code 0 when vLLM answered, 1 with one line (and the server's last lines) when it did not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One engine process (its messages reach us), 1 GiB of cache, no network, no telemetry.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # torch 2.13's inductor passes its include path to the compiler unquoted: no compiling, so that a checkout whose
    # path holds spaces works too
    "TORCHDYNAMO_DISABLE": "1",
}
CONTEXT_TOKENS = 256
COMPLETION_TOKENS = 8
START_SECONDS = 300  # the very first start on a machine compiles; 50 s were seen, CI is slower
ANSWER_SECONDS = 120
STOP_SECONDS = 30
TAIL_LINES = 30


class CheckError(Exception):
    """vLLM did not do what was asked; `str(error)` says what."""


def prompt_logprobs(checkpoint: Path, tokens: list[int]) -> dict[str, Any]:
    """vLLM's log-probability of each token given those before it, and its greedy continuation."""
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams, __version__  # after the settings, which vLLM reads on import

    engine = LLM(str(checkpoint), dtype="auto", enforce_eager=True, max_model_len=CONTEXT_TOKENS, max_num_seqs=4)
    wanted = SamplingParams(max_tokens=COMPLETION_TOKENS, temperature=0, prompt_logprobs=0)
    answer = engine.generate({"prompt_token_ids": tokens}, wanted, use_tqdm=False)[0]
    if answer.prompt_logprobs is None or len(answer.prompt_logprobs) != len(tokens):
        raise CheckError(f"vLLM gave no log-probabilities for the {len(tokens)} prompt tokens")
    following = zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)
    return {
        "logprobs": [position[token].logprob for token, position in following],
        "completion": list(answer.outputs[0].token_ids),
        "versions": {"vllm": __version__},
    }


def served_completion(checkpoint: Path, prompt: str) -> dict[str, Any]:
    """The answer of `vllm serve CHECKPOINT` to one POST /v1/completions. Raises CheckError."""
    with tempfile.TemporaryDirectory() as scratch, running_server(checkpoint, Path(scratch)) as url:
        request = {"model": "checkpoint", "prompt": prompt, "max_tokens": COMPLETION_TOKENS, "temperature": 0}
        return post_json(f"{url}/v1/completions", request)


@contextlib.contextmanager
def running_server(checkpoint: Path, scratch: Path) -> Iterator[str]:
    """The URL of a healthy `vllm serve` on a free port of 127.0.0.1; none of its processes outlives this."""
    port, log = free_port(), scratch / "log"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(checkpoint),
        "--served-model-name", "checkpoint",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", "4",
    ]  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(scratch),
            start_new_session=True,
        )
    try:
        wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server)


def server_environment(scratch: Path) -> dict[str, str]:
    """The environment variables of `vllm serve`.

    vllm-cpu 0.32.0 registers under its own name, and its command `vllm` stops because it asks for the version
    of "vllm". A record of that name on the path answers it; to go when the command starts without.
    """
    environment = {**os.environ, **SETTINGS}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("vllm-cpu")
        record = scratch / "vllm-0.dist-info"
        record.mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        (record / "METADATA").write_text(text, encoding="utf-8")
        paths = [str(scratch), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when `url` answers. Raises CheckError when the server ends or START_SECONDS pass."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise CheckError(f"vllm serve ended with code {server.returncode} before it answered\n{tail(log)}")
        with contextlib.suppress(OSError), DIRECT.open(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise CheckError(f"vllm serve did not answer {url} within {START_SECONDS} s\n{tail(log)}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server's own process group, politely first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=STOP_SECONDS)
            if sign == signal.SIGKILL or not group_is_alive(server.pid):
                return


def group_is_alive(group: int) -> bool:
    """Whether any process of `group` is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# Without the proxies of the environment: the server is on this machine.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post_json(url: str, content: dict[str, Any]) -> dict[str, Any]:
    """The JSON that `url` answers to a POST of `content`. Raises CheckError with the server's words."""
    request = urllib.request.Request(url, json.dumps(content).encode(), headers={"Content-Type": "application/json"})
    try:
        with DIRECT.open(request, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise CheckError(f"{url} answered HTTP {error.code}: {error.read().decode(errors='replace')}") from error


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(log: Path) -> str:
    """The last lines of the server's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask vLLM on CPU what it makes of a checkpoint.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, given in (("logprobs", "--tokens"), ("serve", "--prompt")):
        options = verbs.add_parser(verb)
        options.add_argument("checkpoint", type=Path)
        options.add_argument(given, required=True)
        options.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    try:
        if chosen.verb == "logprobs":
            tokens = json.loads(Path(chosen.tokens).read_text(encoding="utf-8"))
            result = prompt_logprobs(chosen.checkpoint, tokens)
        else:
            result = served_completion(chosen.checkpoint, chosen.prompt)
    except CheckError as error:
        print(error, file=sys.stderr)
        return 1
    chosen.out.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
