"""Jobs: one at a time for what they make, states that move one way, events that resume."""

import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_store.jobs import ALLOWED, MAX_TRIES, Job
from model_store.store import Store
from quantizers.errors import Conflict, InvalidInput, NotFound
from quantizers.recipe import parse_recipe

RECIPE = parse_recipe("rtn-w4g64")


def test_the_life_of_a_job(store: Store) -> None:
    job = store.jobs.create("tiny", RECIPE, {"device": "cpu"})
    assert (job.state, job.progress, job.slug, job.options, job.recipe) == ("queued", 0.0, "rtn-w4g64", {"device": "cpu"}, RECIPE)
    assert job.id.startswith("job-") and not job.is_over
    running = store.jobs.start_next("worker")
    assert running is not None and running.id == job.id and running.state == "running" and running.started is not None
    assert store.jobs.start_next("worker") is None
    store.jobs.advance(job.id, stage="quantizing", progress=0.5, seconds_left=3.0)
    store.jobs.append_event(job.id, {"layer": "model.layers.0", "error": 0.01})
    done = store.jobs.succeed(job.id, "tiny@rtn-w4g64")
    assert (done.state, done.progress, done.variant) == ("succeeded", 1.0, "tiny@rtn-w4g64") and done.finished is not None and done.is_over
    assert store.jobs.get(job.id) == done and store.jobs.list() == [done] == store.jobs.list(state="succeeded", checkpoint="tiny")
    assert store.jobs.list(state="failed") == store.jobs.list(checkpoint="other") == []
    assert store.jobs.counts() == {"queued": 0, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 0}


def test_events_rise_without_gaps_and_resume(store: Store) -> None:
    job = store.jobs.create("tiny", RECIPE)
    store.jobs.start(job.id, "worker")
    for share in (0.1, 0.2):
        store.jobs.advance(job.id, stage="quantizing", progress=share)
    store.jobs.fail(job.id, "a layer holds NaN", code="quantization_failed")
    events = store.jobs.events_since(job.id)
    assert [event.id for event in events] == [1, 2, 3, 4, 5]
    assert [event.data["state"] for event in events] == ["queued", "running", "running", "running", "failed"]
    assert events[-1].data["error"] == {"message": "a layer holds NaN", "param": None, "code": "quantization_failed"}
    assert store.jobs.events_since(job.id, 3) == events[3:]
    assert store.jobs.events_since(job.id, 99) == ()


def test_one_open_job_for_a_variant(store: Store) -> None:
    first = store.jobs.create("tiny", RECIPE)
    assert store.jobs.create("tiny", RECIPE) == first
    assert store.jobs.create("other", RECIPE).id != first.id
    assert store.jobs.create("tiny", parse_recipe("rtn-w8")).id != first.id
    with pytest.raises(Conflict, match="other options"):
        store.jobs.create("tiny", RECIPE, {"seed": 1})
    store.jobs.cancel(first.id)
    assert store.jobs.create("tiny", RECIPE).id != first.id


def test_jobs_of_dead_processes_are_queued_again_and_given_up_at_last(store: Store) -> None:
    job = store.jobs.create("tiny", RECIPE)
    for attempt in range(1, MAX_TRIES + 1):
        assert store.jobs.start(job.id, "worker").tries == attempt
        (left,) = store.jobs.recover()
        assert left.state == ("queued" if attempt < MAX_TRIES else "failed")
    assert left.error is not None and left.error.code == "process_died" and left.finished is not None
    assert store.jobs.recover() == ()


def test_jobs_of_living_processes_are_left_alone(store: Store) -> None:
    jobs = [store.jobs.create(name, RECIPE) for name in ("one", "two")]
    for job, owner in zip(jobs, ("dead", "living"), strict=True):
        store.jobs.start(job.id, owner)
    assert [job.id for job in store.jobs.recover(lambda owner: owner == "living")] == [jobs[0].id]
    assert store.jobs.get(jobs[1].id).state == "running"


def test_a_job_outlives_the_store(store: Store) -> None:
    job = store.jobs.create("tiny", RECIPE)
    with Store(store.data_dir) as other:
        assert other.jobs.get(job.id) == job


def test_wrong_input(store: Store) -> None:
    job = store.jobs.create("tiny", RECIPE)
    with pytest.raises(InvalidInput, match="name a checkpoint"):
        store.jobs.create("Tiny/..", RECIPE)
    with pytest.raises(Conflict, match="not running"):
        store.jobs.advance(job.id, stage="x", progress=0.5)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="progress"):
            store.jobs.advance(job.id, stage="x", progress=share)
    for use in (store.jobs.get, store.jobs.cancel, store.jobs.events_since):
        with pytest.raises(NotFound, match="no job 'job-x'"):
            use("job-x")


def moved(store: Store, job: Job, state: str) -> Job:
    moves = {
        "running": lambda: store.jobs.start(job.id, "worker"),
        "succeeded": lambda: store.jobs.succeed(job.id, "x@y"),
        "failed": lambda: store.jobs.fail(job.id, "x"),
        "cancelled": lambda: store.jobs.cancel(job.id),
    }
    return moves[state]()


@given(path=st.lists(st.sampled_from(["running", "succeeded", "failed", "cancelled"]), max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
def test_any_path_moves_by_the_table_or_is_refused(path: list[str], store: Store) -> None:
    job = store.jobs.create("tiny", RECIPE)
    for state in path:
        before = store.jobs.get(job.id)
        if state in ALLOWED[before.state]:
            assert moved(store, job, state).state == state
        else:
            with pytest.raises(Conflict, match=f"is {before.state} and cannot become {state}"):
                moved(store, job, state)
            assert store.jobs.get(job.id) == before
    if not store.jobs.get(job.id).is_over:
        store.jobs.cancel(job.id)  # the next example begins with a job of its own


def test_threads_share_the_queue_without_taking_a_job_twice(store: Store) -> None:
    for number in range(12):
        store.jobs.create(f"model-{number}", RECIPE)
    taken: list[str] = []

    def work() -> None:
        while (job := store.jobs.start_next(threading.current_thread().name)) is not None:
            taken.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 12


def test_processes_append_to_one_log(store: Store) -> None:
    job = store.jobs.create("tiny", RECIPE)
    program = (
        "import sys; from pathlib import Path; from model_store.store import Store\n"
        "with Store(Path(sys.argv[1])) as store:\n"
        "    for number in range(10): store.jobs.append_event(sys.argv[2], {'n': number})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(store.data_dir), job.id]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [event.id for event in store.jobs.events_since(job.id)] == list(range(1, 22))
