"""How processes wait for each other, and what becomes of one that waits for another that is gone."""

import signal
import sys
import time

import pytest

from tests.commands import Command, start_two

BEGIN = """
import os, sys, time
import torch
from engine import liveness
from engine.errors import UserError, exit_code
from engine.processes import Processes

liveness.BEAT, liveness.SILENCE, liveness.GRACE, liveness.JOIN_LIMIT = 0.2, 2.0, 1.0, 2.0

def say(*words):
    print(*words, flush=True)

def main():
    processes = Processes(device=torch.device("cpu"))
    try:
        story(processes.connect())
    except UserError as error:
        processes.let_the_first_speak(error)
        raise
    finally:
        processes.close()
    return 0
"""
END = "\nsys.exit(exit_code('engine.run', main))\n"


def start(story: str, world: int = 2, **variables: str) -> list[Command]:
    """Processes that do what `story(processes)` says, with limits of seconds."""
    return start_two([sys.executable, "-c", BEGIN + story + END], world, **variables)


def codes(processes: list[Command]) -> list[int]:
    return [process.wait(30) for process in processes]


def wait_until_said(word: str, *processes: Command) -> None:
    while not all(word in process.output for process in processes):
        assert all(process.poll() is None for process in processes), [process.errors for process in processes]
        time.sleep(0.01)


TURNS = """
import huggingface_hub.constants as hub
hub.HF_HUB_OFFLINE = False  # whatever the tests run with
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.pop("TRANSFORMERS_OFFLINE", None)
def story(processes):
    assert processes.computed_by_first(lambda: (time.sleep(0.3), os.getpid())[1]) == processes.from_first(os.getpid())
    if processes.rank == 2:
        processes.local_rank = 0  # the first of another node
    def turn():
        before = time.monotonic()
        time.sleep(0.1)
        return before, time.monotonic(), hub.HF_HUB_OFFLINE
    times = processes.gather_patiently(processes.first_before_others(turn))
    first, second_node, (others, _, offline) = times[0], times[2], min(times[1], times[3])
    assert first[1] < second_node[0] < second_node[1] < others
    assert (first[2], second_node[2], offline, hub.HF_HUB_OFFLINE) == (False, False, True, False)
    assert "HF_HUB_OFFLINE" not in os.environ
"""


def test_the_first_works_before_the_first_of_each_node_and_these_before_the_others():
    four = start(TURNS, world=4)
    assert codes(four) == [0] * 4, [process.errors for process in four]


MISTAKE = """
def story(processes):
    def work():
        if processes.rank == WHO:
            raise UserError("this is wrong")
    processes.METHOD(work)
"""


@pytest.mark.parametrize(("method", "who"), [("computed_by_first", 0), ("first_before_others", 0), ("first_before_others", 1)])
def test_a_mistake_that_one_meets_is_everybodys_and_is_said_once(method, who):
    three = start(MISTAKE.replace("METHOD", method).replace("WHO", str(who)), world=3)
    assert codes(three) == [2] * 3, [process.errors for process in three]
    assert [process.errors for process in three] == ["engine.run: error: this is wrong\n", "", ""]


SLOW_TO_SAY = """
import engine.errors
def story(processes):
    def work():
        raise UserError("this is wrong")
    try:
        processes.computed_by_first(work)
    finally:
        if processes.is_first:
            time.sleep(1)
"""


def test_a_launcher_hears_of_a_mistake_only_when_it_was_said():
    both = start(SLOW_TO_SAY)
    assert both[1].wait(30) == 2
    assert both[0].errors == "engine.run: error: this is wrong\n"
    assert both[0].wait(30) == 2


WAITING = """
def story(processes):
    say("here")
    if processes.rank == WHO:
        ACT
    processes.METHOD
"""


@pytest.mark.parametrize("method", ["computed_by_first(lambda: time.sleep(60))", "gather_patiently(0)"])
def test_those_that_wait_for_a_killed_store_host_leave(method):
    three = start(WAITING.replace("METHOD", method).replace("WHO", "0").replace("ACT", "time.sleep(60)"), world=3)
    wait_until_said("here", *three)
    three[0].kill()
    assert codes(three) == [-signal.SIGKILL, 75, 75]
    assert [len(process.errors.splitlines()) for process in three] == [0, 1, 0], [process.errors for process in three]
    assert "process 1: another process is gone" in three[1].errors


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("raise UserError('mine', alone=True)", "process 1 left; the message of that one"),
        (
            "torch.distributed.destroy_process_group = lambda: time.sleep(600); raise UserError('mine', alone=True)",
            "process 1 left; the message of that one",
        ),
        ("time.sleep(2.8)", None),
        ("os.kill(os.getpid(), 9)", "process 1 ended without a word; the launcher's message"),
        ("os.kill(os.getpid(), 19)", "process 1 gave no sign of life for 2 seconds"),
    ],
    ids=["leaves", "leaves-nccl", "slow", "killed", "stopped"],
)
def test_who_waits_for_one_that_is_gone_leaves_and_says_which(act, said):
    three = start(WAITING.replace("METHOD", "gather_patiently(0)").replace("WHO", "1").replace("ACT", act), world=3)
    ends = codes(three[::2])
    if three[1].poll() is None:
        three[1].kill()
    assert ends == ([75, 75] if said else [0, 0]), [process.errors for process in three]
    assert (said or "") in three[0].errors
    assert three[2].errors == ""


def test_what_the_first_does_not_meet_is_said_by_one_of_those_that_do():
    story = "def story(processes):\n    if processes.rank:\n        raise UserError('this disk')\n    processes.wait_for_all()"
    three = start("liveness.FIRST_WORD = 0.5\n" + story, world=3)
    assert codes(three) == [75, 2, 2]
    assert "".join(process.errors for process in three[1:]) == "engine.run: error: this disk\n"


def test_a_store_that_goes_while_processes_join_leaves_no_trace():
    broken = "def broken(self): raise torch.distributed.DistNetworkError('Connection reset by peer')\n"
    both = start(f"{broken}torch.distributed.PrefixStore.clone = broken\ndef story(processes): pass")
    assert codes(both) == [75, 75]
    assert "process 0: another process is gone" in both[0].errors
    assert "Traceback" not in both[0].errors


def test_a_process_that_does_not_come_is_named():
    three = start("def story(processes): pass", world=3, WORLD_SIZE="4")
    assert codes(three) == [75] * 3
    assert three[0].errors.startswith("engine.run: error: process 0: process 3 did not come within 2 seconds")
    assert [len(process.errors.splitlines()) for process in three] == [1, 1, 0], [process.errors for process in three]


def test_a_process_without_a_first_one_says_where_it_looked():
    started = start("liveness.GRACE = 9.0\ndef story(processes): pass", MASTER_PORT="1", TORCHELASTIC_USE_AGENT_STORE="True")
    assert codes(started) == [75, 75]
    assert "nobody answers at 127.0.0.1:1, where the processes meet" in started[0].errors


BLOCKED = """
def story(processes):
    say("here")
    if processes.rank == 0:
        time.sleep(60)
    time.sleep(60)  # as in a collective of NCCL, which notices nothing
"""


def test_processes_that_are_blocked_while_another_is_killed_leave():
    three = start(BLOCKED, world=3)
    wait_until_said("here", *three)
    three[1].kill()
    assert codes(three) == [75, -signal.SIGKILL, 75]
    said = three[0].errors + three[2].errors
    assert said.count("\n") == 1, said
    assert "another process is gone: process 1 ended without a word" in said


def test_a_process_that_is_blocked_while_the_store_dies_leaves():
    both = start(BLOCKED)
    wait_until_said("here", *both)
    both[0].kill()
    assert both[1].wait(10) == 75
    assert "process 1: this process can tell no other that it lives; the store of the processes" in both[1].errors
    assert len(both[1].errors.splitlines()) == 1


FROZEN = """
import signal
liveness.LAST_LOOK = 1.0
if AT_START:
    def hold(*arguments, open_store=liveness.open_store, **options):
        if os.environ["RANK"] == "0":
            store = open_store(*arguments, **options)
            say("here")
            time.sleep(60)
        say("here")
        time.sleep(1)
        return open_store(*arguments, **options)
    liveness.open_store = hold

def story(processes):
    say("here")
    if processes.is_first:
        time.sleep(60)
    time.sleep(0.5)
    ACT
"""


@pytest.mark.parametrize(
    "act", [None, "torch.distributed.all_reduce(torch.zeros(1))", "processes.wait('never')", "processes.store.get('never')"]
)
def test_those_whose_store_falls_silent_leave(act):
    """As on a node that lost its power: no connection is closed."""
    both = start(FROZEN.replace("AT_START", str(act is None)).replace("ACT", str(act)))
    wait_until_said("here", *both)
    both[0].send_signal(signal.SIGSTOP)
    assert both[1].wait(15) == 75, both[1].errors
    both[0].kill()
    assert "process 1: this process can tell no other that it lives; the store of the processes" in both[1].errors
    assert len(both[1].errors.splitlines()) == 1, both[1].errors


GROUPS = """
def open_files():
    return len(os.listdir("/proc/self/fd"))

def story(processes):
    before = open_files()
    torch.distributed.new_group()
    assert processes.gather_objects(open_files() - before) == [processes.world + 3] * processes.world
    assert max(processes.gather_objects(open_files())) < 2 * (processes.world + 4) + 3 * processes.world + 64
"""


def test_a_group_takes_as_many_open_files_as_are_counted():
    four = start(GROUPS, world=4)
    assert codes(four) == [0] * 4, [process.errors for process in four]


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, HARD))
def story(processes):
    say(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_limit_of_open_files_is_raised_as_far_as_needed_or_refused():
    both = start(LIMITED.replace("HARD", "4096"))
    assert codes(both) == [0, 0], [process.errors for process in both]
    assert [process.output for process in both] == ["(1044, 4096)\n", "(524, 4096)\n"]
    first = start(LIMITED.replace("HARD", "600"))[0]
    assert first.wait(30) == 2
    assert "process 0 of 2, which keeps their store, needs 1,044 open files, and this node allows 600: raise" in first.errors


HUNG = """
from engine import processes as module
module.NETWORK_LIMIT = liveness.LAST_LOOK = 1.0
torch.distributed.all_reduce = lambda *arguments: time.sleep(60 * int(os.environ["RANK"]))
def story(processes):
    time.sleep(60)
"""


def test_a_network_that_hangs_is_given_up_and_the_processes_are_named():
    three = start(HUNG, world=3)
    assert codes(three[1:]) == [75, 75]
    three[0].kill()
    said = "".join(process.errors for process in three[1:])
    assert "the first exchange over the network has not ended in 1 seconds by processes 1, 2; look at the network" in said
    assert said.count("\n") == 1, "one process of a node speaks"


def test_torchrun_that_keeps_its_store_over_restarts_of_several_nodes_is_refused():
    torchrun = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    both = start("def story(processes): pass", **torchrun)
    assert codes(both) == [2, 2]
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, with --rdzv-backend c10d" in both[0].errors


def test_processes_without_a_place_to_meet_say_so():
    first = start("def story(processes): pass", MASTER_PORT="")[0]
    assert first.wait(30) == 2
    assert "WORLD_SIZE is 2, but MASTER_ADDR and MASTER_PORT do not say where the processes meet" in first.errors


AGREEING = """
from engine.loop.stop import StopSignal
def story(processes):
    stop, steps, reductions, reduce = StopSignal(processes), 0, [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *given, **options: (reductions.append(steps), reduce(*given, **options))[1]
    while True:
        time.sleep(SECONDS)
        steps += 1
        if processes.rank == 1 and steps == 25:
            stop.received = True
        if stop.agreed():
            break
    torch.distributed.all_reduce = reduce
    stop.close()
    assert len(set(processes.gather_objects((steps, *reductions)))) == 1
    say(steps, *(after - before for before, after in zip(reductions, reductions[1:])))
"""


@pytest.mark.parametrize(("seconds", "intervals"), [("0.001", {1, 10}), ("0.001 if processes.rank else 0.5", {1, 3, 4})])
def test_processes_agree_to_stop_every_ten_steps_or_two_seconds_of_the_slowest(seconds, intervals):
    both = start(AGREEING.replace("SECONDS", seconds).replace("== 25", "== 25" if seconds == "0.001" else "== 6"))
    assert codes(both) == [0, 0], [process.errors for process in both]
    steps, *between = map(int, both[0].output.split())
    assert set(between) <= intervals
    assert steps <= (25 + 20 if seconds == "0.001" else 6 + 8)


LAZY = """
import torch.distributed as dist
from engine import processes as of_processes
of_processes.LAZY_CONNECTIONS = 2
def story(processes):
    groups = None, dist.new_group()
    for group in groups:
        total = torch.ones(1000) * (processes.rank + 1)
        dist.all_reduce(total, group=group, async_op=True).wait()
        assert total.tolist() == [10.0] * 1000
    assert processes.gather_patiently(processes.rank) == [0, 1, 2, 3]
    assert processes.computed_by_first(lambda: os.environ["TORCH_GLOO_LAZY_INIT"]) == "1"
    processes.wait_for_all()
    if WHO == processes.rank:
        os.kill(os.getpid(), 9)
    if WHO is not None:
        time.sleep(0.5)
        dist.all_reduce(torch.zeros(1), group=dist.new_group())
"""


@pytest.mark.parametrize(("who", "expected"), [(None, [0] * 4), (0, [-9, 75, 75, 75]), (2, [75, 75, -9, 75])])
def test_processes_that_connect_when_they_first_talk_miss_one_all_the_same(who, expected):
    four = start(LAZY.replace("WHO", str(who)), world=4)
    assert codes(four) == expected, [process.errors for process in four]


HELD = """
import atexit, contextlib, threading
def held(store):
    with contextlib.suppress(RuntimeError):  # the store went with the first process
        while True:
            store.check(["never"])

def story(processes):
    for _ in range(8):
        threading.Thread(target=held, args=(processes.own_store(),), daemon=True).start()
    time.sleep(0.1)
    ours = {"guard", "heartbeat"}
    atexit.register(lambda: say(ours & {thread.name for thread in threading.enumerate()}, "at the end"))
"""


def test_a_thread_that_the_store_holds_at_the_end_aborts_no_process():
    both = start(HELD)
    assert codes(both) == [0, 0]
    assert [process.errors for process in both] == ["", ""]
    assert [process.output for process in both] == ["set() at the end\n"] * 2
