"""One call of a teacher, with a clock of its own: an hour of patience takes milliseconds."""

import random
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from rayfuse.errors import DataError, SignalError, TeacherError, TeacherGoneError
from rayfuse.teachers.serving import client
from rayfuse.teachers.serving.client import CALL_TIMEOUT_S, LONGEST_PAUSE_S, LOST_AT_MOST, Call, pause_s


class Clock:
    """Time that passes only where a call sleeps or waits for an answer."""

    def __init__(self):
        self.now = 0.0
        self.pauses = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


class Teacher:
    """A target whose n-th response is what `script(n)` gives or raises; a TimeoutError takes its time."""

    name = "math"

    def __init__(self, clock, script, *, patience_s=600.0, replicas=lambda now: True):
        self.clock, self.script, self.patience_s, self.replicas = clock, script, patience_s, replicas
        self.sent = 0

    def send(self):
        self.sent += 1
        return self

    def has_replicas(self):
        return self.replicas(self.clock.now)

    def result(self, timeout_s):
        said = self.script(self.sent)
        if isinstance(said, TimeoutError):
            self.clock.now += timeout_s
        if isinstance(said, Exception):
            raise said
        return said


def ask(script, **options):
    """A call's answer, the teacher and the clock."""
    clock = Clock()
    teacher = Teacher(clock, script, **options)
    call = Call(teacher, clock, clock.sleep)
    return call, teacher, clock


def _task_error(cause):
    return RayTaskError("score", "its traceback", cause)


def test_an_answer_is_given_at_once():
    call, teacher, clock = ask(lambda sent: "signals")
    assert call.wait() == "signals"
    assert (teacher.sent, clock.now) == (1, 0.0)


def test_a_lost_answer_is_asked_for_again():
    call, teacher, _ = ask(lambda sent: RayActorError() if sent < 4 else "signals")
    assert call.wait() == "signals"
    assert teacher.sent == 4


@pytest.mark.parametrize("error", [RayActorError(), BackPressureError(1, 1), ConnectionError(), RayServeException()])
def test_a_day_of_lost_answers_ends_with_the_patience(error):
    """The pause doubles up to a cap: after some 1,020 attempts a float could not hold it."""
    day = 24 * 3600.0
    call, teacher, clock = ask(lambda sent: error, patience_s=day)
    with pytest.raises(TeacherGoneError, match=rf"math did not answer for 86400 s .*{type(error).__name__}"):
        call.wait()
    assert day < clock.now <= day + LONGEST_PAUSE_S
    assert teacher.sent > 2000
    assert max(clock.pauses) <= LONGEST_PAUSE_S


def test_the_pause_doubles_and_is_capped():
    assert [pause_s(lost) for lost in range(6)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert pause_s(10**9) == LONGEST_PAUSE_S


def test_a_teacher_that_works_for_hours_is_waited_for():
    hours = 3 * 3600
    call, teacher, clock = ask(lambda sent: TimeoutError() if clock.now < hours else "signals")
    assert call.wait() == "signals"
    assert (teacher.sent, clock.now) == (1, hours)


def test_a_teacher_without_copies_is_given_up_after_its_patience():
    call, _, clock = ask(lambda sent: TimeoutError(), replicas=lambda now: now < 1000)
    with pytest.raises(TeacherGoneError, match=r"no answer within 600 s"):
        call.wait()
    assert 1500 < clock.now <= 1600 + CALL_TIMEOUT_S


def test_a_unit_that_takes_copies_with_it_is_not_waited_for_for_ever():
    def script(sent):
        return RayActorError() if sent <= LOST_AT_MOST else TimeoutError()

    call, _, clock = ask(script)
    with pytest.raises(TeacherGoneError, match="did not answer for 600 s"):
        call.wait()
    assert clock.now < 600 + 2 * CALL_TIMEOUT_S


def test_our_error_comes_out_as_it_is():
    call, _, _ = ask(lambda sent: _task_error(SignalError("not sorted")))
    with pytest.raises(SignalError, match="not sorted"):
        call.wait()


def test_another_error_names_the_teacher():
    call, teacher, _ = ask(lambda sent: _task_error(ZeroDivisionError("by zero")))
    with pytest.raises(TeacherError, match="math failed on a unit"):
        call.wait()
    assert teacher.sent == 1


def test_a_teacher_that_cannot_start_is_not_waited_for():
    def gone(now):
        raise TeacherGoneError("math cannot start: no such file")

    for error in (TimeoutError(), RayServeException("unavailable")):
        call, _, clock = ask(lambda sent, error=error: error, replicas=gone)
        with pytest.raises(TeacherGoneError, match="no such file"):
            call.wait()
        assert clock.now <= CALL_TIMEOUT_S


def test_back_pressure_is_no_news(caplog):
    call, _, _ = ask(lambda sent: BackPressureError(1, 1) if sent < 3 else "signals")
    assert call.wait() == "signals"
    assert not caplog.records
    call, _, _ = ask(lambda sent: RayActorError() if sent < 3 else "signals")
    assert call.wait() == "signals"
    assert [record.getMessage() for record in caplog.records] == ["teacher math: asking again after RayActorError"] * 2


def test_what_is_wrong_with_an_answer_is_no_reason_to_ask_again(monkeypatch):
    def unreadable(answer):
        raise DataError(f"cannot read {answer}")

    sent = []

    class Response:
        def result(self, timeout_s):
            return "signals"

    teacher = client.TeacherClient.__new__(client.TeacherClient)
    teacher.teacher = SimpleNamespace(name="math", patience_s=600.0)
    monkeypatch.setattr(teacher, "send", lambda method, arguments: sent.append((method, *arguments)) or Response())
    with pytest.raises(DataError, match="cannot read signals"):
        teacher._ask(unreadable, "score", [1])()
    assert sent == [("score", [1])]


def test_two_calls_do_not_ask_again_in_step():
    random.seed(0)
    pauses = [ask(lambda sent: RayActorError() if sent < 4 else 1) for _ in range(2)]
    for call, _, _ in pauses:
        call.wait()
    assert pauses[0][2].pauses != pauses[1][2].pauses
