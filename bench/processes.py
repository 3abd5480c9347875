"""Processes of a gloo group on the loopback address, started once, that run functions together: for benchmarks and tests."""

from __future__ import annotations

import importlib
import os
import pickle
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

SECONDS = 150  # until an answer is no more waited for
GROUP_SECONDS = 60  # until a collective does


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = getattr(importlib.import_module(module), name)(*arguments), None
        except BaseException:  # DCP's own is no Exception
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))  # tensors as copies, not as shared memory, which ends with its process


class Processes:
    """So many ranks; `run` calls a function of a module on all of them."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.size, pairs = size, [context.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, str(folder / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # theirs: freed tensors go back, so that peaks can be told
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def send(self, function: Any, *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, arguments))

    def answers(self, seconds: float = SECONDS) -> list[tuple[Any, str | None]]:
        """Each rank's result and its error; of a rank that is gone, that it is."""
        found: dict[int, tuple[Any, str | None]] = {}
        while len(found) < self.size:
            left = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in found}
            ready = wait(left, seconds)
            if not ready:
                self.stop()
                raise TimeoutError(f"ranks {sorted(left.values())} did not answer in {seconds} seconds")
            for pipe in ready:
                try:
                    found[left[pipe]] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    found[left[pipe]] = (None, "gone")
        return [found[rank] for rank in range(self.size)]

    def run(self, function: Any, *arguments: Any) -> list[Any]:
        """Each rank's result. Raises RuntimeError with the tracebacks of those that raise."""
        self.send(function, *arguments)
        answers = self.answers()
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error is not None]
        if errors:
            raise RuntimeError("\n".join(errors))
        return [answer for answer, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
