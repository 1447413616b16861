"""What a person waits for before the first step."""

from pipelines.training import startup
from pipelines.training.startup import Startup


def test_parts_add_up_to_the_wait():
    marks = [("imports", 3.0), ("ray", 5.0), ("workers", 9.0), ("first_step", 12.0)]
    parts = startup.seconds(1.0, marks, {"wait_s": 1.25})
    assert parts == {
        "imports": 2.0, "ray": 2.0, "workers": 4.0, "first_step": 1.75, "first_batch": 1.25, "total": 11.0
    }  # fmt: skip
    assert startup.line(parts).startswith("First step after 11.0 s (workers 4.0, ")


def test_a_machine_whose_clock_is_behind_makes_no_negative_part():
    parts = startup.seconds(0.0, [("ray", 5.0), ("workers", 4.0), ("first_step", 7.0)], {"wait_s": 9.0})
    assert parts["workers"] == 0.0 and parts["total"] == 7.0
    assert (parts["first_batch"], parts["first_step"]) == (2.0, 0.0), "no longer than the step with its wait"


def test_a_process_began_before_it_asked():
    clock = Startup.of_process()
    clock.over("imports")
    ((_, at),) = clock.marks
    assert 0 < at - clock.begun < 86400
