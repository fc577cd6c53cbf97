"""Bounded parallel work that keeps its order."""

import threading
import time

import pytest

from pipeline.threads import Background, map_in_order, prefetch


def test_results_come_in_the_order_of_the_items_whatever_the_threads_do():
    def square(number):
        time.sleep(0.003 * (number % 4 == 0))
        return number * number

    assert list(map_in_order(square, range(100), num_workers=5)) == [number * number for number in range(100)]


def test_no_items_give_no_results():
    assert list(map_in_order(str, [], num_workers=2)) == []


def test_work_is_really_done_by_several_threads_at_once():
    meeting = threading.Barrier(3, timeout=10)  # nobody leaves before three are there
    assert list(map_in_order(lambda _: meeting.wait() >= 0, range(6), num_workers=3)) == [True] * 6


@pytest.mark.parametrize("in_flight", [1, 2, 7])
def test_never_more_items_are_taken_than_may_be_in_flight(in_flight):
    taken, finished, most = 0, 0, 0

    def items():
        nonlocal taken, most
        for number in range(40):
            taken += 1
            most = max(most, taken - finished)
            yield number

    for _ in map_in_order(str, items(), num_workers=2, in_flight=in_flight):
        finished += 1
    assert most <= in_flight
    assert finished == 40


def test_an_exception_of_the_function_comes_out_at_its_place():
    def fail_at_five(number):
        if number == 5:
            raise KeyError("five")
        return number

    results = map_in_order(fail_at_five, range(10), num_workers=3)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="five"):
        next(results)


def test_an_exception_of_the_items_comes_out():
    def items():
        yield 1
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(map_in_order(str, items(), num_workers=2))


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetching_keeps_the_order_and_no_more_ready_than_asked(depth):
    made, taken, most = 0, 0, 0

    def items():
        nonlocal made, most
        for number in range(40):
            made += 1
            most = max(most, made - taken)
            yield number

    for expected, number in enumerate(prefetch(items(), depth)):
        assert number == expected
        taken += 1
    assert taken == 40
    assert most <= depth + 1


def test_prefetching_works_in_one_thread_of_its_own_and_closes_the_items_there():
    threads = []

    def items():
        try:
            while True:
                threads.append(threading.get_ident())
                yield 0
        finally:
            threads.append(threading.get_ident())

    before = threading.active_count()
    results = prefetch(items())
    next(results)
    next(results)
    results.close()
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads
    assert threading.active_count() == before


def test_an_exception_of_prefetched_items_comes_out_at_its_place():
    def items():
        yield 1
        raise OSError("the disk")

    results = prefetch(items(), 3)
    assert next(results) == 1
    with pytest.raises(OSError, match="the disk"):
        next(results)


def test_work_in_the_background_is_done_in_order_and_its_error_comes_out_next():
    done, background = [], Background()
    background.submit(lambda: done.append(1))
    background.submit(lambda: done.append(2))
    background.submit(lambda: done[9])
    with pytest.raises(IndexError):
        background.submit(lambda: done.append(3))
    background.finish()
    assert done == [1, 2]
    background.submit(lambda: done[9])
    with pytest.raises(IndexError):
        background.close()


def test_a_consumer_that_stops_early_waits_only_for_what_runs_and_leaves_no_thread():
    before = threading.active_count()
    started = []

    def note(number):
        started.append(number)
        time.sleep(0.01)
        return number

    results = map_in_order(note, range(1000), num_workers=2, in_flight=8)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before
    assert len(started) <= 9


def test_stopping_early_closes_the_items_too():
    closed = []

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    results = map_in_order(str, items(), num_workers=2)
    next(results)
    results.close()
    assert closed == [True]


def test_items_are_consumed_in_the_calling_thread():
    def items():
        yield threading.get_ident()

    assert list(map_in_order(lambda ident: ident, items(), num_workers=2)) == [threading.get_ident()]
