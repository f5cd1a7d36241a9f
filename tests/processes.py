"""Run a function of a test module in several processes that talk to each other over gloo.

The processes are forked off a server that has imported torch once: about half a second each.
"""

import os
import socket
import traceback
from multiprocessing import get_context

# What FSDP imports when it is used takes five seconds more.
PRELOADED = ["accelerate", "torch._dynamo", "conformer_src.checkpoints", "conformer_src.scaling"]
PATIENCE = 120  # seconds until a test is given up


def free_port():
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _call(sender, variables, function, arguments):
    os.environ.update(variables)
    try:
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def run(count, function, *arguments):
    """Call a function in each of `count` processes; return what each gave, by rank.

    What it is given and what it returns travel by pickle; give lists or arrays, because shared
    memory of tensors goes away with the process.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, started = str(free_port()), []
    for rank in range(count):
        variables = {
            "ACCELERATE_USE_CPU": "true",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(sender, variables, function, arguments))
        process.start()
        sender.close()  # the process holds the other end: when it dies, reading ends
        started.append((process, receiver))
    try:
        results = [_result(rank, *each) for rank, each in enumerate(started)]
        for process, _ in started:
            process.join(PATIENCE)
        return results
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def _result(rank, process, receiver):
    assert receiver.poll(PATIENCE), f"process {rank} said nothing for {PATIENCE} seconds"
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"process {rank} ended with code {process.exitcode}") from None
    assert error is None, f"process {rank}:\n{error}"
    return result
